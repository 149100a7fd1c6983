"""Predictive uncertainty: the Shannon entropy of predictions (paper sec. 4.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from softlabels.metrics import _rows


def predictive_entropy(input: Tensor, *, from_logits: bool = True) -> Tensor:
    r"""Shannon entropy of each predicted distribution, in nats.

    $$H(p) = -\sum_{c=1}^K p_c \log p_c, \qquad 0 \log 0 = 0$$

    From logits it is evaluated as $\log(1 + s) + \sum_{c \ne m} e^{d_c} (-d_c) / (1 + s)$ with $m$ the largest class,
    $d_c = f_c - f_m$ and $s = \sum_{c \ne m} e^{d_c}$: no term is negative, so that nothing cancels, and an entropy of
    1e-30 is as accurate as one of 1.

    Args:
        input: Logits (K), (N, K) or (N, K, d1, ...), float16 to float64: classes are in dimension 1.
        from_logits: False says that ``input`` holds class probabilities instead.

    Returns:
        Entropy in [0, log K] (of probabilities, up to the rounding of their sum) of row shape, (), (N) or
        (N, d1, ...), computed in float64 and rounded to float32, or kept in float64 for float64 ``input``.
        Differentiable; with respect to a probability of 0 the derivative is infinite.

    Raises:
        NotImplementedError: ``input`` is not of a floating dtype of at least 16 bits.
        ValueError: ``input`` has less than two classes, or was said to hold probabilities and does not.

    Example:
        >>> import torch
        >>> from softlabels.metrics import predictive_entropy
        >>> predictive_entropy(torch.tensor([[0.0, 0.0], [20.0, 0.0]]))
        tensor([6.9315e-01, 4.3284e-08])

    Reference:
        Zhang & Sabuncu, *Self-Distillation as Instance-Specific Label Smoothing*, 2020, Eq. 4 (its summand).
    """
    entropy = _entropies(_rows.checked(input, None, None, from_logits, -100, "input")[0], from_logits)
    return entropy.to(input.device, torch.promote_types(input.dtype, torch.float32))


def average_predictive_uncertainty(
    input: Tensor,
    target: Tensor | None = None,
    *,
    sample_weight: Tensor | None = None,
    from_logits: bool = True,
    ignore_index: int = -100,
) -> Tensor:
    r"""Mean entropy of the predictions, in nats.

    $$\frac{1}{n} \sum_{j=1}^n H(p(\cdot \mid x_j))$$

    Args:
        input: Logits (K), (N, K) or (N, K, d1, ...): classes are in dimension 1, which nothing but a ``target`` tells.
        target: Class indices of row shape; only used to leave out rows. None: all rows count.
        sample_weight: Weights of row shape, not negative: a sample of weight 2 counts as two. None: 1.
        from_logits: False says that ``input`` holds class probabilities instead.
        ignore_index: Label of the rows that do not count.

    Returns:
        A scalar in [0, log K], float64; nan where no row counts.

    Raises:
        IndexError: a label is neither a class nor ``ignore_index``.
        ValueError: shapes do not match, or ``input`` was said to hold probabilities and does not.

    Example:
        >>> import torch
        >>> from softlabels.metrics import average_predictive_uncertainty
        >>> average_predictive_uncertainty(torch.zeros(8, 4))  # log 4
        tensor(1.3863, dtype=torch.float64)

    Reference:
        Zhang & Sabuncu, *Self-Distillation as Instance-Specific Label Smoothing*, 2020, Eq. 4.
    """
    return torch.div(*entropy_sums(input, target, sample_weight, from_logits, ignore_index))


def entropy_sums(
    input: Tensor, target: Tensor | None, sample_weight: Tensor | None, from_logits: bool, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Summed entropy of the rows that count, times their weights, and the sum of these; float64 scalars."""
    input, _, weight = _rows.checked(input, target, sample_weight, from_logits, ignore_index, "input")
    return torch.where(weight == 0, 0.0, weight * _entropies(input, from_logits)).sum(), weight.sum()


def _entropies(input: Tensor, from_logits: bool) -> Tensor:
    """Entropy of each row in float64."""
    return _rows.by_chunks(_entropy if from_logits else lambda p: torch.special.entr(p.double()).sum(1), input)


def _entropy(logits: Tensor) -> Tensor:
    """Entropy over dimension 1 as a sum of terms that are not negative."""
    logits = logits.double()
    largest = logits.argmax(1, keepdim=True)
    below = (logits - logits.gather(1, largest)).clamp(min=-1e3)  # exp(-1e3) is 0, and 0 * -1e3 is 0 where inf is not
    odds = below.exp().scatter(1, largest, 0.0)
    total = odds.sum(1)
    return total.log1p() - (odds * below).sum(1) / (1.0 + total)
