"""Plain PyTorch: mixed precision, gradient accumulation, checkpoint and resume.

python docs/recipes/plain_pytorch.py --epochs 4
python docs/recipes/plain_pytorch.py --epochs 8  # goes on from checkpoint.pt, as if it had never stopped
"""

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

import softlabels

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=8)
parser.add_argument("--checkpoint", type=Path, default=Path("checkpoint.pt"))
options = parser.parse_args()

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
images, digits = load_digits(return_X_y=True)
x, y = torch.tensor(images / 16, dtype=torch.float32, device=device), torch.tensor(digits, device=device)
train_x, train_y, test_x, test_y = x[:1200], y[:1200], x[1200:], y[1200:]

model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 10)).to(device)
criterion = softlabels.BetaSmoothingLoss(label_smoothing=0.05).attach(model)  # the one new line
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
scaler = torch.amp.GradScaler(device, enabled=device == "cuda")  # float16 on a GPU, bfloat16 on a CPU
half = torch.float16 if device == "cuda" else torch.bfloat16

parts = {"model": model, "criterion": criterion, "optimizer": optimizer, "scaler": scaler}  # the EMA is in criterion
first_epoch = 0
if options.checkpoint.exists():
    checkpoint = torch.load(options.checkpoint, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(checkpoint[name])
    torch.set_rng_state(checkpoint["random"])  # order of the batches, dropout and Beta draws (on a GPU: its own too)
    first_epoch = checkpoint["epoch"]

micro_batches = 4  # an optimizer step for every four; the EMA moves with the step
for epoch in range(first_epoch, options.epochs):
    model.train()
    order = torch.randperm(len(train_x)).to(device).split(32)
    for i, rows in enumerate(order, start=1):
        with torch.autocast(device, dtype=half):
            loss = criterion(model(train_x[rows]), train_y[rows]) / micro_batches
        scaler.scale(loss).backward()
        if i % micro_batches == 0 or i == len(order):
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    states = {name: part.state_dict() for name, part in parts.items()}
    torch.save({**states, "epoch": epoch + 1, "random": torch.get_rng_state()}, options.checkpoint)

model.eval()
with torch.no_grad():  # here the criterion is plain label smoothing; report cross-entropy, which compares across losses
    logits = model(test_x)
nll, accuracy = nn.functional.cross_entropy(logits, test_y), (logits.argmax(1) == test_y).double().mean()
print(f"epoch {options.epochs}, {criterion.teacher.num_updates} steps, NLL {nll:.17g}, accuracy {accuracy:.3f}")
