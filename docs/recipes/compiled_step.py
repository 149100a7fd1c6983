"""torch.compile of the whole training step, but for the optimizer.

python docs/recipes/compiled_step.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import softlabels

torch.manual_seed(0)
images, digits = load_digits(return_X_y=True)
x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(digits)
train_x, train_y, test_x, test_y = x[:1200], y[:1200], x[1200:], y[1200:]

model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
# Rankings without a teacher compile whole. With attach(model) the graph breaks where the teacher runs, so that
# fullgraph=True raises; torch.compile(model) alone needs nothing special there.
criterion = softlabels.BetaSmoothingLoss(label_smoothing=0.05, ranking="batch")


@torch.compile(fullgraph=True)
def forward(inputs, labels):
    return criterion(model(inputs), labels)


for _ in range(8):
    for rows in torch.randperm(len(train_x)).split(64):
        loss = forward(train_x[rows], train_y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

model.eval()
with torch.no_grad():
    accuracy = (model(test_x).argmax(1) == test_y).double().mean()
print(f"accuracy {accuracy:.3f}")
