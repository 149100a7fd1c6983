"""Row kernels: the cross-entropy of logits against a soft label that is a sum of terms.

Logits are (N, K) or (N, K, d1, ...), classes always in dimension 1; a *row* is one classification, so row-shaped
tensors are (N,) or (N, d1, ...). Nothing here knows of losses or papers.
"""

from softlabels.kernels.backend import backend, get_backend, set_backend
from softlabels.kernels.dispatch import confidence_penalty, cross_entropy, fused, ranked_amounts, statistics
from softlabels.kernels.linear import LinearPrediction, TwoScales, by_blocks
from softlabels.kernels.linear_logits import LinearLogits
from softlabels.kernels.ordering import uniforms, unranked_amounts
from softlabels.kernels.soft_label import Amount, Even, Given, Label, Prediction, SoftLabel, Term, working_dtype
from softlabels.kernels.spread import Spread
from softlabels.kernels.statistics import Statistics
from softlabels.kernels.top_k_logits import TopKLogits

__all__ = [
    "Amount",
    "Even",
    "Given",
    "Label",
    "LinearLogits",
    "LinearPrediction",
    "Prediction",
    "SoftLabel",
    "Spread",
    "Statistics",
    "Term",
    "TopKLogits",
    "TwoScales",
    "backend",
    "by_blocks",
    "confidence_penalty",
    "cross_entropy",
    "fused",
    "get_backend",
    "ranked_amounts",
    "set_backend",
    "statistics",
    "uniforms",
    "unranked_amounts",
    "working_dtype",
]
