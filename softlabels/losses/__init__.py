"""The losses as modules: options, checks, and the way to a teacher or a ranking; the mathematics is in functional."""

from softlabels.losses.beta_smoothing import BetaSmoothingLoss
from softlabels.losses.distillation import (
    InstanceDirichletMAPLoss,
    PrunedDistillationLoss,
    SelfDistillationLoss,
)
from softlabels.losses.label_smoothing import ConfidencePenaltyLoss, LabelSmoothingMAPLoss

__all__ = [
    "BetaSmoothingLoss",
    "ConfidencePenaltyLoss",
    "InstanceDirichletMAPLoss",
    "LabelSmoothingMAPLoss",
    "PrunedDistillationLoss",
    "SelfDistillationLoss",
]
