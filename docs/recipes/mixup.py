"""Mixup and CutMix: class probabilities as targets, smoothed by how sure the average is of the mixed sample.

python docs/recipes/mixup.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import softlabels

torch.manual_seed(0)
images, digits = load_digits(return_X_y=True)
x, y = torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(digits)
train_x, train_y, test_x, test_y = x[:1200], y[:1200], x[1200:], y[1200:]


def mixup(inputs, targets):
    """Zhang et al., 2018. torchvision.transforms.v2.MixUp and timm's Mixup return targets of the same form."""
    share, other = torch.distributions.Beta(0.2, 0.2).sample(), torch.randperm(len(inputs))
    return torch.lerp(inputs[other], inputs, share), torch.lerp(targets[other], targets, share)


def cutmix(inputs, targets):
    """Yun et al., 2019: a window of another image, and as much of its label."""
    other, inputs = torch.randperm(len(inputs)), inputs.clone()
    top, left, size = *torch.randint(5, (2,)).tolist(), 4
    inputs[..., top : top + size, left : left + size] = inputs[other, :, top : top + size, left : left + size]
    return inputs, torch.lerp(targets, targets[other], size * size / 64)


model = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 10))
criterion = softlabels.BetaSmoothingLoss(label_smoothing=0.05).attach(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for _ in range(10):
    for rows in torch.randperm(len(train_x)).split(64):
        targets = nn.functional.one_hot(train_y[rows], 10).float()
        inputs, targets = (mixup if torch.rand(()) < 0.5 else cutmix)(train_x[rows], targets)
        loss = criterion(model(inputs), targets)  # no other change: a target of the logits' shape is probabilities
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

model.eval()
with torch.no_grad():
    accuracy = (model(test_x).argmax(1) == test_y).double().mean()
print(f"accuracy {accuracy:.3f}")
