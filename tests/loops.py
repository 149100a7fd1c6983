"""A small model, batches, and the Mean Teacher that people write by hand."""

from __future__ import annotations

import copy

import torch
from torch import nn


def make_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))


def batches(n, rows=8):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(rows, 4, generator=generator), torch.randint(3, (rows,), generator=generator)) for _ in range(n)
    ]


def train(model, criterion, optimizer, data, after_step=lambda: None):
    losses = []
    for x, y in data:
        loss = criterion(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        after_step()
        losses.append(loss.item())
    return losses


class MeanTeacher:
    """The loop that people write by hand (Tarvainen & Valpola's update_ema_variables)."""

    def __init__(self, model, decay=0.999):
        self.model, self.ema, self.decay, self.t = model, copy.deepcopy(model), decay, 0

    def step(self):
        self.t += 1
        decay = min(1 - 1 / (self.t + 1), self.decay)
        with torch.no_grad():
            for ema, live in zip(self.ema.parameters(), self.model.parameters(), strict=True):
                ema.mul_(decay).add_(live, alpha=1 - decay)


def assert_same_parameters(teacher, mean_teacher):
    averages, wanted = teacher.averages, dict(mean_teacher.ema.named_parameters())
    assert averages.keys() == wanted.keys()
    for name, average in averages.items():
        assert torch.equal(average, wanted[name]), name
