"""Accelerate: prepare first, then attach to the prepared model; register the loss, so that save_state holds it.

accelerate launch docs/recipes/accelerate_loop.py  # or: python docs/recipes/accelerate_loop.py
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import softlabels

parser = argparse.ArgumentParser()
parser.add_argument("--out", type=Path, default=Path("runs/accelerate"))
options = parser.parse_args()

torch.manual_seed(0)
accelerator = Accelerator(gradient_accumulation_steps=2)
images, digits = load_digits(return_X_y=True)
x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(digits)
loader = DataLoader(TensorDataset(x[:1200], y[:1200]), batch_size=32, shuffle=True)

model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
criterion = softlabels.BetaSmoothingLoss(label_smoothing=0.05).attach(model)
accelerator.register_for_checkpointing(criterion)

for _ in range(8):
    model.train()
    for inputs, labels in loader:
        with accelerator.accumulate(model):
            loss = criterion(model(inputs), labels)
            accelerator.backward(loss)
            optimizer.step()  # Accelerate skips it within an accumulation, and then the EMA stays too
            optimizer.zero_grad()
accelerator.save_state(options.out)
steps = criterion.teacher.num_updates

accelerator.load_state(options.out)
assert criterion.teacher.num_updates == steps == 8 * ((len(loader) + 1) // 2)
model.eval()
with torch.no_grad():
    accuracy = (model(x[1200:].to(accelerator.device)).argmax(1).cpu() == y[1200:]).double().mean()
accelerator.print(f"{steps} steps, accuracy {accuracy:.3f}")
accelerator.end_training()
