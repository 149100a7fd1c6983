"""A causal language model with the Hugging Face Trainer, whose logits are never computed as a whole.

python docs/recipes/language_model.py --steps 150
"""

import argparse
import email.message
import json.decoder
import re
import statistics
import tempfile
import zlib
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import softlabels

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=150)
options = parser.parse_args()

# Text that every Python has: lines of its own modules, of different lengths.
vocabulary, lines = 1000, []
for module in (email.message, json.decoder, statistics):
    for line in Path(module.__file__).read_text().splitlines():
        tokens = re.findall(r"\w+|[^\w\s]", line)[:24]
        if len(tokens) > 2:
            lines.append(torch.tensor([zlib.crc32(token.encode()) % vocabulary for token in tokens]))
held_out, train = lines[::5], [line for i, line in enumerate(lines) if i % 5]


class LanguageModel(LlamaForCausalLM):
    """Returns the last layer and its input instead of the logits of all tokens."""

    def forward(self, input_ids, attention_mask=None, **_):
        hidden = self.model(input_ids, attention_mask=attention_mask).last_hidden_state
        return {"logits": softlabels.LinearLogits(hidden[:, :-1], self.lm_head.weight)}  # all but the last say the next


def collate(rows):
    ids = pad_sequence(rows, batch_first=True)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


torch.manual_seed(0)
model = LanguageModel(
    LlamaConfig(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )
)  # fmt: skip
criterion = softlabels.BetaSmoothingLoss(label_smoothing=0.05, reduction="sum").attach(model)


def compute_loss(outputs, labels, num_items_in_batch=None):
    """Padding of -100 is not computed; the Trainer gives the number of labels of a step, and does not divide again."""
    shifted = labels[:, 1:]
    return criterion(outputs["logits"], shifted) / (
        (shifted != -100).sum() if num_items_in_batch is None else num_items_in_batch
    )


with tempfile.TemporaryDirectory() as folder:
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=folder, max_steps=options.steps, learning_rate=5e-3, per_device_train_batch_size=16,
            gradient_accumulation_steps=2, save_strategy="no", report_to="none", disable_tqdm=True, seed=0,
            prediction_loss_only=True, remove_unused_columns=False, dataloader_pin_memory=False,
        ),
        data_collator=collate,
        train_dataset=train,
        compute_loss_func=compute_loss,
    )  # fmt: skip
    trainer.train()

model.eval()
batch = collate(held_out)
with torch.no_grad():
    predicted = model(batch["input_ids"], batch["attention_mask"])["logits"].dense().argmax(-1)
next_tokens = batch["labels"][:, 1:]
accuracy = (predicted == next_tokens)[next_tokens != -100].double().mean()
assert criterion.teacher.num_updates == options.steps
print(f"{options.steps} steps, accuracy of the next token {accuracy:.3f}")
