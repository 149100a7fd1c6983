"""The calls that are counted: every loss, and what it is held against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import softlabels
from benchmarks.speed.gpu_code.recorder import Call, Recorder, compiled_by_torch, eager, ours
from softlabels import functional
from softlabels.priors.learned_spread import MOST_NUMBERS

ROWS, POSITIONS = 8192, 128  # of the latter in a dense prediction (N, K, d1)
ALPHA, TEMPERATURE, SMOOTHING = 0.6, 4.0, 0.1
SAMPLES = 50_000  # of a training set


@dataclass
class Inputs:
    """Fake tensors of one shape and dtype."""

    logits: Tensor
    target: Tensor
    teacher: Tensor
    confidence: Tensor
    weight: Tensor
    probabilities: Tensor

    @classmethod
    def make(cls, rows: int, classes: int, dtype: torch.dtype, device: str, dense: bool = False) -> Inputs:
        """Tensors without numbers; a fake mode must be on."""
        shape = (rows // POSITIONS, POSITIONS) if dense else (rows,)
        like_logits = (shape[0], classes, *shape[1:])
        return cls(
            torch.empty(like_logits, dtype=dtype, device=device),
            torch.empty(shape, dtype=torch.int64, device=device),
            torch.empty(like_logits, dtype=dtype, device=device),
            torch.empty(shape, device=device),
            torch.empty(classes, device=device),
            torch.empty(like_logits, device=device),
        )


def _smoothing(i: Inputs, **options: Any) -> Tensor:
    return functional.label_smoothing_map_loss(i.logits, i.target, beta=SMOOTHING / (1.0 - SMOOTHING), **options)


def _distillation(i: Inputs, **options: Any) -> Tensor:
    return functional.self_distillation_loss(
        i.logits, i.target, i.teacher, alpha=ALPHA, temperature=TEMPERATURE, **options
    )


def _dirichlet(i: Inputs, **options: Any) -> Tensor:
    return functional.dirichlet_map_loss(i.logits, i.target, i.teacher, **options)


def _beta(i: Inputs, **options: Any) -> Tensor:
    return softlabels.BetaSmoothingLoss(**options)(i.logits, i.target)


def _history(i: Inputs) -> Tensor:
    with torch.device(i.logits.device):
        criterion = softlabels.BetaSmoothingLoss(ranking="history", num_samples=SAMPLES)
    return criterion(i.logits, i.target, index=i.target)


OURS: dict[str, Callable[[Inputs], Tensor]] = {
    "label smoothing": _smoothing,
    "label smoothing, class weights": lambda i: _smoothing(i, weight=i.weight),
    "label smoothing, sample weights": lambda i: _smoothing(i, sample_weight=i.confidence),
    "label smoothing, probabilities": lambda i: functional.label_smoothing_map_loss(
        i.logits, i.probabilities, beta=SMOOTHING
    ),
    "label smoothing, (N, K, d1)": _smoothing,
    "Beta smoothing, confidence given": lambda i: functional.beta_smoothing_loss(i.logits, i.target, i.confidence),
    "Beta smoothing, batch": lambda i: _beta(i, ranking="batch"),
    "Beta smoothing, history": _history,
    "Beta smoothing, random": lambda i: _beta(i, ranking="random"),
    "Beta smoothing, none": lambda i: _beta(i, ranking="none"),
    "Beta smoothing, batch, spread by class": lambda i: _beta(i, ranking="batch", spread="classes"),
    "Beta smoothing, batch, spread by neighbours": lambda i: _beta(i, ranking="batch", spread="neighbours"),
    "self-distillation": _distillation,
    "self-distillation, class weights": lambda i: _distillation(i, weight=i.weight),
    "self-distillation, probabilities": lambda i: functional.self_distillation_loss(
        i.logits, i.probabilities, i.teacher
    ),
    "self-distillation, (N, K, d1)": _distillation,
    "pruned distillation": lambda i: functional.pruned_distillation_loss(i.logits, i.target, i.teacher),
    "Dirichlet MAP, none": lambda i: _dirichlet(i, sample_weighting="none"),
    "Dirichlet MAP, normalized": lambda i: _dirichlet(i, sample_weighting="normalized"),
    "Dirichlet MAP, exact": lambda i: _dirichlet(i, sample_weighting="exact"),
    "Dirichlet MAP, none, gamma=0.9": lambda i: _dirichlet(i, sample_weighting="none", gamma=0.9),
}
DENSE = "(N, K, d1)"


def _cross_entropy(logits: Tensor, target: Tensor, teacher: Tensor) -> Tensor:
    return F.cross_entropy(logits, target, label_smoothing=SMOOTHING)


def _kl_div(logits: Tensor, target: Tensor, teacher: Tensor) -> Tensor:
    soft = F.kl_div(F.log_softmax(logits, 1), F.softmax(teacher / TEMPERATURE, 1), reduction="batchmean")
    return ALPHA * F.cross_entropy(logits, target) + (1.0 - ALPHA) * soft


RIVALS = {"nn.CrossEntropyLoss(label_smoothing=0.1)": _cross_entropy, "F.kl_div + F.cross_entropy": _kl_div}
BY_CLASS = "Beta smoothing, batch, spread by class"


def names(classes: int) -> list[str]:
    """The calls that there are with so many classes: the table of class profiles has a limit."""
    own = [name for name in OURS if name != BY_CLASS or classes**2 <= MOST_NUMBERS]
    return [*own, *(f"{name}, {how}" for name in RIVALS for how in ("eager", "compiled"))]


def record(name: str, classes: int, dtype: torch.dtype, rows: int = ROWS) -> Call:
    """Count one call."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    recorder = Recorder(rows, classes)
    with FakeTensorMode(allow_non_fake_inputs=True):
        if name in OURS:
            inputs = Inputs.make(rows, classes, dtype, "cuda", dense=DENSE in name)
            with softlabels.backend("compile"):  # raises where it fails
                return ours(lambda: OURS[name](inputs), recorder)
        rival, how = name.rsplit(", ", 1)
        i = Inputs.make(rows, classes, dtype, "cpu")
        if how == "compiled":
            return compiled_by_torch(RIVALS[rival], (i.logits, i.target, i.teacher), recorder)
        return eager(lambda logits: RIVALS[rival](logits, i.target, i.teacher), i.logits, recorder)
