"""Self-distillation (paper Eq. 2, 3) and its pruned form (App. 9.7)."""

from __future__ import annotations

import math

from torch import Tensor

from softlabels import _checks, kernels
from softlabels.functional import _logits
from softlabels.functional._rows import Rows, prepare
from softlabels.kernels import LinearLogits, TopKLogits


def self_distillation_loss(
    input: Tensor | LinearLogits,
    target: Tensor,
    teacher_logits: Tensor | LinearLogits | TopKLogits,
    *,
    alpha: float = 0.6,
    temperature: float = 4.0,
    scale_student: bool = False,
    weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    r"""Cross-entropy against a mixture of the label and a teacher's prediction.

    With $p = \mathrm{softmax}(\mathtt{input})$ and $q = \mathrm{softmax}(\mathtt{teacher\_logits} / T)$,

    $$\ell_i = -\alpha \log p_{i,y_i} - (1 - \alpha) \sum_c q_{ic} \log p_{ic}.$$

    Args:
        input: Student logits of shape (K), (N, K) or (N, K, d1, ...), any floating dtype. Half-precision logits are
            worked on in float32.
        target: Class indices of shape (), (N) or (N, d1, ...), int64 or uint8; or class probabilities of the shape
            of ``input``.
        teacher_logits: Logits of the teacher, of the shape of ``input``; no gradient flows to them. A logit of -inf
            is a probability of 0. Of a teacher that gives probabilities p, ``p.log()`` at ``temperature=1`` is exact.
        alpha: Weight of the hard label, in [0, 1]. 1 is plain cross-entropy, 0 learns from the teacher alone. (Many
            distillation scripts call the weight of the *soft* term alpha.)
        temperature: $T > 0$ divides the teacher's logits.
        scale_student: Also divide the student's logits by $T$ in the second sum and multiply that sum by $T^2$, as
            Hinton et al. (2015) do. Appendix 9.2 finds that this calibrates worse.
        weight: Class weights of shape (K,), any floating dtype: $w_c$ multiplies the terms of class $c$ in both sums.
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
        >>> from softlabels.functional import self_distillation_loss
        >>> logits, teacher_logits = torch.zeros(2, 4), torch.randn(2, 4)
        >>> self_distillation_loss(logits, torch.tensor([1, 3]), teacher_logits)  # log 4, whatever the label
        tensor(1.3863)

    Reference:
        Zhang & Sabuncu, *Self-Distillation as Instance-Specific Label Smoothing*, NeurIPS 2020, Eq. 3 and App. 9.2.
    """
    alpha = _checks.check_fraction("alpha", alpha)
    temperature = _checks.check_positive("temperature", temperature)
    rows = prepare(input, target, weight, sample_weight, ignore_index, reduction)
    return self_distillation(rows, teacher_logits, alpha, temperature, scale_student)


def self_distillation(
    rows: Rows,
    teacher_logits: Tensor | LinearLogits | TopKLogits,
    alpha: float,
    temperature: float,
    scale_student: bool = False,
    prune: float = 0.0,
) -> Tensor:
    """Eq. 3 of checked arguments, with the teacher's surest classes alone if ``prune`` (App. 9.7)."""
    teacher = rows.teacher_argument(teacher_logits)
    keep = kept_classes(prune, rows.num_classes)
    if not scale_student or alpha == 1:
        return rows.loss(*_mixture(rows, teacher, alpha, temperature, keep), total=1.0)
    soft = rows.prediction((1 - alpha) * temperature**2, teacher, temperature, keep)
    return rows.loss_of_two_scales(rows.label(alpha), soft, temperature)


def _mixture(
    rows: Rows, teacher_logits: Tensor | LinearLogits | TopKLogits, alpha: float, temperature: float, keep: int
) -> tuple[kernels.Term, ...]:
    """1 - alpha of the teacher's prediction and alpha of the label."""
    return rows.prediction(1.0 - alpha, teacher_logits, temperature, keep), rows.label(alpha)


def pruned_distillation_loss(
    input: Tensor | LinearLogits,
    target: Tensor,
    teacher_logits: Tensor | LinearLogits | TopKLogits,
    *,
    prune: float = 0.5,
    alpha: float = 0.6,
    temperature: float = 4.0,
    weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    r"""Self-distillation from the teacher's surest classes alone.

    As [`self_distillation_loss`][softlabels.functional.self_distillation_loss], with the softmax of the teacher
    taken over the $K - \lfloor \mathtt{prune} \cdot K \rfloor$ classes of largest logit in each row; all others get
    probability 0. Where logits are equal, the class of lower index is kept. The true class may be among the
    pruned ones; the hard-label term covers it all the same.

    Args:
        input: Student logits of shape (K), (N, K) or (N, K, d1, ...), any floating dtype.
        target: Class indices of shape (), (N) or (N, d1, ...), int64 or uint8; or class probabilities of the shape
            of ``input``.
        teacher_logits: Logits of the teacher, of the shape of ``input``; no gradient flows to them. Of a teacher that
            gives probabilities p, ``p.log()`` at ``temperature=1`` is exact.
        prune: Fraction of the classes to prune, in [0, 1); 0 is self-distillation. At least one class stays.
        alpha: Weight of the hard label, in [0, 1].
        temperature: $T > 0$ divides the teacher's logits.
        weight: Class weights of shape (K,), any floating dtype.
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
        >>> from softlabels.functional import pruned_distillation_loss
        >>> teacher_logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
        >>> logits = torch.tensor([[0.0, 0.0, -torch.inf, -torch.inf]])  # the two pruned classes cost nothing
        >>> pruned_distillation_loss(logits, torch.tensor([0]), teacher_logits, prune=0.5)
        tensor(0.6931)

    Reference:
        Zhang & Sabuncu (2020), App. 9.7.
    """
    alpha = _checks.check_fraction("alpha", alpha)
    temperature = _checks.check_positive("temperature", temperature)
    prune = check_prune("prune", prune)
    rows = prepare(input, target, weight, sample_weight, ignore_index, reduction)
    return self_distillation(rows, teacher_logits, alpha, temperature, prune=prune)


def check_prune(name: str, value: object) -> float:
    """``prune`` leaves at least one class."""
    return _checks.check_number(name, value, low=0.0, high=1.0, high_open=True)


def kept_classes(prune: float, num_classes: int) -> int:
    """K - floor(prune * K), where products like 0.29 * 100 = 28.999... count as the whole number they mean."""
    return max(num_classes - math.floor(prune * num_classes + 1e-9), 1)


def distillation_targets(
    target: Tensor,
    teacher_logits: Tensor,
    *,
    alpha: float = 0.6,
    temperature: float = 4.0,
    prune: float = 0.0,
) -> Tensor:
    r"""Build the soft labels of self-distillation and pruned distillation.

    Args:
        target: Class indices of shape (), (N) or (N, d1, ...), int64 or uint8, all in [0, K); or class probabilities
            of the shape of ``teacher_logits``.
        teacher_logits: Logits of shape (K), (N, K) or (N, K, d1, ...), any floating dtype.
        alpha: Weight of the hard label, in [0, 1].
        temperature: $T > 0$ divides the teacher's logits.
        prune: Fraction of the classes to prune, in [0, 1).

    Returns:
        Class probabilities of the shape of ``teacher_logits``, float64 for float64 logits, else float32.

    Raises:
        ValueError: an option is out of range, or shapes do not match.
        IndexError: a label outside [0, K) on the CPU.

    Example:
        >>> import torch
        >>> from softlabels.functional import distillation_targets
        >>> distillation_targets(torch.tensor([0]), torch.zeros(1, 4), alpha=0.6)
        tensor([[0.7000, 0.1000, 0.1000, 0.1000]])

    Reference:
        Zhang & Sabuncu (2020), Eq. 3 and App. 9.7.
    """
    alpha = _checks.check_fraction("alpha", alpha)
    temperature = _checks.check_positive("temperature", temperature)
    prune = check_prune("prune", prune)
    _logits.check_dense(teacher_logits)
    _checks.check_input(teacher_logits, "teacher_logits")
    rows = prepare(teacher_logits, target)
    teacher = rows.teacher_argument(teacher_logits)
    return rows.soft_label(*_mixture(rows, teacher, alpha, temperature, kept_classes(prune, rows.num_classes)))
