"""MAP estimation under a teacher's Dirichlet prior (paper Eq. 6, 8, 9)."""

from __future__ import annotations

import torch
from torch import Tensor

from softlabels import _checks, kernels
from softlabels._reading import peek
from softlabels.functional import _logits
from softlabels.functional._rows import Rows, prepare
from softlabels.kernels import LinearLogits, TopKLogits

SAMPLE_WEIGHTINGS = ("normalized", "exact", "none")
MIN_LOG_PROBABILITY = -87.0  # float32 holds exp(-87); a class of less has no probability, as if its logit were -inf
MAX_LOG_STRENGTH = 60.0  # exp(60) = 1e26: rows of such weight still sum and differentiate in float32


def dirichlet_map_loss(
    input: Tensor | LinearLogits,
    target: Tensor,
    teacher_logits: Tensor | LinearLogits | TopKLogits,
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
      nearly do, this is $S_i / \operatorname{mean}(S)$. The row's mean is taken over the classes that have a
      probability in float32, $\log q_{ij} > -87$: teachers masked with -inf, or with a large negative number, are
      alike.
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
        teacher_logits: Logits of the teacher, of the shape of ``input``; no gradient flows to them. Of a teacher that
            gives probabilities p, ``p.log()`` at ``temperature=1`` is exact.
        beta: Strength of the prior, at least 0 and finite. 0 (with gamma = 1) is plain cross-entropy.
        temperature: $T > 0$ divides the teacher's logits.
        gamma: The constant of Eq. 8, at least 0 and finite. Below 1 it prunes the classes to which the teacher gives
            too little (the unclamped loss would be unbounded below, App. 9.7); above 1 it adds uniform mass.
        sample_weighting: ``"normalized"``, ``"exact"`` or ``"none"``, see above.
        weight: Class weights of shape (K,), any floating dtype: $w_j$ multiplies the terms of class $j$.
        sample_weight: Non-negative weight of each row, of row shape. It does not enter the mean of $s_i$, but that a
            row of weight 0 counts as little as an ignored one.
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
    beta, temperature, gamma = _check_options(beta, temperature, gamma, sample_weighting)
    rows = prepare(input, target, weight, sample_weight, ignore_index, reduction, counts=True)
    return dirichlet_map(rows, teacher_logits, beta, temperature, gamma, sample_weighting)


def dirichlet_map(
    rows: Rows,
    teacher_logits: Tensor | LinearLogits | TopKLogits,
    beta: float,
    temperature: float,
    gamma: float,
    sample_weighting: str,
) -> Tensor:
    """Eq. 6 with the prior of Eq. 8 in the form of Eq. 9, of checked arguments."""
    return rows.loss(*_terms(rows, teacher_logits, beta, temperature, gamma, sample_weighting))


def _terms(
    rows: Rows,
    teacher_logits: Tensor | LinearLogits | TopKLogits,
    beta: float,
    temperature: float,
    gamma: float,
    sample_weighting: str,
) -> tuple[kernels.Term, ...]:
    """[beta s q + gamma - 1]_+ and the label counts."""
    teacher_logits = rows.teacher_argument(teacher_logits)
    amount: kernels.Amount = beta
    if beta > 0 and sample_weighting != "none":
        amount = beta * _sample_weights(rows, teacher_logits, temperature, sample_weighting)
    return rows.prediction(amount, teacher_logits, temperature, shift=gamma - 1.0), rows.label(1.0)


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
    beta, temperature, gamma = _check_options(beta, temperature, gamma, sample_weighting)
    _logits.check_dense(teacher_logits)
    _checks.check_input(teacher_logits, "teacher_logits")
    rows = prepare(teacher_logits, target, counts=True)
    mass = rows.soft_label(*_terms(rows, teacher_logits, beta, temperature, gamma, sample_weighting))
    class_dim = 0 if rows.single else 1
    row_weight = mass.sum(class_dim)
    return mass / torch.where(row_weight == 0, 1.0, row_weight).unsqueeze(class_dim), row_weight


def check_sample_weighting(name: str, value: object) -> object:
    """``sample_weighting`` is one that there is."""
    return _checks.check_choice(name, value, SAMPLE_WEIGHTINGS)


def _check_options(beta: float, temperature: float, gamma: float, sample_weighting: str) -> tuple[float, float, float]:
    check_sample_weighting("sample_weighting", sample_weighting)
    beta, gamma = _checks.check_non_negative("beta", beta), _checks.check_non_negative("gamma", gamma)
    return beta, _checks.check_positive("temperature", temperature), gamma


def _sample_weights(
    rows: Rows, teacher_logits: Tensor | LinearLogits | TopKLogits, temperature: float, sample_weighting: str
) -> Tensor:
    """s_i of Eq. 9, row-shaped; 0 for rows that do not count."""
    counted = rows.counted
    is_exact = sample_weighting == "exact"
    if isinstance(teacher_logits, TopKLogits):
        log_strength = _log_strength(*teacher_logits.scaled(temperature, rows.dtype), is_exact)
    elif isinstance(teacher_logits, LinearLogits):

        def of_block(logits: Tensor) -> Tensor:
            return _log_strength_of(logits, temperature, is_exact, rows.dtype)

        log_strength = kernels.by_blocks(of_block, teacher_logits, counted=counted)
    else:
        log_strength = kernels.fused(_log_strength_of, teacher_logits, temperature, is_exact, rows.dtype)
    if is_exact:
        return _bounded_exp(log_strength if counted is None else torch.where(counted, log_strength, 0.0))
    return kernels.fused(_of_mean_one, log_strength, counted)


def _of_mean_one(log_strength: Tensor, counted: Tensor | None) -> Tensor:
    """exp of the log-strengths, scaled to mean 1 over the rows that count."""
    if counted is None:
        return (log_strength - log_strength.flatten().logsumexp(0)).exp() * log_strength.numel()
    log_strength = log_strength.masked_fill(~counted, -torch.inf)
    strength = (log_strength - log_strength.flatten().logsumexp(0)).exp() * counted.sum()
    return torch.where(counted, strength, 0.0)


def _log_strength_of(logits: Tensor, temperature: float, is_exact: bool, dtype: torch.dtype) -> Tensor:
    scaled = logits.to(dtype) / temperature
    return _log_strength(scaled, scaled.logsumexp(1), is_exact)


def _log_strength(scaled: Tensor, log_sum: Tensor, is_exact: bool) -> Tensor:
    """The logarithm of S_i; or of that over exp of the mean of those logits that have a probability."""
    if is_exact:
        return log_sum
    has_probability = scaled - log_sum.unsqueeze(1) > MIN_LOG_PROBABILITY
    return log_sum - torch.where(has_probability, scaled, 0.0).sum(1) / has_probability.sum(1)


def _bounded_exp(log_strength: Tensor) -> Tensor:
    """exp of the exact log-strengths: an error where they overflow and can be looked at, a bound elsewhere."""
    limit = MAX_LOG_STRENGTH * (10.0 if log_strength.dtype == torch.float64 else 1.0)
    if peek((log_strength > limit).any()):
        raise ValueError(
            f"teacher_logits are too large for sample_weighting='exact': a row's sum of exp(teacher_logits / "
            f"temperature) reaches exp({log_strength.max().item():.4g}), and more than exp({limit:g}) overflows in "
            f"{log_strength.dtype}. Use sample_weighting='normalized', a higher temperature, or subtract a constant "
            "from the teacher's logits"
        )
    return log_strength.clamp(max=limit).exp()
