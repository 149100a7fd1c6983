"""Beta smoothing (paper sec. 6): label smoothing whose amount is drawn per sample, less for surer samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from softlabels import _checks, kernels
from softlabels.functional._rows import Rows, prepare
from softlabels.kernels import LinearLogits

Spreads = Sequence[tuple[Tensor, Tensor | None]]  # sources and indices of kernels.Spread; none: an even spread


def beta_smoothing_loss(
    input: Tensor | LinearLogits,
    target: Tensor,
    confidence: Tensor | None = None,
    *,
    alpha: float = 0.4,
    concentration: float = 3.0,
    spread: Tensor | None = None,
    generator: torch.Generator | None = None,
    weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    r"""Cross-entropy against labels smoothed by sorted draws from a Beta distribution.

    For the $m$ kept rows of the batch draw $b_1, \dots, b_m \sim \mathrm{Beta}(a, 1)$ and hand them out in the order
    of ``confidence``, the largest to the surest row. With $p = \mathrm{softmax}(\mathtt{input})$,

    $$\ell_i = -\sum_c t_{ic} \log p_{ic}, \qquad
      t_{i,y_i} = \alpha + (1 - \alpha) b_i, \qquad
      t_{ic} = (1 - \alpha) \frac{1 - b_i}{K - 1} \quad (c \ne y_i).$$

    In other words: $e_i = (1 - \alpha)(1 - b_i) K / (K - 1)$ is spread evenly over all classes, and the label gets the
    rest. Where logits of a row are -inf, $e_i$ is spread over the possible classes.

    Args:
        input: Logits of shape (K), (N, K) or (N, K, d1, ...), any floating dtype. Half-precision logits are worked
            on in float32.
        target: Class indices of shape (), (N) or (N, d1, ...), int64 or uint8; or class probabilities $y$ of the
            shape of ``input``, smoothed to $t_c = o + (t_\mathrm{on} - o)\, y_c$ with $o$ the off-class value.
        confidence: How sure a model is of each row, of row shape; only the order matters, a higher value is surer,
            ties go by position, and nan counts as least sure; where all are nan, so is the loss. Dense predictions are
            ordered over all kept rows of the batch. None assigns the draws at random (the "random Beta smoothing" of
            App. 9.5).
        alpha: Weight of the hard label, in [0, 1]. 1 is plain cross-entropy.
        concentration: The parameter $a$ of Beta(a, 1), greater than 0; the mean draw is $a / (a + 1)$. Infinity is
            plain cross-entropy. With the defaults the true class gets 0.85 on average; see
            [`softlabels.tuning.beta_concentration`][].
        spread: Where the amount that leaves the label goes: non-negative numbers of the shape of ``input``. The label's
            own is left out and the others are scaled to sum to 1; no gradient flows to them. Of a table of class
            profiles (K, K), pass ``profiles[target]``. A row of zeros, or None for all, is an even spread. For class
            probabilities $y$ as the target, $t = (1 - u) y + u\,o$ with all of the spread $o$.
        generator: Source of the random numbers; None uses torch's default on the device of ``input``. A generator
            breaks the graph of torch.compile.
        weight: Class weights of shape (K,), any floating dtype: $w_c$ multiplies the term of class $c$.
        sample_weight: Non-negative weight of each row, of row shape. A row of weight 0 counts as little as an ignored
            one, in everything that is computed over rows.
        ignore_index: Rows with this label count for nothing: they are neither ranked nor drawn for.
        reduction: ``"mean"`` (over the summed weights of the kept rows), ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or with ``reduction="none"`` a tensor of row shape; float64 for float64 logits, else float32.

    Raises:
        ValueError: an option is out of range, or shapes do not match.
        RuntimeError: a dtype or shape that nn.CrossEntropyLoss rejects with the same type.
        IndexError: a label outside [0, K) on the CPU (a device-side assertion on an accelerator).

    Example:
        >>> import torch
        >>> from softlabels.functional import beta_smoothing_loss
        >>> logits = torch.tensor([[4.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
        >>> target = torch.tensor([0, 0])
        >>> confidence = logits.softmax(1).amax(1)
        >>> generator = torch.Generator().manual_seed(0)
        >>> beta_smoothing_loss(logits, target, confidence, generator=generator, reduction="none").shape
        torch.Size([2])

    Reference:
        Zhang & Sabuncu, *Self-Distillation as Instance-Specific Label Smoothing*, NeurIPS 2020, sec. 6 and Eq. 3.
    """
    alpha = _checks.check_fraction("alpha", alpha)
    concentration = _checks.check_positive("concentration", concentration, infinite=True)
    rows = prepare(input, target, weight, sample_weight, ignore_index, reduction)
    if confidence is not None:
        confidence = rows.row_argument("confidence", confidence)
    spreads = [] if spread is None else [(rows.spread_argument(spread), None)]
    return beta_smoothing(rows, confidence, alpha, concentration, generator, spreads)


def beta_smoothing(
    rows: Rows,
    confidence: Tensor | None,
    alpha: float,
    concentration: float,
    generator: torch.Generator | None,
    spreads: Spreads = (),
    *,
    joint: bool = False,
    known: kernels.Statistics | None = None,
) -> Tensor:
    """Beta smoothing of checked arguments: within this process or, if ``joint``, over the rows of all processes."""
    amount = _amounts(rows, confidence, _most(rows, alpha, spreads), concentration, generator, joint)
    return rows.loss(*_terms(rows, amount, spreads), total=1.0, known=known)


def mean_smoothing(rows: Rows, alpha: float, concentration: float, spreads: Spreads = ()) -> Tensor:
    """Smoothing of checked arguments by the mean of the amounts."""
    return rows.loss(*_terms(rows, _most(rows, alpha, spreads) / (concentration + 1.0), spreads), total=1.0)


def _terms(rows: Rows, amount: kernels.Amount, spreads: Spreads) -> tuple[kernels.Term, ...]:
    label = torch.rsub(amount, 1.0) if isinstance(amount, Tensor) else 1.0 - amount
    if not spreads:
        return rows.even(amount), rows.label(label)
    return *(rows.spread(amount / len(spreads), *spread) for spread in spreads), rows.label(label)


def _most(rows: Rows, alpha: float, spreads: Spreads) -> float:
    """What leaves the label at most: 1 - alpha; of an even spread that is over all K classes, as much as gives that."""
    if rows.num_classes == 1:
        return 0.0
    return 1.0 - alpha if spreads else (1.0 - alpha) * rows.num_classes / (rows.num_classes - 1)


def _amounts(
    rows: Rows,
    confidence: Tensor | None,
    most: float,
    concentration: float,
    generator: torch.Generator | None,
    joint: bool = False,
) -> Tensor:
    """What is spread, with one draw b = U ** (1 / a) from Beta(a, 1) per row: most (1 - b)."""
    logits, power = rows.logits, 1.0 / concentration
    if confidence is not None:
        return kernels.ranked_amounts(most, power, confidence, rows.counted, generator, rows.dtype, joint=joint)
    uniforms = kernels.uniforms(logits.shape[:1] + logits.shape[2:], logits.device, generator)
    return kernels.unranked_amounts(most, power, uniforms, rows.dtype)


def beta_smoothing_targets(
    target: Tensor,
    num_classes: int,
    confidence: Tensor | None = None,
    *,
    alpha: float = 0.4,
    concentration: float = 3.0,
    spread: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Build the soft labels of [`beta_smoothing_loss`][softlabels.functional.beta_smoothing_loss].

    Args:
        target: Class indices of shape (), (N) or (N, d1, ...), int64 or uint8, all in [0, num_classes); or class
            probabilities of shape (K), (N, K) or (N, K, d1, ...) in a floating dtype.
        num_classes: The number of classes $K$.
        confidence: As in the loss.
        alpha: As in the loss.
        concentration: As in the loss.
        spread: As in the loss, of the shape of the result.
        generator: As in the loss: with the same state, the same draws.

    Returns:
        Class probabilities of shape (K), (N, K) or (N, K, d1, ...), float32 (float64 for float64 probabilities).

    Raises:
        ValueError: an option is out of range, or shapes do not match.
        IndexError: a label outside [0, num_classes) on the CPU.

    Example:
        >>> import torch
        >>> from softlabels.functional import beta_smoothing_targets
        >>> soft = beta_smoothing_targets(torch.tensor([0, 2]), 3, torch.tensor([0.2, 0.9]))
        >>> bool(soft[1, 2] >= soft[0, 0])
        True
        >>> torch.testing.assert_close(soft.sum(1), torch.ones(2))

    Reference:
        Zhang & Sabuncu (2020), sec. 6.
    """
    alpha = _checks.check_fraction("alpha", alpha)
    concentration = _checks.check_positive("concentration", concentration, infinite=True)
    rows = prepare(_like_logits(target, num_classes), target)
    if confidence is not None:
        confidence = rows.row_argument("confidence", confidence)
    spreads = [] if spread is None else [(rows.spread_argument(spread), None)]
    amount = _amounts(rows, confidence, _most(rows, alpha, spreads), concentration, generator)
    return rows.soft_label(*_terms(rows, amount, spreads))


def _like_logits(target: Tensor, num_classes: int) -> Tensor:
    """A tensor of the shape that logits for this target have."""
    _checks.check_tensor("target", target)
    _checks.check_classes(num_classes)
    if not target.is_floating_point():
        class_dim = min(target.dim(), 1)
        shape = target.shape[:class_dim] + (num_classes,) + target.shape[class_dim:]
        return torch.zeros((), dtype=torch.float32, device=target.device).expand(shape)
    class_dim = 0 if target.dim() == 1 else 1
    if target.dim() == 0 or target.shape[class_dim] != num_classes:
        raise ValueError(
            f"target must be class indices or probabilities with {num_classes} classes in dimension {class_dim}, got "
            f"shape {tuple(target.shape)}"
        )
    return target
