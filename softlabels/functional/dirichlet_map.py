"""MAP estimation under a teacher's Dirichlet prior (paper Eq. 6, 8, 9)."""

from __future__ import annotations

import torch
from torch import Tensor

from softlabels import kernels
from softlabels.functional import _checks
from softlabels.functional._rows import Rows, factor, finish, prepare
from softlabels.functional._targets import label_probabilities

SAMPLE_WEIGHTINGS = ("normalized", "exact", "none")
MAX_LOG_STRENGTH = 60.0  # exp(60) = 1e26: rows of such weight still sum and differentiate in float32


def dirichlet_map_loss(
    input: Tensor,
    target: Tensor,
    teacher_logits: Tensor,
    *,
    beta: float = 2 / 3,
    temperature: float = 4.0,
    gamma: float = 1.0,
    sample_weighting: str = "normalized",
    weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    r"""Negative log-posterior of the prediction under a Dirichlet prior set by a teacher.

    With label counts $c_{ij}$ (one-hot for class indices), $p = \mathrm{softmax}(\mathtt{input})$,
    $q = \mathrm{softmax}(f / T)$ for teacher logits $f$, and a weight $s_i$ per row,

    $$\ell_i = -\sum_j \big( c_{ij} + [\beta s_i q_{ij} + \gamma - 1]_+ \big) \log p_{ij}.$$

    ``sample_weighting`` chooses $s_i$:

    - ``"exact"``: $s_i = S_i = \sum_j \exp(f_{ij} / T)$, so that the prior is Eq. 8 to the letter,
      $\alpha_{ij} = \beta \exp(f_{ij} / T) + \gamma$. Adding a constant to a row's teacher logits multiplies that
      row's prior by $\exp(\mathrm{constant} / T)$ although the teacher's predictions stay the same: the scale
      ambiguity of sec. 5.2. Where $S_i$ is too large for the arithmetic ($\log S_i > 60$; 600 in float64)
      this raises on the CPU; on an accelerator, where looking would stall it, and under tracing, $\log S_i$ is cut off
      there. A float16 gradient may overflow long before (at weights of 65504), as GradScaler expects.
    - ``"normalized"``: $s_i \propto \sum_j \exp((f_{ij} - \bar f_i) / T)$ with $\bar f_i$ the row's mean logit,
      scaled to mean 1 over the kept rows of the batch. It depends on the teacher's predictions alone: adding any
      constant to any row changes nothing. Where the rows of $f$ sum to zero, as those of a trained softmax layer
      nearly do, this is $S_i / \operatorname{mean}(S)$. A teacher logit of -inf is left out of the row's mean.
    - ``"none"``: $s_i = 1$. With $\gamma = 1$ this is $1 + \beta$ times
      [`self_distillation_loss`][softlabels.functional.self_distillation_loss] with $\alpha = 1 / (1 + \beta)$.
      It too depends on the teacher's predictions alone.

    As $T \to \infty$ the prior becomes uniform: Eq. 7 with the same $\beta$ (``"exact"``: with $K \beta$).

    Args:
        input: Student logits of shape (K), (N, K) or (N, K, d1, ...), any floating dtype. Half-precision logits are
            worked on in float32.
        target: Class indices of shape (), (N) or (N, d1, ...), int64 or uint8; or label counts of the shape of
            ``input``, whole or fractional, floating or integer: several labels per sample, class probabilities,
            or zeros for an unlabelled sample, which learns from the prior alone.
        teacher_logits: Logits of the teacher, of the shape of ``input``; no gradient flows to them.
        beta: Strength of the prior, at least 0 and finite. 0 (with gamma = 1) is plain cross-entropy.
        temperature: $T > 0$ divides the teacher's logits.
        gamma: The constant of Eq. 8, at least 0 and finite. Below 1 it prunes the classes to which the teacher gives
            too little (the unclamped loss would be unbounded below, App. 9.7); above 1 it adds uniform mass.
        sample_weighting: ``"normalized"``, ``"exact"`` or ``"none"``, see above.
        weight: Class weights of shape (K,), any floating dtype: $w_j$ multiplies the terms of class $j$.
        sample_weight: Non-negative weight of each row, of row shape. It does not enter the mean of $s_i$.
        ignore_index: Rows with this label count for nothing, in the normalisation of $s_i$ as elsewhere.
        reduction: ``"mean"`` (over the summed weights of the kept rows; for counts, over the rows, as torch does for
            class probabilities), ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or with ``reduction="none"`` a tensor of row shape; float64 for float64 logits, else float32.

    Raises:
        ValueError: an option is out of range, shapes do not match, or ``"exact"`` overflows on the CPU.
        RuntimeError: a dtype or shape that nn.CrossEntropyLoss rejects with the same type.
        IndexError: a label outside [0, K) on the CPU (a device-side assertion on an accelerator).

    Example:
        >>> import torch
        >>> from softlabels.functional import dirichlet_map_loss
        >>> logits, teacher_logits = torch.randn(2, 3), torch.randn(2, 3)
        >>> counts = torch.tensor([[2, 1, 0], [0, 0, 0]])  # three labels for one sample, none for the other
        >>> dirichlet_map_loss(logits, counts, teacher_logits, reduction="none").shape
        torch.Size([2])

    Reference:
        Zhang & Sabuncu, *Self-Distillation as Instance-Specific Label Smoothing*, NeurIPS 2020, Eq. 6-9 and App. 9.7.
    """
    _check_options(beta, temperature, gamma, sample_weighting)
    rows = prepare(input, target, weight, sample_weight, ignore_index, reduction, counts=True)
    teacher_logits = rows.teacher_argument(teacher_logits)
    row_factor = factor(rows, reduction)
    result = kernels.teacher(
        rows.logits,
        rows.target,
        teacher_logits,
        row_factor,
        _soft_weight(rows, teacher_logits, beta, temperature, sample_weighting),
        rows.class_weight,
        shift=float(gamma - 1.0),
        weight=row_factor,
        temperature=temperature,
        reduce=reduction != "none",
    )
    return finish(result, rows, reduction)


def dirichlet_map_targets(
    target: Tensor,
    teacher_logits: Tensor,
    *,
    beta: float = 2 / 3,
    temperature: float = 4.0,
    gamma: float = 1.0,
    sample_weighting: str = "normalized",
) -> tuple[Tensor, Tensor]:
    r"""Build the MAP estimates that [`dirichlet_map_loss`][softlabels.functional.dirichlet_map_loss] pulls towards.

    The loss of a row is its weight times the cross-entropy against its soft label:
    $\hat z_{ij} = m_{ij} / M_i$ with $m_{ij} = c_{ij} + [\beta s_i q_{ij} + \gamma - 1]_+$ and $M_i = \sum_j m_{ij}$.

    Args:
        target: Class indices of shape (), (N) or (N, d1, ...), all in [0, K); or label counts of the shape of
            ``teacher_logits``.
        teacher_logits: Logits of shape (K), (N, K) or (N, K, d1, ...), any floating dtype.
        beta: As in the loss.
        temperature: As in the loss.
        gamma: As in the loss.
        sample_weighting: As in the loss.

    Returns:
        The soft labels $\hat z$ of the shape of ``teacher_logits`` and the row weights $M$ of row shape, float64
        for float64 logits, else float32. A row with $M_i = 0$ (no label and no prior) has a soft label of zeros.

    Raises:
        ValueError: an option is out of range, shapes do not match, or ``"exact"`` overflows on the CPU.
        IndexError: a label outside [0, K) on the CPU.

    Example:
        >>> import torch
        >>> from softlabels.functional import dirichlet_map_targets
        >>> soft, row_weight = dirichlet_map_targets(torch.tensor([0]), torch.zeros(1, 4), beta=1.0)
        >>> soft, row_weight
        (tensor([[0.6250, 0.1250, 0.1250, 0.1250]]), tensor([2.]))

    Reference:
        Zhang & Sabuncu (2020), sec. 5: the closed form of the MAP estimate.
    """
    _check_options(beta, temperature, gamma, sample_weighting)
    _checks.check_input(teacher_logits, "teacher_logits")
    if isinstance(target, Tensor) and target.shape == teacher_logits.shape:
        target = target.to(kernels.working_dtype(teacher_logits))
    num_classes = teacher_logits.shape[0 if teacher_logits.dim() == 1 else 1]
    rows = prepare(teacher_logits, label_probabilities(target, num_classes), None, None, -100, "none")
    teacher_logits = rows.teacher_argument(teacher_logits)
    prior = kernels.teacher_probabilities(teacher_logits, temperature, None, rows.target.dtype)
    soft = _soft_weight(rows, teacher_logits, beta, temperature, sample_weighting)
    strength = soft.unsqueeze(1) if isinstance(soft, Tensor) else soft
    mass = rows.target + (strength * prior + (gamma - 1.0)).clamp_min(0.0)
    row_weight = mass.sum(1)
    soft_label = mass / torch.where(row_weight == 0, 1.0, row_weight).unsqueeze(1)
    return (soft_label.squeeze(0), row_weight.squeeze(0)) if rows.single else (soft_label, row_weight)


def _check_options(beta: float, temperature: float, gamma: float, sample_weighting: str) -> None:
    _checks.check_non_negative("beta", beta)
    _checks.check_positive("temperature", temperature)
    _checks.check_non_negative("gamma", gamma)
    _checks.check_choice("sample_weighting", sample_weighting, SAMPLE_WEIGHTINGS)


def _soft_weight(
    rows: Rows, teacher_logits: Tensor, beta: float, temperature: float, sample_weighting: str
) -> float | Tensor:
    """beta * s_i of Eq. 9, row-shaped."""
    if sample_weighting == "none" or beta == 0:
        return beta
    scaled = teacher_logits.to(kernels.working_dtype(rows.logits)) / temperature
    if sample_weighting == "exact":
        return beta * _bounded_exp(scaled.logsumexp(1), rows)
    possible = scaled > -torch.inf
    centre = torch.where(possible, scaled, 0.0).sum(1) / possible.sum(1)
    log_strength = scaled.logsumexp(1) - centre
    if rows.kept is not None:
        log_strength = log_strength.masked_fill(~rows.kept, -torch.inf)
        count = rows.kept.sum().to(scaled.dtype)
    else:
        count = scaled.new_full((), log_strength.numel())
    log_mean = log_strength.flatten().logsumexp(0) - count.log()
    return beta * torch.where(log_strength > -torch.inf, (log_strength - log_mean).exp(), 0.0)


def _bounded_exp(log_strength: Tensor, rows: Rows) -> Tensor:
    """exp of the exact log-strengths: an error where they overflow and can be looked at, a bound elsewhere."""
    limit = MAX_LOG_STRENGTH * (10.0 if log_strength.dtype == torch.float64 else 1.0)
    if rows.kept is not None:
        log_strength = torch.where(rows.kept, log_strength, 0.0)
    if _checks.peek((log_strength > limit).any()):
        raise ValueError(
            f"teacher_logits are too large for sample_weighting='exact': a row's sum of exp(teacher_logits / "
            f"temperature) reaches exp({log_strength.max().item():.4g}), and more than exp({limit:g}) overflows in "
            f"{log_strength.dtype}. Use sample_weighting='normalized', a higher temperature, or subtract a constant "
            "from the teacher's logits"
        )
    return log_strength.clamp(max=limit).exp()
