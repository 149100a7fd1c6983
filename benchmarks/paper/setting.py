"""What an experiment is run on: a data set, networks, a recipe and grids, by preset and by option."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.paper.data import DataSpec
from benchmarks.paper.methods import Method, beta_smoothing
from benchmarks.paper.models import ModelSpec
from benchmarks.paper.recipe import Recipe
from benchmarks.paper.runs import Run


@dataclass(frozen=True)
class Setting:
    """Everything that experiments share, and the grids of each.

    Args:
        data: The data set.
        model: The network.
        other_model: The second network of cross-distillation.
        recipe: How every network is trained.
        other_recipe: How the second network of cross-distillation is trained; None is as the first.
        seeds: Seeds 0, 1, ... of every method.
        device: ``"cpu"`` or ``"cuda"``.
        ema_decay: Of Beta smoothing. 0.999 is meant for runs of many thousand steps.
        generations: Of sequential self-distillation, after the first network.
        temperatures: T of Fig. 2, rising from 1.
        student_temperatures: T of Fig. 4.
        student_alphas: Weights of the hard label in Fig. 4.
        fractions: Shares of the training set in Fig. 5, rising to 1.
        weight_decays: Of Fig. 6, rising.
        prunes: Shares of the classes that are pruned in Fig. 9.
    """

    data: DataSpec
    model: ModelSpec = field(default_factory=lambda: ModelSpec("resnet8"))
    other_model: ModelSpec = field(default_factory=lambda: ModelSpec("densenet40"))
    recipe: Recipe = field(default_factory=Recipe)
    other_recipe: Recipe | None = None
    seeds: int = 4
    device: str = "cpu"
    ema_decay: float = 0.99
    generations: int = 10
    temperatures: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
    student_temperatures: tuple[float, ...] = (1.5, 2.0, 4.0, 8.0)
    student_alphas: tuple[float, ...] = (0.6, 0.9)
    fractions: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0)
    weight_decays: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3)
    prunes: tuple[float, ...] = (0.25, 0.5, 0.75, 0.9)

    def __post_init__(self) -> None:
        """Check the numbers of runs, and that grids rise."""
        for name in ("seeds", "generations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("temperatures", "fractions", "weight_decays"):
            grid = getattr(self, name)
            if len(grid) < 2 or list(grid) != sorted(set(grid)):
                raise ValueError(f"{name} must be two or more that rise, got {', '.join(f'{x:g}' for x in grid)}")
        if not 0 < self.fractions[0] <= self.fractions[-1] <= 1:
            raise ValueError(f"fractions must lie in (0, 1], got {', '.join(f'{x:g}' for x in self.fractions)}")

    def run(self, method: Method, teacher: Run | None = None, **changes: Any) -> Run:
        """Make the run of a method, with seed 0; ``changes`` are fields of ``Run``."""
        run = Run(self.data, self.model, self.recipe, method, teacher, 0, self.device)
        return replace(run, **changes)

    def beta(self, **options: Any) -> Run:
        """Beta smoothing with the setting's decay, unless ``options`` give another."""
        return self.run(beta_smoothing(**{"ema_decay": self.ema_decay, **options}))

    def describe(self) -> str:
        """Give a title."""
        return f"{self.data.name}, {self.model.name}, {self.recipe.epochs} epochs, {self.seeds} seeds"


PRESETS = ("smoke", "laptop", "gpu", "paper")


def preset(name: str, dataset: str | None = None, model: str | None = None, size: int | None = None) -> Setting:
    """Make a setting.

    Args:
        name: ``"smoke"``: everything in a few minutes, numbers without meaning. ``"laptop"``: minutes to an hour on
            two cores. ``"gpu"``: an hour or a few on one accelerator. ``"paper"``: the paper's recipe in full.
        dataset: None is what the preset is made for: digits (smoke, laptop), fashion-pairs (gpu), CIFAR-100 (paper).
        model: None is the preset's network for the data set.
        size: Of images in a folder of one's own.
    """
    default = {"gpu": "fashion-pairs", "paper": "cifar100"}.get(name, "digits")
    dataset = dataset or default
    data = DataSpec(dataset, pairs=6_000, size=14) if dataset == "fashion-pairs" else DataSpec(dataset, size=size)
    setting = Setting(data)
    if name in ("smoke", "laptop"):
        recipe = Recipe(epochs=20, batch_size=64) if dataset == "digits" else Recipe(epochs=30)
        if dataset == "fashion-pairs":  # without shifts the small network fits its pairs, as the paper's networks do
            recipe = replace(recipe, padding=0, batch_size=64)
            setting = replace(setting, seeds=3, prunes=(0.5, 0.9))
        setting = replace(setting, recipe=recipe)
    if name == "smoke":
        setting = replace(
            setting,
            data=data if dataset == "digits" else replace(data, train_size=1_000),
            model=ModelSpec("resnet8", 8),
            other_model=ModelSpec("densenet10", 8),
            recipe=Recipe(epochs=8, batch_size=32),
            seeds=2,
            generations=2,
            temperatures=(1.0, 2.0, 4.0),
            student_temperatures=(2.0,),
            student_alphas=(0.6,),
            fractions=(0.5, 1.0),
            weight_decays=(1e-4, 1e-3),
            prunes=(0.5,),
        )
    if name in ("gpu", "paper"):
        if dataset == "fashion-pairs":
            data = DataSpec(dataset, pairs=50_000, size=28)
        first = "resnet34-imagenet" if dataset == "cub200" else "resnet34" if name == "paper" else "resnet18"
        setting = replace(
            setting,
            data=data,
            model=ModelSpec(first),
            other_model=ModelSpec("densenet100"),
            seeds=5,
            device="cuda",
            ema_decay=0.999,
            recipe=_published(first),
            other_recipe=_published("densenet100"),
        )
        if name == "gpu":
            fast = {"epochs": 100, "bf16": True, "compile": True}
            setting = replace(
                setting, recipe=replace(setting.recipe, **fast), other_recipe=replace(setting.other_recipe, **fast)
            )
    if model is not None:
        setting = replace(setting, model=ModelSpec(model))
        if name == "paper":
            setting = replace(setting, recipe=_published(model))
    return setting


def _published(model: str) -> Recipe:
    """The recipe of the paper's scripts for a network."""
    if model.startswith("densenet"):
        return Recipe(epochs=200, milestones=(1 / 2, 3 / 4))
    return Recipe(epochs=150)
