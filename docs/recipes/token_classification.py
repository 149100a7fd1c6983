"""Token classification: what is each token of a line of Python? Padding is neither ranked nor computed."""

import argparse
import email.message
import io
import json.decoder
import keyword
import statistics
import tokenize
import zlib
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

import softlabels

KINDS = {
    tokenize.NAME: 0,
    tokenize.OP: 1,
    tokenize.NUMBER: 2,
    tokenize.STRING: 3,
    tokenize.COMMENT: 4,
}  # a keyword is 5

lines: dict[tuple[str, int], list[tuple[int, int]]] = {}
for module in (email.message, json.decoder, statistics):
    source = Path(module.__file__).read_text()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in KINDS:
            word = zlib.crc32(token.string[:3].encode()) % 499 + 1  # of its first letters; 0 is padding
            kind = 5 if keyword.iskeyword(token.string) else KINDS[token.type]
            lines.setdefault((module.__name__, token.start[0]), []).append((word, kind))
rows = [torch.tensor(line) for line in lines.values()]


def padded(some):
    words = pad_sequence([row[:, 0] for row in some], batch_first=True)
    return words, pad_sequence([row[:, 1] for row in some], batch_first=True, padding_value=-100)


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(500, 32)
        self.read = nn.GRU(32, 32, batch_first=True, bidirectional=True)
        self.head = nn.Linear(64, 6)

    def forward(self, words):
        hidden, _ = self.read(self.embed(words))
        return softlabels.LinearLogits(hidden, self.head.weight, self.head.bias)


parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=3)
options = parser.parse_args()
torch.manual_seed(0)
held_out, train = rows[::5], [row for i, row in enumerate(rows) if i % 5]
model = Tagger()
criterion = softlabels.BetaSmoothingLoss(label_smoothing=0.05).attach(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
for _ in range(options.epochs):
    order = torch.randperm(len(train)).tolist()
    for start in range(0, len(order), 32):
        words, kinds = padded([train[i] for i in order[start : start + 32]])
        loss = criterion(model(words), kinds)  # (rows, longest line): no flattening, no mask
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

words, kinds = padded(held_out)
model.eval()
with torch.no_grad():
    found = model(words).dense().argmax(-1)
print(f"accuracy of the kind of a token {(found == kinds)[kinds != -100].double().mean():.3f}")
