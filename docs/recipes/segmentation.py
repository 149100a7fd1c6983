"""Semantic segmentation: a label per pixel, with 255 for pixels that nobody labelled.

python docs/recipes/segmentation.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import softlabels
from softlabels.metrics import calibration_error

IGNORED, BACKGROUND = 255, 10

torch.manual_seed(0)
images, digits = load_digits(return_X_y=True)
ink = torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8)
digit = torch.tensor(digits).view(-1, 1, 1)
labels = torch.where(ink[:, 0] > 0.6, digit, BACKGROUND)  # (N, 8, 8): which digit a pixel belongs to
labels[(ink[:, 0] > 0.2) & (ink[:, 0] <= 0.6)] = IGNORED  # edges are neither digit nor background
train, test = slice(0, 1200), slice(1200, None)

model = nn.Sequential(
    nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(),
    nn.Conv2d(32, 32, 3, padding=2, dilation=2), nn.ReLU(),
    nn.Conv2d(32, 32, 3, padding=3, dilation=3), nn.ReLU(),
    nn.Conv2d(32, BACKGROUND + 1, 1),
)  # fmt: skip
# Every pixel is a row: pixels are ranked and smoothed one by one, ignored ones neither.
criterion = softlabels.BetaSmoothingLoss(label_smoothing=0.05, ignore_index=IGNORED).attach(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for _ in range(8):
    for rows in torch.randperm(1200).split(64):
        logits = model(ink[rows])  # (N, 11, 8, 8)
        loss = criterion(logits, labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
# A network whose logits are interpolated to the size of the image after its forward pass needs attach(model, output=f),
# with f the interpolation: the teacher's logits go the same way.

model.eval()
with torch.no_grad():
    logits = model(ink[test])
kept = labels[test] != IGNORED
accuracy = (logits.argmax(1) == labels[test])[kept].double().mean()
ece = calibration_error(logits, labels[test], ignore_index=IGNORED)
print(f"ECE {ece:.3f}, pixel accuracy {accuracy:.3f}")
