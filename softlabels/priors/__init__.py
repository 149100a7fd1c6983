"""Where the mass goes that label smoothing takes from the label: spreads that are learned during training."""

from softlabels.priors.learned_spread import SPREADS, LearnedSpread
from softlabels.priors.neighbours import neighbour_spread

__all__ = ["SPREADS", "LearnedSpread", "neighbour_spread"]
