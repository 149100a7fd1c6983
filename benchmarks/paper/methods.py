"""The methods that are compared: one criterion each, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

import softlabels
from benchmarks.paper.data import Data
from softlabels import tuning

TRUE_CLASS = 0.85  # average soft-label value of the true class in every smoothing method (sec. 7.1)

Criterion = Callable[[nn.Module, nn.Module | None, Data, float], nn.Module]  # (model, teacher, data, EMA decay)


def _smoothing(data: Data) -> float:
    return tuning.label_smoothing_for(TRUE_CLASS, data.num_classes)


METHODS: dict[str, Criterion] = {
    "cross-entropy": lambda model, teacher, data, decay: nn.CrossEntropyLoss(),
    "label smoothing": lambda model, teacher, data, decay: nn.CrossEntropyLoss(label_smoothing=_smoothing(data)),
    "Beta smoothing": lambda model, teacher, data, decay: softlabels.BetaSmoothingLoss(
        label_smoothing=_smoothing(data), ema_decay=decay
    ).attach(model),
    "Beta smoothing, history": lambda model, teacher, data, decay: softlabels.BetaSmoothingLoss(
        label_smoothing=_smoothing(data), ema_decay=decay, ranking="history", num_samples=len(data.train.labels)
    ),
    "random Beta smoothing": lambda model, teacher, data, decay: softlabels.BetaSmoothingLoss(
        label_smoothing=_smoothing(data), ranking="random"
    ),
    "self-distillation": lambda model, teacher, data, decay: softlabels.SelfDistillationLoss().attach(
        model, teacher=teacher
    ),
    "pruned self-distillation": lambda model, teacher, data, decay: softlabels.PrunedDistillationLoss().attach(
        model, teacher=teacher
    ),
}
TEACHER = "cross-entropy"  # the method whose model teaches the others of the same seed
