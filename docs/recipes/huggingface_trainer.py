"""Hugging Face Trainer: compute_loss_func, gradient accumulation, and an EMA that is saved and resumed.

python docs/recipes/huggingface_trainer.py --out runs/trainer --epochs 3
python docs/recipes/huggingface_trainer.py --out runs/trainer --epochs 6  # goes on from the last checkpoint
"""

import argparse
import email.message
import json.decoder
import pathlib
import re
import statistics
import zlib
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import softlabels

parser = argparse.ArgumentParser()
parser.add_argument("--out", type=Path, default=Path("runs/trainer"))
parser.add_argument("--epochs", type=int, default=6)
options = parser.parse_args()

# A small task that every Python has: which of four modules a piece of source code is from.
modules, length = [email.message, json.decoder, pathlib, statistics], 24
samples = []
for label, module in enumerate(modules):
    words = re.findall(r"\w+|[^\w\s]", Path(module.__file__).read_text())
    for start in range(0, len(words) - length, length):
        tokens = [zlib.crc32(word.encode()) % 1000 for word in words[start : start + length]]
        samples.append({"input_ids": tokens, "labels": label})
held_out, train = samples[::5], [sample for i, sample in enumerate(samples) if i % 5]

torch.manual_seed(0)
config = BertConfig(
    vocab_size=1000, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128,
    max_position_embeddings=length, num_labels=len(modules), hidden_dropout_prob=0.0,
)  # fmt: skip
model = BertForSequenceClassification(config)
criterion = softlabels.BetaSmoothingLoss(label_smoothing=0.05, reduction="sum").attach(model)


def compute_loss(outputs, labels, num_items_in_batch=None):
    """The Trainer gives the number of labels in all micro-batches of a step; it does not divide again."""
    return criterion(outputs.logits, labels) / (len(labels) if num_items_in_batch is None else num_items_in_batch)


class SaveCriterion(TrainerCallback):
    """Put the EMA into every checkpoint, and take it from the one that training resumes from."""

    def on_save(self, args, state, control, **kwargs):
        torch.save(criterion.state_dict(), Path(args.output_dir, f"checkpoint-{state.global_step}", "criterion.pt"))

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step > 0:
            saved = Path(args.output_dir, f"checkpoint-{state.global_step}", "criterion.pt")
            criterion.load_state_dict(torch.load(saved, weights_only=True))


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}


trainer = Trainer(
    model,
    TrainingArguments(
        output_dir=str(options.out), num_train_epochs=options.epochs, learning_rate=2e-3, warmup_steps=20,
        lr_scheduler_type="constant_with_warmup", per_device_train_batch_size=16, gradient_accumulation_steps=2,
        per_device_eval_batch_size=256, save_strategy="epoch", report_to="none", disable_tqdm=True, seed=0,
    ),
    train_dataset=train,
    eval_dataset=held_out,
    compute_loss_func=compute_loss,
    compute_metrics=accuracy,
    callbacks=[SaveCriterion()],
)  # fmt: skip
last = get_last_checkpoint(options.out) if options.out.exists() else None
trainer.train(resume_from_checkpoint=last)
scores = trainer.evaluate()
assert criterion.teacher.num_updates == trainer.state.global_step  # one per optimizer step, also after a resume
print(f"{criterion.teacher.num_updates} steps, loss {scores['eval_loss']:.17g}, accuracy {scores['eval_accuracy']:.3f}")
