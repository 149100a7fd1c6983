"""What a loss that learns where the mass goes has seen in Fashion-MNIST: ``python -m benchmarks.paper.pictures``.

Draws which classes are taken for which, and the training samples whose label was doubted most.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import softlabels
from benchmarks.paper import models
from benchmarks.paper.data import Data, DataSpec, load
from benchmarks.paper.figures import DPI
from benchmarks.paper.models import ModelSpec
from benchmarks.paper.recipe import Recipe, train
from benchmarks.provenance import hardware, versions
from softlabels import plotting

NAMES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
FOLDER = Path(__file__).parents[1] / "results" / "paper" / "fashion-mnist-pictures"
ROWS, COLUMNS = 3, 6


def trained(data: Data, epochs: int) -> softlabels.BetaSmoothingLoss:
    """Train a ResNet-8 and return its loss."""
    torch.manual_seed(0)
    model = models.make(ModelSpec("resnet8"), data.num_classes, data.channels, data.flat)
    criterion = softlabels.BetaSmoothingLoss(
        ranking="history", spread=("classes", "samples"), num_samples=len(data.train.labels)
    )
    train(model, criterion, data, Recipe(epochs=epochs, milestones=(0.7,)), seed=0)
    return criterion


def draw_profiles(criterion: softlabels.BetaSmoothingLoss, path: Path) -> None:
    """Save which classes are taken for which."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 4.6), layout="constrained")
    plotting.class_profiles(criterion, names=NAMES, ax=figure.subplots())
    figure.savefig(path, dpi=DPI)


def draw_hardest(criterion: softlabels.BetaSmoothingLoss, data: Data, path: Path) -> None:
    """Save the samples of most doubt, each with its label and what it was taken for."""
    from matplotlib.figure import Figure

    found = plotting.hardest(criterion, n=ROWS * COLUMNS)
    assert found.taken_for is not None
    figure = Figure(figsize=(1.5 * COLUMNS, 1.9 * ROWS), layout="constrained")
    panels = figure.subplots(ROWS, COLUMNS).flat
    for axes, sample, other in zip(panels, found.samples.tolist(), found.taken_for.tolist(), strict=True):
        axes.imshow(data.train.images[sample, 0], cmap="gray_r")
        axes.set_title(f"{NAMES[data.train.labels[sample]]}?\nrather {NAMES[other]}", fontsize="small")
        axes.set_axis_off()
    figure.savefig(path, dpi=DPI)


def main() -> None:
    """Train, draw, and note what made the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper.pictures", description="See the module.")
    parser.add_argument("--train-size", type=int, default=20_000)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--out", type=Path, default=FOLDER)
    options = parser.parse_args()
    data = load(DataSpec("fashion-mnist", train_size=options.train_size))
    criterion = trained(data, options.epochs)
    options.out.mkdir(parents=True, exist_ok=True)
    draw_profiles(criterion, options.out / "profiles.png")
    draw_hardest(criterion, data, options.out / "hardest.png")
    software = ", ".join(f"{name} {version}" for name, version in versions().items())
    command = f"python -m benchmarks.paper.pictures --train-size {options.train_size} --epochs {options.epochs}"
    (options.out / "made-by.txt").write_text(f"{command}\n{software}, {hardware('cpu')}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
