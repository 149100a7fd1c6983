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
"""

from __future__ import annotations

import math

from softlabels.functional import _checks

__all__ = [
    "beta_concentration",
    "beta_to_smoothing",
    "label_smoothing_for",
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
    return 1.0 - label_smoothing + label_smoothing / num_classes


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
    return min((1.0 - true_class) * num_classes / (num_classes - 1), 1.0)


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
