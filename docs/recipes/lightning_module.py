"""Lightning: the loss and the metrics are submodules, so checkpoints hold them and self.log knows them.

python docs/recipes/lightning_module.py --epochs 3
python docs/recipes/lightning_module.py --epochs 6  # goes on from the last checkpoint
"""

import argparse
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import softlabels
from softlabels.metrics import AveragePredictiveUncertainty, CalibrationError

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=6)
parser.add_argument("--out", type=Path, default=Path("runs/lightning"))
options = parser.parse_args()


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
        # Attach to the network inside: the loss is a part of this module, and cannot watch itself.
        self.criterion = softlabels.BetaSmoothingLoss(label_smoothing=0.05).attach(self.net)
        self.accuracy = MulticlassAccuracy(10, average="micro")
        self.ece = CalibrationError()
        self.uncertainty = AveragePredictiveUncertainty()

    def training_step(self, batch, batch_idx):
        inputs, labels = batch
        loss = self.criterion(self.net(inputs), labels)
        self.log("train_loss", loss)  # of soft labels: higher than that of cross-entropy
        return loss

    def validation_step(self, batch, batch_idx):
        inputs, labels = batch
        logits = self.net(inputs)
        for name in ("accuracy", "ece", "uncertainty"):
            metric = getattr(self, name)
            metric.update(logits, labels)
            self.log(name, metric)
        self.log("nll", nn.functional.cross_entropy(logits, labels))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.net.parameters(), lr=3e-3)


lightning.seed_everything(0, verbose=False)
images, digits = load_digits(return_X_y=True)
x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(digits)
train = DataLoader(TensorDataset(x[:1200], y[:1200]), batch_size=64, shuffle=True)
validation = DataLoader(TensorDataset(x[1200:], y[1200:]), batch_size=256)

module = Classifier()
trainer = lightning.Trainer(
    accelerator="auto", devices=1, max_epochs=options.epochs, logger=False, enable_progress_bar=False,
    enable_model_summary=False, callbacks=[ModelCheckpoint(options.out, save_last=True)],
)  # fmt: skip
last = options.out / "last.ckpt"
trainer.fit(module, train, validation, ckpt_path=last if last.exists() else None)
(values,) = trainer.validate(module, validation, verbose=False)
assert module.criterion.teacher.num_updates == trainer.global_step
shown = ", ".join(f"{name} {values[name]:.3f}" for name in ("ece", "uncertainty", "nll", "accuracy"))
print(f"{trainer.global_step} steps, {shown}")
