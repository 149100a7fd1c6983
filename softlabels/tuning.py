r"""Conversions between the ways of saying how much labels are smoothed.

| symbol | meaning |
|---|---|
| ``true_class`` | average soft-label value of the true class |
| ``label_smoothing`` | torch's convention: the true class gets $1 - e + e/K$, every other class $e/K$ |
| ``beta`` | strength of a uniform Dirichlet prior (Eq. 7): $e = \beta / (1 + \beta)$ |
| ``concentration`` | $a$ of Beta(a, 1), whose mean is $a / (a + 1)$ |
| ``alpha`` | weight of the hard label in Eq. 3 |

The paper's own $\epsilon$ gives the true class $1 - \epsilon$ and every other class $\epsilon / (K - 1)$, so its
``true_class`` is $1 - \epsilon$.

[`match_temperature`][softlabels.tuning.match_temperature] gives a teacher's soft labels the same average, so that
self-distillation, label smoothing and Beta smoothing can be compared at equal smoothing (paper sec. 7.1).
[`fit_temperature`][softlabels.tuning.fit_temperature] calibrates a trained model, which is what losses compete with.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from softlabels import _checks
from softlabels.metrics import _rows

MAX_POWER = 1000  # of two, in float64: temperatures beyond make 0 or infinity of a logit

__all__ = [
    "beta_concentration",
    "beta_to_smoothing",
    "beta_true_class",
    "confidence_penalty_optimum",
    "fit_temperature",
    "label_smoothing_for",
    "match_temperature",
    "smoothing_to_beta",
    "true_class_for",
]


def true_class_for(label_smoothing: float, num_classes: int) -> float:
    r"""Soft-label value of the true class under torch's label smoothing, $1 - e + e / K$.

    Args:
        label_smoothing: $e$ in [0, 1].
        num_classes: $K \ge 1$.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> from softlabels.tuning import true_class_for
        >>> round(true_class_for(0.1, 10), 4)
        0.91

    Reference:
        Szegedy et al., *Rethinking the Inception Architecture for Computer Vision*, 2016, sec. 7.
    """
    _checks.check_fraction("label_smoothing", label_smoothing)
    _checks.check_classes(num_classes)
    return float(1.0 - label_smoothing + label_smoothing / num_classes)


def label_smoothing_for(true_class: float, num_classes: int) -> float:
    r"""Invert [`true_class_for`][softlabels.tuning.true_class_for]: $e = (1 - t)\, K / (K - 1)$.

    The paper's $\epsilon$ is converted by ``label_smoothing_for(1 - epsilon, num_classes)``.

    Args:
        true_class: $t$ in [1/K, 1].
        num_classes: $K \ge 2$.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> from softlabels.tuning import label_smoothing_for
        >>> round(label_smoothing_for(0.85, 100), 6)
        0.151515

    Reference:
        Zhang & Sabuncu (2020), sec. 7.1.
    """
    _checks.check_classes(num_classes, at_least=2)
    _checks.check_number("true_class", true_class, low=1.0 / num_classes, high=1.0)
    return float(min((1.0 - true_class) * num_classes / (num_classes - 1), 1.0))


def beta_concentration(true_class: float, alpha: float) -> float:
    r"""Concentration at which Beta smoothing gives the true class ``true_class`` on average.

    Solves $\alpha + (1 - \alpha)\, a / (a + 1) = t$: with $r = (t - \alpha) / (1 - \alpha)$, $a = r / (1 - r)$.

    Args:
        true_class: $t$ in (alpha, 1]; 1 gives infinity, which is no smoothing.
        alpha: Weight of the hard label, in [0, 1).

    Raises:
        ValueError: no concentration reaches ``true_class``.

    Example:
        >>> from softlabels.tuning import beta_concentration
        >>> round(beta_concentration(0.85, alpha=0.4), 6)
        3.0

    Reference:
        Zhang & Sabuncu (2020), sec. 7.1, where "= epsilon" must read "= 1 - epsilon".
    """
    _checks.check_number("alpha", alpha, low=0.0, high=1.0, high_open=True)
    _checks.check_fraction("true_class", true_class)
    if true_class <= alpha:
        raise ValueError(
            f"true_class must be greater than alpha={alpha}, the weight that the true class always has, "
            f"got {true_class}"
        )
    if true_class == 1.0:
        return math.inf
    return (true_class - alpha) / (1.0 - true_class)


def beta_true_class(concentration: float, alpha: float) -> float:
    r"""Average soft-label value of the true class in Beta smoothing, $\alpha + (1 - \alpha)\, a / (a + 1)$.

    Inverts [`beta_concentration`][softlabels.tuning.beta_concentration].

    Args:
        concentration: $a > 0$ of Beta(a, 1); infinity is no smoothing.
        alpha: Weight of the hard label, in [0, 1].

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> from softlabels.tuning import beta_true_class
        >>> round(beta_true_class(3.0, alpha=0.4), 6)
        0.85

    Reference:
        Zhang & Sabuncu (2020), sec. 6 and 7.1.
    """
    _checks.check_positive("concentration", concentration, infinite=True)
    _checks.check_fraction("alpha", alpha)
    return 1.0 - (1.0 - alpha) / (concentration + 1.0)


def smoothing_to_beta(label_smoothing: float) -> float:
    r"""Prior strength that equals torch's label smoothing, $\beta = e / (1 - e)$.

    Args:
        label_smoothing: $e$ in [0, 1).

    Raises:
        ValueError: ``label_smoothing`` is out of range.

    Example:
        >>> from softlabels.tuning import smoothing_to_beta
        >>> smoothing_to_beta(0.2)
        0.25

    Reference:
        Zhang & Sabuncu (2020), Eq. 7 and App. 9.1.
    """
    _checks.check_number("label_smoothing", label_smoothing, low=0.0, high=1.0, high_open=True)
    return label_smoothing / (1.0 - label_smoothing)


def beta_to_smoothing(beta: float) -> float:
    r"""Torch's label smoothing that equals a prior strength, $e = \beta / (1 + \beta)$.

    Args:
        beta: $\beta \ge 0$, finite.

    Raises:
        ValueError: ``beta`` is out of range.

    Example:
        >>> from softlabels.tuning import beta_to_smoothing
        >>> beta_to_smoothing(0.25)
        0.2

    Reference:
        Zhang & Sabuncu (2020), Eq. 7 and App. 9.1.
    """
    _checks.check_non_negative("beta", beta)
    return beta / (1.0 + beta)


def confidence_penalty_optimum(beta: float, num_classes: int) -> float:
    r"""Probability of the true class that minimises the confidence-penalty loss of one sample.

    $$\arg\min_{z_y} \; {-\log z_y} - \beta H(z) \;\Rightarrow\;
    z_y = \frac{1}{\beta\, W\big((K - 1)\, e^{-1/\beta} / \beta\big) + 1}$$

    with Lambert's $W$; the other classes share the rest equally. So the penalty pulls towards the same soft label as
    label smoothing of ``label_smoothing_for(z_y, num_classes)``. It is evaluated as $W(e^x) = \omega(x)$, Wright's
    omega function, so that no exponential overflows or underflows.

    Args:
        beta: Weight $\beta \ge 0$ of the entropy; 0 is plain cross-entropy, whose optimum is 1.
        num_classes: $K \ge 1$.

    Returns:
        $z_y$ in [1/K, 1].

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> from softlabels.tuning import confidence_penalty_optimum
        >>> round(confidence_penalty_optimum(0.5, num_classes=10), 4)
        0.6789

    Reference:
        Zhang & Sabuncu (2020), App. 9.1; Pereyra et al., *Regularizing Neural Networks by Penalizing Confident Output
        Distributions*, 2017.
    """
    from scipy.special import wrightomega  # scipy takes longer to import than softlabels

    _checks.check_non_negative("beta", beta)
    _checks.check_classes(num_classes)
    if beta == 0 or num_classes == 1:
        return 1.0
    log_argument = math.log(num_classes - 1) - 1.0 / beta - math.log(beta)
    return 1.0 / (beta * float(wrightomega(log_argument)) + 1.0)


def match_temperature(
    teacher_logits: Tensor, target: Tensor, *, alpha: float, true_class: float, ignore_index: int = -100
) -> float:
    r"""Temperature at which a teacher's soft labels give the true class ``true_class`` on average.

    Solves $\alpha + (1 - \alpha)\, m(T) = t$, where $m(T)$ is the mean over samples of
    $[\mathrm{softmax}(f / T)]_y$. As $T \to 0$, $m$ tends to the teacher's accuracy; as $T \to \infty$, to $1/K$; in
    between it may rise before it falls, since softening helps the samples that the teacher gets wrong. Where two
    temperatures give the same average, the higher one is returned: its soft labels are the softer ones.

    $m$ is evaluated in float64 at temperatures a factor 2 apart, from far above the differences between the logits of
    a row down to below the smallest margin of a label, until the wanted average is bracketed or a peak or dip between
    three of them may reach it; Brent's method does the rest. A class whose logit is -inf, or as low as half the least
    number of the dtype, is masked and says nothing about how far temperatures have to go.

    Args:
        teacher_logits: Logits (N, K) or (N, K, d1, ...) of the teacher on the training set.
        target: Class indices of row shape.
        alpha: Weight of the hard label in Eq. 3, in [0, 1).
        true_class: Wanted average $t$ of the soft label at the true class.
        ignore_index: Label of the rows that do not count.

    Returns:
        The temperature $T > 0$. The average it gives is within 1e-6 of ``true_class``.

    Raises:
        IndexError: a label is neither a class nor ``ignore_index``.
        ValueError: no temperature gives ``true_class``; the message says which averages can be had.

    Example:
        >>> import torch
        >>> from softlabels.tuning import match_temperature
        >>> logits = torch.tensor([[9.0, 1.0, 0.0], [2.0, 8.0, 1.0]])
        >>> round(match_temperature(logits, torch.tensor([0, 1]), alpha=0.6, true_class=0.85), 2)
        6.2

    Reference:
        Zhang & Sabuncu (2020), sec. 7.1: T is chosen so that self-distillation smooths as much as label smoothing.
    """
    _checks.check_number("alpha", alpha, low=0.0, high=1.0, high_open=True)
    _checks.check_fraction("true_class", true_class)
    rows, labels, kept = _rows_that_count(teacher_logits, target, ignore_index, "teacher_logits")
    widest, narrowest = _gaps(rows, labels, kept)

    averages: list[float] = []

    def excess(log2_temperature: float) -> float:
        """Average soft-label value of the true class, less the wanted one."""
        scaled = functools.partial(_rows.true_class_log_odds, temperature=2.0**log2_temperature)
        share = _rows.by_chunks(scaled, rows, labels).flatten()[kept].sigmoid_().mean().item()
        averages.append(alpha + (1.0 - alpha) * share)
        return averages[-1] - true_class

    # From where all classes are nearly alike down to where each row knows one class alone.
    tried: list[tuple[float, float]] = []  # (log2 T, excess)
    softest = min(math.ceil(math.log2(widest)) + 24, MAX_POWER)
    for power in range(softest, max(math.floor(math.log2(narrowest)) - 8, -MAX_POWER), -1):
        tried.append((float(power), excess(float(power))))
        root = _root_or_none(excess, tried[-3:])
        if root is not None:
            return float(2.0**root)
    raise ValueError(
        f"true_class={true_class} cannot be reached with alpha={alpha}: over all temperatures, this teacher's soft "
        f"labels give the true class {min(averages):.6g} to {max(averages):.6g} on average"
    )


def _gaps(rows: Tensor, labels: Tensor, kept: Tensor) -> tuple[float, float]:
    """Largest difference between the logits of a row, and smallest between the label's and the best other one's.

    Differences of 0 are left out, and 1 stands in where nothing differs.

    Raises:
        ValueError: there are no rows, or one of them has no softmax.
    """
    ranges, margins = _rows.by_chunks(_range_and_margin, rows, labels).flatten(1)[:, kept]
    if ranges.numel() == 0 or ranges.isnan().any():
        raise ValueError(
            f"teacher_logits must hold at least one row that counts, and give each such row a softmax; got "
            f"{ranges.numel()} rows that count, {int(ranges.isnan().sum())} of them without one, and "
            f"{_nans(rows, kept)} nan"
        )
    widest = ranges.max().item() or 1.0
    margins = margins.abs()
    margins = margins[(margins > 0) & margins.isfinite()]
    return widest, min(margins.min().item() if margins.numel() else 1.0, widest)


def _range_and_margin(logits: Tensor, target: Tensor) -> Tensor:
    """Largest difference between finite logits, and that of the label's to the best other; (2, n, d) from (n, K, d)."""
    below, chosen = _masked_below_top(logits), target.unsqueeze(1)
    lowest = below.masked_fill(below == -math.inf, 0.0).amin(1)
    own = below.gather(1, chosen).squeeze(1)
    return torch.stack([-lowest, own - below.scatter_(1, chosen, -math.inf).amax(1)])


def _root_or_none(excess: Callable[[float], float], tried: list[tuple[float, float]]) -> float | None:
    """The softest root among the last three temperatures tried, of falling log2 T, or None.

    Between the last two where the sign changes; or around the middle one, where it comes nearer to 0 than both others
    and a point beside it reaches 0.
    """
    from scipy.optimize import brentq, minimize_scalar  # scipy takes longer to import than softlabels

    harder, last = tried[-1]
    if len(tried) == 1:
        return harder if abs(last) <= 1e-12 else None
    if tried[-2][1] * last <= 0.0:
        return float(brentq(excess, harder, tried[-2][0], xtol=1e-12))
    if len(tried) == 3:
        (softer, first), (_, middle), _ = tried
        side = math.copysign(1.0, middle)
        if side * middle < min(side * first, side * last):
            found = minimize_scalar(lambda power: side * excess(power), bounds=(harder, softer), method="bounded")
            if found.fun <= 0.0:
                return float(brentq(excess, float(found.x), softer, xtol=1e-12))
    return None


def fit_temperature(logits: Tensor, target: Tensor, *, ignore_index: int = -100) -> float:
    r"""Temperature at which a model's predictions have the least cross-entropy: temperature scaling.

    Minimises the mean negative log-likelihood $-\log [\mathrm{softmax}(f / T)]_y$ over $T > 0$. It is convex in
    $1 / T$, with the derivative

    $$\frac{1}{n} \sum_i \Big(\sum_c [\mathrm{softmax}(f_i / T)]_c f_{ic} - f_{i y_i}\Big),$$

    so it has one minimum or none, and scipy's `brentq` finds where the derivative is 0, to 1e-12 of $\log_2 T$. A class
    whose logit is -inf, or as low as half the least number of the dtype of ``logits``, is masked and takes no part.

    Fit it on data that the model was not trained on, and divide the logits of other data by it.

    Args:
        logits: Logits (N, K) or (N, K, d1, ...).
        target: Class indices of row shape.
        ignore_index: Label of the rows that do not count.

    Returns:
        The temperature $T > 0$: over 1 for a model that is too sure, below 1 for one that is not sure enough.

    Raises:
        IndexError: a label is neither a class nor ``ignore_index``.
        ValueError: no temperature is best. Where every label has the largest logit of its row, the likelihood rises for
            ever as $T \to 0$; where the labels' logits are on average no larger than the mean logit of their row, as
            $T \to \infty$. Or no rows count; a logit is nan or +inf; or a label is of a masked class.

    Example:
        >>> import torch
        >>> from softlabels.tuning import fit_temperature
        >>> logits = torch.tensor([[4.0, 0.0], [4.0, 0.0], [4.0, 0.0], [4.0, 0.0]])  # sure at 0.98
        >>> round(fit_temperature(logits, torch.tensor([0, 0, 0, 1])), 4)  # right at 0.75 = 1 / (1 + exp(-4 / T))
        3.641

    Reference:
        Guo et al., *On Calibration of Modern Neural Networks*, 2017, sec. 4.2.
    """
    from scipy.optimize import brentq  # scipy takes longer to import than softlabels

    rows, labels, kept = _rows_that_count(logits, target, ignore_index, "logits")

    def slope(temperature: float) -> float:
        """Mean over rows of the expected logit less that of the label: the derivative by 1 / T."""
        expected = functools.partial(_expected_less_own, temperature=temperature)
        return _rows.by_chunks(expected, rows, labels).flatten()[kept].mean().item()

    hard, soft = slope(0.0), slope(math.inf)
    if not (math.isfinite(hard) and math.isfinite(soft)):
        raise ValueError(
            "logits must hold at least one row that counts, be neither nan nor +inf, and give the label of each such "
            f"row a logit that is not masked; got {int(kept.sum())} rows that count and {_nans(rows, kept)} nan"
        )
    if hard <= 0.0:
        raise ValueError(
            "no temperature is best: each label has the largest logit of its row, so that the likelihood rises for "
            "ever as the temperature falls to 0; fit it on data that the model was not trained on"
        )
    if soft >= 0.0:
        raise ValueError(
            "no temperature is best: the logits of the labels are on average no larger than the mean logit of their "
            "row, so that the likelihood rises for ever with the temperature; do logits and target belong together?"
        )
    power, step = 0.0, 1.0 if slope(1.0) > 0.0 else -1.0
    while (slope(2.0 ** (power + step)) > 0.0) == (step > 0.0):
        power += step
        step *= 2.0
    return float(2.0 ** brentq(lambda u: slope(2.0**u), power, power + step, xtol=1e-12))


def _expected_less_own(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Mean logit under softmax(logits / T), T = 0 and infinity included, less the label's: (n, d) from (n, K, d)."""
    below = _masked_below_top(logits)
    own = below.gather(1, target.unsqueeze(1)).squeeze(1)
    if temperature == 0.0:
        return -own
    odds = (below / temperature).exp_() if math.isfinite(temperature) else (below > -math.inf).double()
    return (odds * below.clamp_(min=torch.finfo(torch.float64).min)).sum(1) / odds.sum(1) - own


def _rows_that_count(logits: Tensor, target: Tensor, ignore_index: int, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Checked logits and class indices, and which of the flattened rows count."""
    rows, labels, weight = _rows.checked(logits, target, None, True, ignore_index, name)
    return rows.detach(), labels, weight.flatten() > 0


def _masked_below_top(logits: Tensor) -> Tensor:
    """Logits less the largest of their row, in float64; -inf where one is as low as half the least of its dtype."""
    return _rows.below_top(logits.masked_fill(logits <= torch.finfo(logits.dtype).min / 2, -math.inf))


def _nans(rows: Tensor, kept: Tensor) -> int:
    return int(rows.movedim(_rows.class_dim(rows), -1).reshape(len(kept), -1)[kept].isnan().sum())
