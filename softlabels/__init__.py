"""Drop-in PyTorch losses whose soft labels fit each training instance."""

from softlabels import data, functional, metrics, plotting, tuning
from softlabels.kernels import LinearLogits, TopKLogits, backend, get_backend, set_backend
from softlabels.losses import (
    BetaSmoothingLoss,
    ConfidencePenaltyLoss,
    InstanceDirichletMAPLoss,
    LabelSmoothingMAPLoss,
    PrunedDistillationLoss,
    SelfDistillationLoss,
)
from softlabels.teachers import EMATeacher

__version__ = "0.1.0"

__all__ = [
    "BetaSmoothingLoss",
    "ConfidencePenaltyLoss",
    "EMATeacher",
    "InstanceDirichletMAPLoss",
    "LabelSmoothingMAPLoss",
    "LinearLogits",
    "PrunedDistillationLoss",
    "SelfDistillationLoss",
    "TopKLogits",
    "__version__",
    "backend",
    "data",
    "functional",
    "get_backend",
    "metrics",
    "plotting",
    "set_backend",
    "tuning",
]
