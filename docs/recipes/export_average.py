"""Evaluate and export the average: a plain module with the averaged weights.

python docs/recipes/export_average.py
"""

import copy

import torch
from sklearn.datasets import load_digits
from torch import nn

import softlabels

torch.manual_seed(0)
images, digits = load_digits(return_X_y=True)
x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(digits)
train_x, train_y, test_x, test_y = x[:1200], y[:1200], x[1200:], y[1200:]

model = nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 10))
criterion = softlabels.BetaSmoothingLoss(label_smoothing=0.05, ema_decay=0.99).attach(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

for _ in range(8):
    for rows in torch.randperm(len(train_x)).split(32):
        loss = criterion(model(train_x[rows]), train_y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def nll(network):
    with torch.no_grad():
        return nn.functional.cross_entropy(network(test_x), test_y).item()


last = nll(model.eval())
average = criterion.teacher.averaged_model()  # of the model's class, in eval mode, with the average's batch statistics
torch.save(average.state_dict(), "average.pt")  # nothing of softlabels is in it

served = copy.deepcopy(average)
served.load_state_dict(torch.load("average.pt", weights_only=True))
exported = torch.export.export(served, (test_x,)).module()  # or torch.onnx.export
torch.testing.assert_close(exported(test_x), average(test_x))
with torch.no_grad():
    accuracy = (served(test_x).argmax(1) == test_y).double().mean()
print(f"NLL {last:.3f} of the last step, {nll(average):.3f} of the average, accuracy {accuracy:.3f}")
