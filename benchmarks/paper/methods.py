"""The methods that are compared: one criterion each, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

import softlabels
from softlabels import tuning

TRUE_CLASS = 0.85  # average soft-label value of the true class in every smoothing method (sec. 7.1)

Criterion = Callable[[nn.Module, nn.Module | None, int, float], nn.Module]  # (model, teacher, K, EMA decay)


def _smoothing(num_classes: int) -> float:
    return tuning.label_smoothing_for(TRUE_CLASS, num_classes)


METHODS: dict[str, Criterion] = {
    "cross-entropy": lambda model, teacher, k, decay: nn.CrossEntropyLoss(),
    "label smoothing": lambda model, teacher, k, decay: nn.CrossEntropyLoss(label_smoothing=_smoothing(k)),
    "Beta smoothing": lambda model, teacher, k, decay: softlabels.BetaSmoothingLoss(
        label_smoothing=_smoothing(k), ema_decay=decay
    ).attach(model),
    "random Beta smoothing": lambda model, teacher, k, decay: softlabels.BetaSmoothingLoss(
        label_smoothing=_smoothing(k), ranking="random"
    ),
    "self-distillation": lambda model, teacher, k, decay: softlabels.SelfDistillationLoss().attach(
        model, teacher=teacher
    ),
    "pruned self-distillation": lambda model, teacher, k, decay: softlabels.PrunedDistillationLoss().attach(
        model, teacher=teacher
    ),
}
TEACHER = "cross-entropy"  # the method whose model teaches the others of the same seed
