"""One training function for every method; what differs between methods is the criterion it is given."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.paper.data import Data, Split, random_shift
from softlabels import metrics


@dataclass(frozen=True)
class Recipe:
    """The paper's optimisation (sec. 7.1, He et al.), every number an option."""

    epochs: int = 20
    batch_size: int = 64
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    milestones: tuple[float, ...] = (1 / 3, 2 / 3)  # fractions of the epochs at which lr is multiplied by 0.1
    padding: int = 1  # pixels of random shift


def train(
    model: nn.Module,
    criterion: nn.Module,
    data: Data,
    recipe: Recipe,
    seed: int,
    on_epoch: Callable[[], None] = lambda: None,
) -> nn.Module:
    """Train and return the model as it was at its best validation accuracy (the later epoch, among equals).

    The order of the data and its augmentation depend on ``seed`` alone, so that methods are paired by seed.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )
    steps = [round(fraction * recipe.epochs) for fraction in recipe.milestones]
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, steps)
    images, labels = data.train.images, data.train.labels
    wants_index = getattr(criterion, "ranking", None) == "history"  # which samples these are, for their own past
    best, best_accuracy = copy.deepcopy(model.state_dict()), -1.0
    for _ in range(recipe.epochs):
        model.train()
        order = torch.randperm(len(labels), generator=generator).to(labels.device)
        for batch in order[: len(order) // recipe.batch_size * recipe.batch_size].split(recipe.batch_size):
            which = {"index": batch} if wants_index else {}
            loss = criterion(model(random_shift(images[batch], recipe.padding, generator)), labels[batch], **which)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
        validation_accuracy = accuracy(predict(model, data.validation), data.validation.labels)
        if validation_accuracy >= best_accuracy:
            best, best_accuracy = copy.deepcopy(model.state_dict()), validation_accuracy
        on_epoch()
    model.load_state_dict(best)
    return model


@torch.no_grad()
def predict(model: nn.Module, split: Split) -> Tensor:
    """Logits of a split, in evaluation mode."""
    model.eval()
    return torch.cat([model(images) for images in split.images.split(512)])


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of right predictions in %."""
    return 100.0 * (logits.argmax(1) == labels).double().mean().item()


def evaluate(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Every metric of the tables, by the name of its column in the records."""
    return {
        "accuracy": accuracy(logits, labels),
        "ece": 100.0 * metrics.calibration_error(logits, labels).item(),
        "nll": nn.functional.cross_entropy(logits.double(), labels).item(),
        "uncertainty": metrics.average_predictive_uncertainty(logits).item(),
        "diversity": metrics.confidence_diversity(logits, labels).item(),
    }
