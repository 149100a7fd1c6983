"""Confidence diversity: how spread the probability of the true class is over samples (paper sec. 4.2)."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from softlabels import _checks
from softlabels._reading import peek
from softlabels.metrics import _rows

ROUNDING = 2.0**-44  # error of log-odds relative to the largest: 256 steps of float64, for sums over many classes
LARGEST = 708.0  # log-odds; beyond, the distance from 0 or 1 is less than the smallest normal float64
REPEATS = 16  # how many equal confidences may be one sample that was seen again
FEW = 50  # distinct confidences: fewer say too little about the distances between them
# Mean ratio of neighbouring gaps, the smaller to the larger: 2 log 2 - 1 = 0.39 of random values, 1 of a grid.
EVEN = 2 / 3
SOME = 10  # means of fewer ratios say nothing: 1 of 5 ratios of random values is above 2 / 3


def confidence_diversity(
    input: Tensor,
    target: Tensor,
    *,
    n_neighbors: int = 3,
    sample_weight: Tensor | None = None,
    from_logits: bool = True,
    ignore_index: int = -100,
) -> Tensor:
    r"""Differential entropy of the true-class probability over samples, in nats, by nearest neighbours.

    With $c_i = p(y_i \mid x_i)$ and $\varepsilon_i$ the distance from $c_i$ to its $k$-th nearest neighbour,

    $$\hat h(C) = \psi(n) - \psi(k) + \frac{1}{n} \sum_{i=1}^n \log 2 \varepsilon_i.$$

    One sort finds all neighbours, so the cost is $O(n (\log n + k))$. Distances are taken between probabilities where
    they are below one half and between distances from 1 elsewhere, both from log-odds in float64: the confidences
    of a trained model, which float32 rounds to 1, keep their spread.

    Confidences are equal where their log-odds agree to 13 digits of the largest. Equal ones would give $\log 0$, so
    that the sum is over the distinct confidences, each times its share $w_i$ of the samples (of the summed
    ``sample_weight``):

    - As repeats of one sample. Distances are among the $d$ distinct confidences, and the density there is theirs times
      the mean share $\bar w_i$ of the nearest $\sqrt d$ on either side, relative to $1 / d$. So samples that are seen
      twice, drawn with replacement, or oversampled have the density that new samples would have:
      $\sum_i w_i \, (\psi(d) - \psi(k) + \log 2 \varepsilon_i - \log d \bar w_i)$.
    - As mass: where more than 16 samples are equal; where the distinct confidences stand evenly, as rounding leaves
      them (beside ten equal ones or more, the smaller gap is on average over 2/3 of the larger; 0.39 for random
      values); and where they are few (no more than $k$, or fewer than 50 of two samples each). Mass fills the cell from
      midpoint to midpoint, half a gap at the ends, cut at 0 and 1: $\sum_i w_i \log (\mathrm{cell}_i / w_i)$, at most 0
      where all are mass.

    Where all confidences are equal, the cell is as wide as the rounding step of float64 at 1, and the result is
    $\log 2^{-52} = -36.04$. So it is never $-\infty$, and no sample is left out.

    Args:
        input: Logits (K), (N, K) or (N, K, d1, ...).
        target: Class indices of row shape.
        n_neighbors: $k \ge 1$. More neighbours: less variance, more smoothing of the density.
        sample_weight: Weights of row shape, not negative: a sample of weight 2 counts as two. None: 1.
        from_logits: False says that ``input`` holds class probabilities instead; those that are rounded to 1 are then
            equal.
        ignore_index: Label of the rows that do not count.

    Returns:
        A scalar, float64. It is at most 0, which is the entropy of confidences spread evenly over [0, 1], up to the
        error of estimation.

    Raises:
        IndexError: a label is neither a class nor ``ignore_index``.
        ValueError: there are not more than ``n_neighbors`` samples; shapes do not match; or ``input`` was said to hold
            probabilities and does not.

    Example:
        >>> import torch
        >>> from softlabels.metrics import confidence_diversity
        >>> c = torch.linspace(0.001, 0.999, 500)  # spread evenly
        >>> two_classes = torch.stack([c, 1 - c], 1)
        >>> target = torch.zeros(500, dtype=torch.long)
        >>> confidence_diversity(two_classes, target, from_logits=False, n_neighbors=20).round(decimals=1)
        tensor(0., dtype=torch.float64)

    Reference:
        Zhang & Sabuncu, *Self-Distillation as Instance-Specific Label Smoothing*, 2020, Eq. 5; Kozachenko & Leonenko,
        *Sample Estimate of the Entropy of a Random Vector*, 1987; Beirlant et al., *Nonparametric Entropy Estimation:
        An Overview*, 1997.
    """
    _checks.check_count("n_neighbors", n_neighbors)
    odds, weight = true_class_log_odds(input, target, sample_weight, from_logits, ignore_index)
    if odds.numel() <= n_neighbors:
        raise ValueError(
            f"n_neighbors={n_neighbors} needs at least {n_neighbors + 1} samples, got {odds.numel()} that count"
        )
    return nearest_neighbor_entropy(odds, weight, n_neighbors)


def true_class_log_odds(
    input: Tensor, target: Tensor, sample_weight: Tensor | None, from_logits: bool, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Log-odds of the true-class probability, and weights, of the rows that count; (n,) in float64."""
    input, target, weight = _rows.checked(input, target, sample_weight, from_logits, ignore_index, "input")
    if from_logits:
        odds = _rows.by_chunks(_rows.true_class_log_odds, input.detach(), target)
    else:
        dim, input = _rows.class_dim(input), input.detach()
        odds = torch.logit(input.gather(dim, target.unsqueeze(dim)).squeeze(dim).double().clamp(0.0, 1.0))
    kept = weight != 0
    return (odds.flatten(), weight.flatten()) if peek(kept.all()) else (odds[kept], weight[kept])


def nearest_neighbor_entropy(odds: Tensor, weight: Tensor, n_neighbors: int) -> Tensor:
    """Differential entropy of the probabilities whose log-odds are given, (n,) in float64; nan for too few."""
    weighted = not bool((weight == weight[:1]).all())
    if odds.device.type == "cpu" and not weighted:  # numpy's sort is several times as fast, but does not say the order
        odds = torch.from_numpy(np.sort(odds.numpy()))
    else:
        odds, order = odds.sort()
    if odds.numel() <= n_neighbors or odds[-1].isnan() or (weighted and weight.isnan().any()):  # nan is sorted last
        return odds.new_tensor(math.nan)
    odds.clamp_(-LARGEST, LARGEST)
    # Log-odds that differ by no more than the error of their sum over classes are equal, and get one value.
    largest = torch.maximum(odds[-1], -odds[0]).clamp(min=1.0)
    starts = torch.cat([odds.new_ones(1, dtype=torch.bool), odds.diff() > ROUNDING * largest])
    if not weighted and starts.all():
        return _by_distances(*_values(odds), None, n_neighbors)
    first = starts.nonzero().squeeze(1)
    odds, repeats = odds[first], first.diff(append=first.new_tensor([starts.numel()]))
    mass = torch.zeros_like(odds).index_add_(0, starts.cumsum(0) - 1, weight[order]) if weighted else repeats.double()
    mass /= mass.sum()
    if odds.numel() == 1:
        return odds.new_tensor(torch.finfo(torch.float64).eps).log()

    value, below_half = _values(odds)
    gaps, inner = _apart(value, below_half, 1), (repeats[1:-1] > 1).nonzero().squeeze(1)
    ratio = torch.minimum(gaps[inner], gaps[inner + 1]) / torch.maximum(gaps[inner], gaps[inner + 1])
    even = len(ratio) >= SOME and ratio.mean() > EVEN  # rounded to a grid
    few = odds.numel() < FEW and starts.numel() >= 2 * odds.numel()
    apart = ~((repeats > REPEATS) | even | few)
    if apart.all() and odds.numel() > n_neighbors:
        return _by_distances(value, below_half, mass, n_neighbors)
    apart &= apart.sum() > n_neighbors
    entropy = (mass * (_cells(value, gaps) / mass).log())[~apart].sum()
    return entropy + _by_distances(*_values(odds[apart]), mass[apart], n_neighbors) if apart.any() else entropy


def _by_distances(value: Tensor, below_half: int, mass: Tensor | None, k: int) -> Tensor:
    """Part of the entropy that distinct values have, from their k-th nearest neighbours, given the mass of each.

    The density at a value is that of values, times the mean mass of those around it. None: all have the same mass, and
    these are all there are.
    """
    n = value.numel()
    # The k nearest of a value and itself are k + 1 consecutive values, and the k-th nearest is the farther end of
    # these. So try every window: `place` values below, k - place above.
    to_upper = {steps: _apart(value, below_half, steps) for steps in range(1, k + 1)}
    radius = torch.cat([to_upper[k], to_upper[k].new_full((k,), torch.inf)])  # all above
    torch.minimum(radius[k:], to_upper[k], out=radius[k:])  # all below
    for place in range(1, k):
        own = slice(place, place + n - k)
        farther = torch.maximum(to_upper[place][: n - k], to_upper[k - place][own])
        torch.minimum(radius[own], farther, out=radius[own])
    constant = math.log(2.0) + torch.digamma(value.new_tensor([k, n])).diff().sum()  # psi(n) - psi(k)
    if mass is None:
        return radius.log_().mean() + constant
    reach, sums = max(k, math.isqrt(n)), mass.cumsum(0)
    below = torch.arange(n, device=value.device).clamp_(max=reach)  # how many; above there are as many, from the end
    sums = torch.cat([mass.new_zeros(reach + 1), sums, sums[-1:].expand(reach)])
    around = (sums[2 * reach + 1 :] - sums[:n] - mass) / (below + below.flip(0))
    return torch.dot(mass, radius.div_(around).log_()) + mass.sum() * (constant - math.log(n))


def _values(odds: Tensor) -> tuple[Tensor, int]:
    """Probability of each of ascending log-odds, less 1 where above one half, and how many are not.

    Both keep what 1 - p would round.
    """
    below_half = int(torch.searchsorted(odds, odds.new_zeros(1), right=True))
    value = odds.abs().neg_().sigmoid_()
    value[below_half:].neg_()
    return value, below_half


def _apart(value: Tensor, below_half: int, steps: int) -> Tensor:
    """Distance from each value to that ``steps`` places above; (n - steps,)."""
    distance = value[steps:] - value[:-steps]
    distance[max(below_half - steps, 0) : below_half] += 1.0  # from below one half to above
    return distance


def _cells(value: Tensor, gaps: Tensor) -> Tensor:
    """The cells around n > 1 values with these gaps between them: from midpoint to midpoint, inside [0, 1]."""
    below = torch.minimum(gaps[:1] / 2, value[:1].remainder(1.0))  # half a gap, or as far as to 0
    above = torch.minimum(gaps[-1:] / 2, value[-1:].neg().remainder(1.0))
    halves = torch.cat([below, gaps / 2, above])
    return halves[:-1] + halves[1:]
