"""A teacher's top 50 of every training sample, recorded once; then students that never see the teacher.

python docs/recipes/offline_teacher.py  # both of the following, each in a process of its own
python docs/recipes/offline_teacher.py record top.safetensors
python docs/recipes/offline_teacher.py distil top.safetensors
"""

import email.message
import json.decoder
import re
import statistics
import subprocess
import sys
import zlib
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import softlabels

VOCABULARY, CONTEXT, TEMPERATURE = 1000, 4, 2.0

# Which token follows these four, in lines of Python's own modules?
contexts, following = [], []
for module in (email.message, json.decoder, statistics):
    text = re.findall(r"\w+|[^\w\s]", Path(module.__file__).read_text())
    tokens = [zlib.crc32(token.encode()) % VOCABULARY for token in text]
    for start in range(len(tokens) - CONTEXT):
        contexts.append(tokens[start : start + CONTEXT])
        following.append(tokens[start + CONTEXT])
x, y = torch.tensor(contexts), torch.tensor(following)
held_out = torch.arange(len(y)) % 5 == 0
train = softlabels.data.WithIndex(TensorDataset(x[~held_out], y[~held_out]))


def network(width):
    return nn.Sequential(
        nn.Embedding(VOCABULARY, width), nn.Flatten(), nn.Linear(CONTEXT * width, width), nn.ReLU(),
        nn.Linear(width, VOCABULARY),
    )  # fmt: skip


def fit(model, loss, epochs=3):
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for inputs, labels, index in DataLoader(train, batch_size=128, shuffle=True):
            optimizer.zero_grad()
            loss(model(inputs), labels, index).backward()
            optimizer.step()


def record(path):
    teacher = network(128)
    fit(teacher, lambda logits, labels, _: nn.functional.cross_entropy(logits, labels))
    with torch.no_grad():
        top = softlabels.TopKLogits.of(teacher.eval()(x[~held_out]).half(), 50, temperature=TEMPERATURE)
    save_file({"values": top.values, "indices": top.indices, "log_normalizer": top.log_normalizer}, path)


def distil(path):
    saved = load_file(path)
    criterion = softlabels.SelfDistillationLoss(alpha=0.5, temperature=TEMPERATURE)

    def loss(logits, labels, index):
        values, indices, normalizer = (saved[name][index] for name in ("values", "indices", "log_normalizer"))
        top = softlabels.TopKLogits(values, indices, VOCABULARY, normalizer, TEMPERATURE, tail="bucket")
        return criterion(logits, labels, teacher_logits=top)

    student = network(32)
    fit(student, loss)
    accuracy = (student.eval()(x[held_out]).argmax(1) == y[held_out]).double().mean()
    print(f"{Path(path).stat().st_size / len(train):.0f} bytes a sample, accuracy of the next token {accuracy:.3f}")


torch.manual_seed(0)
if len(sys.argv) == 3:
    {"record": record, "distil": distil}[sys.argv[1]](sys.argv[2])
else:
    for step in ("record", "distil"):
        done = subprocess.run([sys.executable, __file__, step, "top.safetensors"], check=True, stdout=subprocess.PIPE)
    print(done.stdout.decode().strip())
