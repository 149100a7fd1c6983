"""One stateless function per loss, and builders that show the soft labels behind them."""

from softlabels.functional.beta_smoothing import beta_smoothing_loss, beta_smoothing_targets
from softlabels.functional.confidence_penalty import confidence_penalty_loss
from softlabels.functional.dirichlet_map import dirichlet_map_loss, dirichlet_map_targets
from softlabels.functional.distillation import (
    distillation_targets,
    pruned_distillation_loss,
    self_distillation_loss,
)
from softlabels.functional.label_smoothing_map import label_smoothing_map_loss

__all__ = [
    "beta_smoothing_loss",
    "beta_smoothing_targets",
    "confidence_penalty_loss",
    "dirichlet_map_loss",
    "dirichlet_map_targets",
    "distillation_targets",
    "label_smoothing_map_loss",
    "pruned_distillation_loss",
    "self_distillation_loss",
]
