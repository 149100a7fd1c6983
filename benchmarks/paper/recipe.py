"""One training function for every method; what differs between methods is the criterion it is given."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.paper.data import Data, Split, random_shift


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
        accuracy = evaluate(model, data.validation)["accuracy"]
        if accuracy >= best_accuracy:
            best, best_accuracy = copy.deepcopy(model.state_dict()), accuracy
        on_epoch()
    model.load_state_dict(best)
    return model


@torch.no_grad()
def evaluate(model: nn.Module, split: Split) -> dict[str, float]:
    """Accuracy in %, expected calibration error in % and negative log-likelihood in nats."""
    model.eval()
    logits = torch.cat([model(images) for images in split.images.split(512)])
    log_p = logits.double().log_softmax(1)
    confidence, predicted = log_p.exp().max(1)
    correct = (predicted == split.labels).double()
    return {
        "accuracy": 100.0 * correct.mean().item(),
        "ece": 100.0 * expected_calibration_error(confidence, correct),
        "nll": -log_p.gather(1, split.labels.unsqueeze(1)).mean().item(),
    }


def expected_calibration_error(confidence: Tensor, correct: Tensor, num_bins: int = 15) -> float:
    """Guo et al. (2017): mean over bins (lo, hi] of |accuracy - confidence|, weighted by the bins' counts."""
    bins = (confidence * num_bins).ceil().long().clamp(1, num_bins) - 1
    gap = torch.zeros(num_bins, dtype=torch.float64, device=confidence.device)
    gap.index_add_(0, bins, correct.double() - confidence.double())
    return (gap.abs().sum() / max(len(confidence), 1)).item()
