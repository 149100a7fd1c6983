"""Confidence diversity: how spread the probability of the true class is over samples (paper sec. 4.2)."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from softlabels.functional import _checks
from softlabels.metrics import _rows

ROUNDING = 2.0**-44  # error of log-odds relative to the largest: 256 steps of float64, for sums over many classes


def confidence_diversity(
    input: Tensor,
    target: Tensor,
    *,
    n_neighbors: int = 3,
    from_logits: bool = True,
    ignore_index: int = -100,
) -> Tensor:
    r"""Differential entropy of the true-class probability over samples, in nats, by nearest neighbours.

    With $c_i = p(y_i \mid x_i)$ and $\varepsilon_i$ the distance from $c_i$ to its $k$-th nearest neighbour,

    $$\hat h(C) = \psi(n) - \psi(k) + \frac{1}{n} \sum_{i=1}^n \log 2 \varepsilon_i.$$

    One sort finds all neighbours, so the cost is $O(n (\log n + k))$. Distances are taken between probabilities where
    they are below one half and between distances from 1 elsewhere, both from log-odds in float64: the confidences
    of a trained model, which float32 rounds to 1, keep their spread.

    Equal confidences (log-odds that agree to 13 digits of the largest) would give $\log 0$. A group of $m > k$ equal
    values counts as $m$ values filling the cell around them: its $2 \varepsilon_i$ is the mean of the distances to the
    next smaller and the next larger confidence (or to the only one there is), and $k$ is replaced by $m$. Where all
    confidences are equal, the cell is as wide as the rounding step of float64 at 1, and the result is
    $\log 2^{-52} = -36.04$. So it is never $-\infty$, and no sample is left out.

    Args:
        input: Logits (K), (N, K) or (N, K, d1, ...).
        target: Class indices of row shape.
        n_neighbors: $k \ge 1$. More neighbours: less variance, more smoothing of the density.
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
    odds = true_class_log_odds(input, target, from_logits, ignore_index)
    if odds.numel() <= n_neighbors:
        raise ValueError(
            f"n_neighbors={n_neighbors} needs at least {n_neighbors + 1} samples, got {odds.numel()} that count"
        )
    return nearest_neighbor_entropy(odds, n_neighbors)


def true_class_log_odds(input: Tensor, target: Tensor, from_logits: bool, ignore_index: int) -> Tensor:
    """Log-odds of the true-class probability of the rows that count; (n,) in float64."""
    _checks.check_flag("from_logits", from_logits)
    target, kept = _rows.labels(input, target, ignore_index)
    if from_logits:
        odds = _rows.by_chunks(_rows.true_class_log_odds, input.detach(), target)
    else:
        _rows.check_probabilities(input, kept)
        dim = _rows.class_dim(input)
        odds = torch.logit(input.detach().gather(dim, target.unsqueeze(dim)).squeeze(dim).double().clamp(0.0, 1.0))
    return odds.flatten() if _checks.peek(kept.all()) else odds[kept]


def nearest_neighbor_entropy(odds: Tensor, n_neighbors: int) -> Tensor:
    """Differential entropy of the probabilities whose log-odds are given, (n,) with n > n_neighbors, float64."""
    if odds.isnan().any():
        return odds.new_tensor(math.nan)
    # On a CPU, numpy's sort is several times as fast as torch's, which also says where each value was.
    odds = torch.from_numpy(np.sort(odds.numpy())) if odds.device.type == "cpu" else odds.sort().values
    # Log-odds that differ by no more than the error of their sum over classes are equal, and get one value.
    largest = torch.maximum(odds[-1], -odds[0]).clamp(1.0, 1e4)  # beyond 1e4 float64 has no probabilities
    starts = torch.cat([odds.new_ones(1, dtype=torch.bool), odds.diff() > ROUNDING * largest])
    first_of = None if starts.all() else starts.nonzero().squeeze(1)
    distinct = odds if first_of is None else odds[first_of]
    # A value is its probability below one half, minus its distance from 1 above: both keep what 1 - p would round.
    n, k = odds.numel(), n_neighbors
    below_half = int(torch.searchsorted(distinct, distinct.new_zeros(1), right=True))
    value = distinct.abs().neg_().sigmoid_()
    value[below_half:].neg_()
    if first_of is not None:
        value = value[starts.cumsum(0) - 1]
        below_half = int(first_of[below_half]) if below_half < len(first_of) else n

    def distances(steps: int) -> Tensor:
        """From each value to that ``steps`` places above; (n - steps,)."""
        apart: Tensor = value[steps:] - value[: n - steps]
        apart[max(below_half - steps, 0) : below_half] += 1.0  # from below one half to above
        return apart.clamp_(min=0.0)

    # The k nearest of a value and itself are k + 1 consecutive values, and the k-th nearest is the farther end of
    # these. So try every window: `place` values below, k - place above.
    to_upper = {steps: distances(steps) for steps in range(1, k + 1)}
    radius = torch.cat([to_upper[k], to_upper[k].new_full((k,), torch.inf)])  # all above
    torch.minimum(radius[k:], to_upper[k], out=radius[k:])  # all below
    for place in range(1, k):
        own = slice(place, place + n - k)
        farther = torch.maximum(to_upper[place][: n - k], to_upper[k - place][own])
        torch.minimum(radius[own], farther, out=radius[own])

    entropy = torch.digamma(radius.new_tensor(float(n)))
    tied = radius == 0
    if not tied.any():
        return entropy - torch.digamma(radius.new_tensor(float(k))) + radius.log().mean() + math.log(2.0)
    cells, sizes = _cells(to_upper[1])
    neighbors = torch.where(tied, sizes, float(k))
    width = torch.where(tied, cells, 2.0 * radius)
    return entropy - torch.digamma(neighbors).mean() + width.log().mean()


def _cells(gaps: Tensor) -> tuple[Tensor, Tensor]:
    """For n sorted values, given the n - 1 gaps between them: the cell of each group of equals, and its size."""
    ends = gaps.nonzero().squeeze(1)
    edges = torch.cat([ends.new_tensor([-1]), ends, ends.new_tensor([gaps.numel()])])
    sizes = edges.diff()
    if ends.numel() == 0:
        cells = gaps.new_tensor([torch.finfo(torch.float64).eps])
    else:
        between = gaps[ends]
        to_smaller, to_larger = torch.cat([between[:1], between]), torch.cat([between, between[-1:]])
        cells = (to_smaller + to_larger) / 2.0
    return cells.repeat_interleave(sizes), sizes.double().repeat_interleave(sizes)
