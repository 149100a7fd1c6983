"""Losses whose soft label needs no teacher: label smoothing as MAP (Eq. 7) and the confidence penalty (App. 9.1)."""

from __future__ import annotations

from torch import Tensor

from softlabels import _checks
from softlabels.functional.confidence_penalty import confidence_penalty
from softlabels.functional.label_smoothing_map import label_smoothing_map
from softlabels.kernels import LinearLogits
from softlabels.losses.base import SoftLabelLoss, called_as


class LabelSmoothingMAPLoss(SoftLabelLoss):
    r"""Cross-entropy plus a uniform Dirichlet prior of strength beta.

    $$\ell_i = -\log p_{i,y_i} - \frac{\beta}{K} \sum_c \log p_{ic}$$

    This is $1 + \beta$ times ``nn.CrossEntropyLoss(label_smoothing=beta / (1 + beta))``, in training and evaluation.

    Args:
        weight: Class weights of shape (K,), any floating dtype.
        beta: Strength of the prior, at least 0; 0 is plain cross-entropy.
        ignore_index: Rows with this label count for nothing.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Shape:
        - input: (K), (N, K) or (N, K, d1, ...), any floating dtype. Half-precision logits are worked on in float32.
        - target: (), (N) or (N, d1, ...) int64 or uint8 class indices, or class probabilities of the shape of input.
        - sample_weight: row shape, that of an index target; non-negative.
        - output: a scalar, or row shape with ``reduction="none"``; float64 for float64 logits, else float32.

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> import torch, softlabels
        >>> criterion = softlabels.LabelSmoothingMAPLoss(beta=0.25)
        >>> loss = criterion(torch.randn(8, 10), torch.randint(10, (8,)))

    Reference:
        Zhang & Sabuncu, *Self-Distillation as Instance-Specific Label Smoothing*, NeurIPS 2020, Eq. 7 and App. 9.1.
    """

    options = {"beta": _checks.check_non_negative}  # noqa: RUF012

    def __init__(
        self, weight: Tensor | None = None, *, beta: float, ignore_index: int = -100, reduction: str = "mean"
    ) -> None:
        super().__init__(weight, ignore_index=ignore_index, reduction=reduction)
        self.beta = beta

    def forward(self, input: Tensor | LinearLogits, target: Tensor, *, sample_weight: Tensor | None = None) -> Tensor:
        """Compute the loss, called as ``criterion(input, target, ...)``; see the class for the arguments."""
        return label_smoothing_map(self.rows(input, target, sample_weight), self.beta)

    __call__ = called_as(forward)


class ConfidencePenaltyLoss(SoftLabelLoss):
    r"""Cross-entropy less beta times the entropy of the prediction.

    $$\ell_i = w_{y_i} \Big( -\log p_{i,y_i} + \beta \sum_c p_{ic} \log p_{ic} \Big)$$

    Its optimum over free predictions is a label-smoothing optimum; see
    [`confidence_penalty_loss`][softlabels.functional.confidence_penalty_loss]. It may be negative.

    Args:
        weight: Class weights of shape (K,), any floating dtype; they weight the whole row by its label.
        beta: Weight of the entropy, at least 0; 0 is plain cross-entropy.
        ignore_index: Rows with this label count for nothing.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Shape:
        - input: (K), (N, K) or (N, K, d1, ...), any floating dtype. Half-precision logits are worked on in float32.
        - target: (), (N) or (N, d1, ...) int64 or uint8 class indices, or class probabilities of the shape of input.
        - sample_weight: row shape, that of an index target; non-negative.
        - output: a scalar, or row shape with ``reduction="none"``; float64 for float64 logits, else float32.

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> import torch, softlabels
        >>> criterion = softlabels.ConfidencePenaltyLoss(beta=0.1)
        >>> loss = criterion(torch.randn(8, 10), torch.randint(10, (8,)))

    Reference:
        Zhang & Sabuncu (2020), App. 9.1; Pereyra et al., *Regularizing Neural Networks by Penalizing Confident
        Output Distributions*, 2017.
    """

    options = {"beta": _checks.check_non_negative}  # noqa: RUF012

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        beta: float = 0.1,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__(weight, ignore_index=ignore_index, reduction=reduction)
        self.beta = beta

    def forward(self, input: Tensor | LinearLogits, target: Tensor, *, sample_weight: Tensor | None = None) -> Tensor:
        """Compute the loss, called as ``criterion(input, target, ...)``; see the class for the arguments."""
        return confidence_penalty(self.rows(input, target, sample_weight), self.beta)

    __call__ = called_as(forward)
