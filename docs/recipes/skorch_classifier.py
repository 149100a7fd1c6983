"""skorch: a classifier in scikit-learn's manner, attached to its module.

python docs/recipes/skorch_classifier.py
"""

import numpy as np
import torch
from sklearn.datasets import load_digits
from skorch import NeuralNetClassifier
from torch import nn

import softlabels

torch.manual_seed(0)
images, digits = load_digits(return_X_y=True)
x, y = (images / 16).astype(np.float32), digits


class Classifier(NeuralNetClassifier):
    def initialize_criterion(self):
        super().initialize_criterion()
        self.criterion_.attach(self.module_)  # skorch makes the module first
        return self

    def get_loss(self, y_pred, y_true, *args, **kwargs):
        return self.criterion_(y_pred, y_true)  # that of NeuralNetClassifier takes a logarithm first for some losses


net = Classifier(
    nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)),
    criterion=softlabels.BetaSmoothingLoss,
    criterion__label_smoothing=0.05,
    optimizer=torch.optim.AdamW,
    lr=3e-3,
    batch_size=64,
    max_epochs=8,
    predict_nonlinearity=lambda logits: logits.softmax(-1),  # or predict_proba returns logits
    verbose=0,
).fit(x[:1200], y[:1200])

probabilities = net.predict_proba(x[1200:])
np.testing.assert_allclose(probabilities.sum(1), 1.0, rtol=1e-5)
print(f"{net.criterion_.teacher.num_updates} steps, accuracy {net.score(x[1200:], y[1200:]):.3f}")
