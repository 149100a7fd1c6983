"""What an experiment is run on: a data set, networks, a recipe and grids, by preset and by option."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.paper.data import DataSpec, train_size
from benchmarks.paper.methods import ALPHA, BETA_ALPHA, TRUE_CLASS, Method, beta_smoothing, cross_entropy
from benchmarks.paper.models import ModelSpec
from benchmarks.paper.recipe import Recipe
from benchmarks.paper.runs import TEACHER_SEED, Run


@dataclass(frozen=True)
class Setting:
    """Everything that experiments share, and the grids of each.

    Args:
        data: The data set.
        model: The network.
        other_model: The second network of cross-distillation.
        recipe: How every network is trained.
        other_recipe: How the second network of cross-distillation is trained.
        seeds: Seeds 0, 1, ... of every method.
        device: ``"cpu"`` or ``"cuda"``.
        ema_decay: Of Beta smoothing. 0.999 is meant for runs of many thousand steps.
        generations: Of sequential self-distillation, after the first network.
        temperatures: T of Fig. 2, rising from 1.
        student_temperatures: T of Fig. 4.
        student_alphas: Weights of the hard label in Fig. 4.
        fractions: Shares of the training set in Fig. 5, rising to 1.
        weight_decays: Of Fig. 6, rising.
        beta_alphas: Least weights of the true class in Fig. 7, beside the 0.4 of the others; may be empty.
        prunes: Shares of the classes that are pruned in Fig. 9.
        true_classes: Average shares of the true class in Fig. 3, beside the 0.85 of all others; may be empty.
        shares: Average shares of the true class to choose from in ``tuned``, rising.
        student_shares: Those of self-distillation, whose hard label has 0.6 of its own, and whose teacher is right on
            a part of the training set only.
        learned_shares: Those of learned spreads in ``spread``, each with every one of ``learned_alphas``.
        learned_alphas: Least shares of the true class there.
    """

    data: DataSpec
    model: ModelSpec = field(default_factory=lambda: ModelSpec("resnet8"))
    other_model: ModelSpec = field(default_factory=lambda: ModelSpec("densenet40"))
    recipe: Recipe = field(default_factory=Recipe)
    other_recipe: Recipe = field(default_factory=Recipe)
    seeds: int = 4
    device: str = "cpu"
    ema_decay: float = 0.99
    generations: int = 10
    temperatures: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
    student_temperatures: tuple[float, ...] = (1.5, 2.0, 4.0, 8.0)
    student_alphas: tuple[float, ...] = (0.6, 0.9)
    fractions: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0)
    weight_decays: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3)
    beta_alphas: tuple[float, ...] = (0.2, 0.6)
    prunes: tuple[float, ...] = (0.25, 0.5, 0.75, 0.9)
    true_classes: tuple[float, ...] = (0.95,)
    shares: tuple[float, ...] = (0.5, 0.65, 0.75, 0.85, 0.92, 0.98)
    student_shares: tuple[float, ...] = (0.65, 0.75, 0.85, 0.9)
    learned_shares: tuple[float, ...] = (0.65, 0.75, 0.85)
    learned_alphas: tuple[float, ...] = (0.2, 0.4)

    def __post_init__(self) -> None:
        """Check the numbers of runs and the grids."""
        for name, low, high in (("seeds", 1, TEACHER_SEED), ("generations", 2, 1000)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} must be from {low} to {high}, got {getattr(self, name)}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be at least 0 and below 1, got {self.ema_decay}")
        if not self.student_alphas or not all(0 <= alpha <= 1 for alpha in self.student_alphas):
            raise ValueError(
                f"student_alphas must be 1 or more numbers from 0 to 1, got {_listed(self.student_alphas)}"
            )
        if not all(0 <= alpha < TRUE_CLASS for alpha in self.beta_alphas):
            raise ValueError(f"beta_alphas must be from 0 to below {TRUE_CLASS}, got {_listed(self.beta_alphas)}")
        if not self.learned_alphas or not all(0 <= alpha < 1 for alpha in self.learned_alphas):
            raise ValueError(
                f"learned_alphas must be 1 or more numbers from 0 to below 1, got {_listed(self.learned_alphas)}"
            )
        lows = {"shares": BETA_ALPHA, "student_shares": ALPHA, "learned_shares": max(self.learned_alphas)}
        for name, low in lows.items():
            if not all(low < share < 1 for share in getattr(self, name)):
                raise ValueError(f"{name} must be above {low} and below 1, got {_listed(getattr(self, name))}")
        grids = {"shares": 2, "student_shares": 2, "learned_shares": 1}
        grids |= {"temperatures": 3, "fractions": 2, "weight_decays": 2, "student_temperatures": 1, "prunes": 1}
        for name, least in grids.items():
            grid, got = getattr(self, name), _listed(getattr(self, name))
            if len(grid) < least or list(grid) != sorted(set(grid)) or not all(0 < x < math.inf for x in grid):
                raise ValueError(f"{name} must be {least} or more numbers above 0 that rise, got {got}")
            if name == "fractions" and grid[-1] > 1:
                raise ValueError(f"fractions must be at most 1, got {got}")
            if name == "prunes" and (0.5 not in grid or grid[-1] >= 1):
                raise ValueError(f"prunes must be below 1, and 0.5 be among them, got {got}")
        if not all(ALPHA < share < 1 and share != TRUE_CLASS for share in self.true_classes):
            got = _listed(self.true_classes)
            raise ValueError(f"true_classes must be above {ALPHA}, below 1 and not {TRUE_CLASS}, got {got}")

    def run(self, method: Method, teacher: Run | None = None, **changes: Any) -> Run:
        """Make the run of a method, with seed 0; ``changes`` are fields of ``Run``."""
        run = Run(self.data, self.model, self.recipe, method, teacher, 0, self.device)
        return replace(run, **changes)

    def teacher(self, **changes: Any) -> Run:
        """Make the run of a teacher: cross-entropy, with other weights and batches than its students'."""
        return self.run(cross_entropy(), seed=TEACHER_SEED, **changes)

    def beta(self, **options: Any) -> Run:
        """Beta smoothing with the setting's decay, unless ``options`` give another."""
        return self.run(beta_smoothing(**{"ema_decay": self.ema_decay, **options}))

    def describe(self) -> str:
        """Give a title."""
        data = self.data.name
        if self.data.pairs is not None:
            data += f" ({self.data.pairs:,} of {self.data.size} x {2 * self.data.size})"
        if self.data.train_size is not None:
            data += f" ({self.data.train_size:,} samples)"
        if self.data.label_noise:
            data += f" ({100 * self.data.label_noise:g}% of the training labels replaced)"
        model = self.model.name if self.model.width is None else f"{self.model.name} of width {self.model.width}"
        seeds = "1 seed" if self.seeds == 1 else f"{self.seeds} seeds"
        return f"{data}, {model}, {self.recipe.epochs} epochs, {seeds}"


def _listed(grid: tuple[float, ...]) -> str:
    return ", ".join(f"{x:g}" for x in grid)


PRESETS = ("smoke", "laptop", "gpu", "paper")


def preset(
    name: str,
    dataset: str | None = None,
    model: str | None = None,
    other_model: str | None = None,
    size: int | None = None,
) -> Setting:
    """Make a setting.

    Args:
        name: ``"smoke"``: everything in a few minutes, numbers without meaning. ``"laptop"``: minutes to an hour on
            two cores. ``"gpu"``: an hour or a few on one accelerator. ``"paper"``: the paper's recipe in full.
        dataset: None is what the preset is made for: digits (smoke), words (laptop), fashion-pairs (gpu), CIFAR-100
            (paper).
        model: None is the preset's network for the data set.
        other_model: The second network of cross-distillation; None is the preset's.
        size: Of images in a folder of one's own.
    """
    dataset = dataset or {"laptop": "words", "gpu": "fashion-pairs", "paper": "cifar100"}.get(name, "digits")
    large = dataset == "cub200"
    networks = {
        "smoke": ("resnet8", "densenet10"),
        "laptop": ("resnet8", "densenet40"),
        "gpu": ("resnet18", "densenet100"),
        "paper": ("resnet34", "densenet100"),
    }[name]
    if large and name in ("gpu", "paper"):
        networks = ("resnet34-imagenet", "resnet18-imagenet")
    first, second = model or networks[0], other_model or networks[1]
    width = 8 if name == "smoke" else None
    words = dataset == "words"
    if words:  # the second network must be one for words too, and the narrow ones take seconds
        second = other_model or {"resnet8": "resnet18"}.get(first, "resnet8")
        width = 24 if name == "laptop" else width
    common: dict[str, Any] = {
        "model": ModelSpec(first, width),
        "recipe": _recipe(name, dataset, first),
        "other_model": ModelSpec(second, width),
        "other_recipe": _recipe(name, dataset, second),
    }
    pairs = dataset == "fashion-pairs"
    if name in ("gpu", "paper"):
        data = DataSpec(dataset, pairs=50_000, size=28) if pairs else DataSpec(dataset, size=size)
        strengths: dict[str, Any] = {"true_classes": ()} if name == "paper" else {}
        return Setting(data, **common, **strengths, seeds=5, device="cuda", ema_decay=0.999)
    data = DataSpec(dataset, pairs=6_000, size=14) if pairs else DataSpec(dataset, size=size)
    if name == "laptop":
        fewer = {"seeds": 3, "prunes": (0.5, 0.9)}  # two to five minutes a run
        many = {"seeds": 8, "true_classes": ()}  # the least that may decide, and no strength that is not needed
        return Setting(data, **common, **(fewer if pairs else many if words else {}))
    return Setting(
        data if dataset == "digits" else replace(data, train_size=min(1_000, train_size(data))),
        **common,
        seeds=2,
        generations=2,
        temperatures=(1.0, 2.0, 4.0),
        student_temperatures=(2.0,),
        student_alphas=(0.6,),
        fractions=(0.5, 1.0),
        weight_decays=(1e-4, 1e-3),
        prunes=(0.5,),
        true_classes=(0.8,),  # a network trained for this short is too unsure to teach with 0.95
    )


def _recipe(preset_name: str, dataset: str, model: str) -> Recipe:
    """How a preset trains a network."""
    dense = model.startswith("densenet")
    published = Recipe(epochs=200, milestones=(1 / 2, 3 / 4)) if dense else Recipe(epochs=150)
    if preset_name == "paper":
        return published
    if preset_name == "gpu":
        return replace(published, epochs=100, bf16=True, compile=True)
    if preset_name == "smoke":
        return Recipe(epochs=8, batch_size=32)
    if dataset == "words":  # few epochs, most of them at the full learning rate: over-confident in ten seconds
        return Recipe(epochs=12, milestones=(0.6, 0.85))
    if dataset == "digits":
        return Recipe(epochs=20, batch_size=64)
    if dataset == "fashion-pairs":  # without shifts the small network fits its pairs, as the paper's networks do
        return Recipe(epochs=30, batch_size=64, padding=0)
    return Recipe(epochs=30)
