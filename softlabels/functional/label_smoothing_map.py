"""Label smoothing as MAP estimation under a uniform Dirichlet prior (paper Eq. 7)."""

from __future__ import annotations

from torch import Tensor

from softlabels import _checks
from softlabels.functional._rows import Rows, prepare
from softlabels.kernels import LinearLogits


def label_smoothing_map_loss(
    input: Tensor | LinearLogits,
    target: Tensor,
    *,
    beta: float,
    weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    r"""Cross-entropy plus a uniform Dirichlet prior of strength beta.

    $$\ell_i = -\log p_{i,y_i} - \frac{\beta}{K} \sum_c \log p_{ic}, \qquad p = \mathrm{softmax}(\mathtt{input}).$$

    This is $1 + \beta$ times ``torch.nn.functional.cross_entropy`` with
    ``label_smoothing = beta / (1 + beta)``. A class whose logit is -inf is impossible: the prior is spread over the
    other classes of the row (torch's loss is infinite there).

    Args:
        input: Logits of shape (K), (N, K) or (N, K, d1, ...), any floating dtype. Half-precision logits are worked
            on in float32.
        target: Class indices of shape (), (N) or (N, d1, ...), int64 or uint8; or class probabilities of the shape
            of ``input``.
        beta: Strength of the prior, at least 0 and finite. 0 is plain cross-entropy.
        weight: Class weights of shape (K,), any floating dtype: $w_c$ multiplies the term of class $c$.
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
        >>> from softlabels.functional import label_smoothing_map_loss
        >>> logits, target = torch.randn(8, 10), torch.arange(8)
        >>> ours = label_smoothing_map_loss(logits, target, beta=0.25)
        >>> torchs = torch.nn.functional.cross_entropy(logits, target, label_smoothing=0.2)
        >>> torch.testing.assert_close(ours, 1.25 * torchs)

    Reference:
        Zhang & Sabuncu, *Self-Distillation as Instance-Specific Label Smoothing*, NeurIPS 2020, Eq. 7 and App. 9.1.
    """
    beta = _checks.check_non_negative("beta", beta)
    return label_smoothing_map(prepare(input, target, weight, sample_weight, ignore_index, reduction), beta)


def label_smoothing_map(rows: Rows, beta: float) -> Tensor:
    """Eq. 7 of checked arguments."""
    return rows.loss(rows.even(beta), rows.label(1.0), total=1.0 + beta)
