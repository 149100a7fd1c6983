"""One training function for every method; what differs between methods is the criterion it is given."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.paper.data.dataset import Data, Normalise, Split, augment
from softlabels import metrics, tuning


@dataclass(frozen=True)
class Recipe:
    """The paper's optimisation (sec. 7.1, He et al.), every number an option.

    Args:
        epochs: Passes over the training set.
        batch_size: Samples per step; the last, smaller batch of an epoch is left out.
        lr: Learning rate of SGD.
        momentum: Its momentum.
        weight_decay: Its weight decay, on every parameter.
        milestones: Fractions of the epochs after which lr is multiplied by ``lr_factor``.
        lr_factor: See above.
        padding: Pixels of random shift; None is what is usual for the data set.
        flip: Mirror half of the images; None is what is usual for the data set.
        bf16: Run forward passes of training under autocast to bfloat16.
        channels_last: Memory format of the network and its images.
        compile: Compile the network with torch.compile for training.
    """

    epochs: int = 150
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    milestones: tuple[float, ...] = (1 / 3, 2 / 3)
    lr_factor: float = 0.1
    padding: int | None = None
    flip: bool | None = None
    bf16: bool = False
    channels_last: bool = True
    compile: bool = False

    def __post_init__(self) -> None:
        """Check the numbers that a loop depends on."""
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "lr_factor"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, got {getattr(self, name)}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be at least 0 and below 1, got {self.momentum}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be at least 0 and finite, got {self.weight_decay}")
        if not all(0 < fraction < 1 for fraction in self.milestones):
            raise ValueError(f"milestones must be fractions between 0 and 1, got {self.milestones}")
        if self.padding is not None and self.padding < 0:
            raise ValueError(f"padding must be at least 0, got {self.padding}")

    def steps(self, samples: int) -> int:
        """Optimizer steps of a whole training run on this many samples."""
        return self.epochs * (samples // self.batch_size)


def train(
    model: nn.Module,
    criterion: nn.Module,
    data: Data,
    recipe: Recipe,
    seed: int,
    on_epoch: Callable[[int], None] = lambda steps: None,
) -> list[dict[str, float]]:
    """Train the model, leave it as it was at its best validation accuracy, and return the metrics of each epoch.

    The order of the data and its augmentation depend on ``seed`` alone, so that methods are paired by seed. Among
    epochs of equal validation accuracy the later one is kept.

    Raises:
        FloatingPointError: the loss of an epoch is not finite.
    """
    device = data.train.labels.device.type
    padding = data.padding if recipe.padding is None else recipe.padding
    flip = data.flip if recipe.flip is None else recipe.flip
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )
    milestones = [round(fraction * recipe.epochs) for fraction in recipe.milestones]
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, recipe.lr_factor)
    run = torch.compile(model) if recipe.compile else model
    needs_index = getattr(criterion, "num_samples", None) is not None  # which samples these are, for their own past
    begin_epoch = getattr(criterion, "begin_epoch", None)  # of soft labels that change from epoch to epoch
    best, best_accuracy, history = copy.deepcopy(model.state_dict()), -1.0, []
    for epoch in range(recipe.epochs):
        model.train()
        if begin_epoch is not None:
            begin_epoch(epoch, recipe.epochs)
        order = torch.randperm(len(data.train), generator=generator).to(data.train.labels.device)
        batches = order[: len(order) // recipe.batch_size * recipe.batch_size].split(recipe.batch_size)
        total = torch.zeros((), dtype=torch.float64, device=order.device)
        for index in batches:
            images, labels = data.train.images[index], data.train.labels[index]
            images = formatted(data.normalise(augment(images, padding, flip, generator)), recipe)
            with torch.autocast(device, torch.bfloat16, enabled=recipe.bf16):
                loss = criterion(run(images), labels, **({"index": index} if needs_index else {}))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()
        scheduler.step()
        mean = total.item() / len(batches)
        if not mean < float("inf"):
            raise FloatingPointError(f"the training loss of epoch {epoch} is {mean}; try a smaller lr than {recipe.lr}")
        validation = evaluate(predict(model, data.validation, data.normalise, recipe), data.validation.labels)
        history.append({"loss": mean, **{name: validation[name] for name in ("accuracy", "ece", "nll")}})
        if validation["accuracy"] >= best_accuracy:
            best, best_accuracy = copy.deepcopy(model.state_dict()), validation["accuracy"]
        on_epoch(len(batches))
    model.load_state_dict(best)
    return history


def formatted(images: Tensor, recipe: Recipe) -> Tensor:
    """Images in the memory format of the recipe."""
    layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
    return images.contiguous(memory_format=layout)


@torch.no_grad()
def predict(model: nn.Module, split: Split, normalise: Normalise, recipe: Recipe) -> Tensor:
    """Logits of a split in float32, in evaluation mode."""
    model.eval()
    pixels = split.images[0, 0].numel()
    batches = split.images.split(min(1000, max(1_000_000 // pixels, 1)))  # large images in smaller batches
    return torch.cat([model(formatted(normalise(images), recipe)) for images in batches])


def evaluate(logits: Tensor, labels: Tensor, posterior: Tensor | None = None) -> dict[str, Any]:
    """Every metric of the tables; accuracy and ECE in %, the others in nats.

    Where the true posterior p of each sample is known: ``kl`` is the mean of KL(p || prediction); ``excess`` is the NLL
    of the labels, which were drawn from p, less the mean entropy of p: what p itself would have on average over such
    draws; ``limit`` is the accuracy of predicting the likeliest class of p.
    """
    found = {
        "accuracy": 100.0 * (logits.argmax(1) == labels).double().mean().item(),
        "ece": 100.0 * metrics.calibration_error(logits, labels).item(),
        "nll": nn.functional.cross_entropy(logits.double(), labels).item(),
        "uncertainty": metrics.average_predictive_uncertainty(logits).item(),
        "diversity": metrics.confidence_diversity(logits, labels).item(),
    }
    if posterior is not None:
        entropy = torch.special.entr(posterior).sum(1).mean()
        cross_entropy = nn.functional.cross_entropy(logits.double(), posterior)
        found["kl"] = (cross_entropy - entropy).item()
        found["excess"] = found["nll"] - entropy.item()
        found["limit"] = 100.0 * (posterior.argmax(1) == labels).double().mean().item()
    return found


def temperature_scaled(
    logits: Tensor, split: Split, validation_logits: Tensor, validation: Split
) -> dict[str, Any] | None:
    """Temperature scaling (Guo et al., 2017): the metrics at the temperature that fits the validation set best.

    None where no temperature is best, as where every validation label has the largest logit.
    """
    try:
        temperature = tuning.fit_temperature(validation_logits.double(), validation.labels)
    except ValueError:
        return None
    return {"temperature": temperature, **evaluate(logits / temperature, split.labels, split.posterior)}
