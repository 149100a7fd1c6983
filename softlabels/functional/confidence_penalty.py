"""Cross-entropy with a penalty on confident predictions (paper App. 9.1)."""

from __future__ import annotations

from torch import Tensor

from softlabels import _checks, kernels
from softlabels.functional._rows import Rows, prepare
from softlabels.kernels import LinearLogits


def confidence_penalty_loss(
    input: Tensor | LinearLogits,
    target: Tensor,
    *,
    beta: float = 0.1,
    weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    r"""Cross-entropy less beta times the entropy of the prediction.

    $$\ell_i = w_{y_i} \Big( -\log p_{i,y_i} + \beta \sum_c p_{ic} \log p_{ic} \Big),
      \qquad p = \mathrm{softmax}(\mathtt{input}).$$

    Over free predictions it is smallest at
    $p_y = \left[\beta\, W\big((K - 1) e^{-1/\beta} / \beta\big) + 1\right]^{-1}$ with the other classes equal
    ($W$: Lambert's function), a label-smoothing optimum. The loss itself may be negative.

    Args:
        input: Logits of shape (K), (N, K) or (N, K, d1, ...), any floating dtype. Half-precision logits are worked
            on in float32.
        target: Class indices of shape (), (N) or (N, d1, ...), int64 or uint8; or class probabilities of the shape
            of ``input``.
        beta: Weight of the entropy, at least 0 and finite. 0 is plain cross-entropy.
        weight: Class weights of shape (K,), any floating dtype. The entropy belongs to no class, so the whole row is
            weighted by $w_y$ (for class probabilities $y$ by $\sum_c w_c y_c$), which keeps the optimum above.
        sample_weight: Non-negative weight of each row, of row shape. A row of weight 0 counts as little as an ignored
            one, in everything that is computed over rows.
        ignore_index: Rows with this label count for nothing.
        reduction: ``"mean"`` (over the summed weights of the kept rows), ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or with ``reduction="none"`` a tensor of row shape; float64 for float64 logits, else float32.

    Raises:
        ValueError: an option is out of range, or shapes do not match.
        RuntimeError: a dtype or shape that nn.CrossEntropyLoss rejects with the same type.
        IndexError: a label outside [0, K) on the CPU (a device-side assertion on an accelerator).

    Example:
        >>> import torch
        >>> from softlabels.functional import confidence_penalty_loss
        >>> confidence_penalty_loss(torch.zeros(1, 4), torch.tensor([2]), beta=1.0)  # log 4 - log 4
        tensor(0.)

    Reference:
        Zhang & Sabuncu, *Self-Distillation as Instance-Specific Label Smoothing*, NeurIPS 2020, App. 9.1, L_PU (whose
        second sum carries a stray 1/n; this is the per-sample form). Pereyra et al., *Regularizing Neural
        Networks by Penalizing Confident Output Distributions*, 2017.
    """
    beta = _checks.check_non_negative("beta", beta)
    return confidence_penalty(prepare(input, target, weight, sample_weight, ignore_index, reduction), beta)


def confidence_penalty(rows: Rows, beta: float) -> Tensor:
    """L_PU of checked arguments."""
    reduce = rows.reduction != "none"
    return rows.finish(kernels.confidence_penalty(rows.label(1.0), rows.weight(), beta, rows.logits, reduce))
