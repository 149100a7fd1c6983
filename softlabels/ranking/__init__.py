"""How a batch is ordered for Beta smoothing: what a model says of its own sureness, now or in the past."""

from softlabels.ranking.history import PredictionHistory
from softlabels.ranking.scores import log_odds

__all__ = ["PredictionHistory", "log_odds"]
