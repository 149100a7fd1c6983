"""Born-again generations (Furlanello et al., 2018; Fig. 1 of the paper): each network teaches the next.

python docs/recipes/born_again.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import softlabels
from softlabels.metrics import average_predictive_uncertainty
from softlabels.tuning import match_temperature

images, digits = load_digits(return_X_y=True)
x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(digits)
train_x, train_y, test_x, test_y = x[:1200], y[:1200], x[1200:], y[1200:]


def train(seed, teacher=None):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    if teacher is None:
        criterion = nn.CrossEntropyLoss()
    else:
        with torch.no_grad():  # as smooth as label smoothing that leaves the true class 0.85, on average
            temperature = match_temperature(teacher(train_x), train_y, alpha=0.6, true_class=0.85)
        criterion = softlabels.SelfDistillationLoss(alpha=0.6, temperature=temperature).attach(model, teacher=teacher)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(8):
        for rows in torch.randperm(len(train_x)).split(64):
            loss = criterion(model(train_x[rows]), train_y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


model = None
for generation in range(4):
    model = train(seed=generation, teacher=model)  # other initial weights than the teacher's, or it is a continuation
    with torch.no_grad():
        logits = model(test_x)
    accuracy = (logits.argmax(1) == test_y).double().mean()
    uncertainty = average_predictive_uncertainty(logits)
    print(f"generation {generation}: uncertainty {uncertainty:.3f}, accuracy {accuracy:.3f}")
