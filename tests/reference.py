"""Every loss and metric again, slow and plain: float64, loops, one equation number per line.

Rows only: logits are (N, K) nested sequences of floats, targets are class indices or rows of K label masses. Nothing
here is shared with the package.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from decimal import Context, Decimal, localcontext

from scipy.special import digamma

Row = Sequence[float]
Label = int | Row


def log_softmax(logits: Row) -> list[float]:
    largest = max(logits)
    log_sum = largest + math.log(sum(math.exp(x - largest) for x in logits))
    return [x - log_sum for x in logits]


def softmax(logits: Row) -> list[float]:
    return [math.exp(x) for x in log_softmax(logits)]


def label_mass(label: Label, num_classes: int) -> list[float]:
    if isinstance(label, int):
        return [1.0 if c == label else 0.0 for c in range(num_classes)]
    return [float(x) for x in label]


def soft_cross_entropy(soft_label: Row, logits: Row, class_weight: Row) -> float:
    """Eq. 1 with any label mass: -sum_c w_c t_c log p_c, where 0 * log 0 is 0."""
    log_p = log_softmax(logits)
    return -sum(w * t * lp for w, t, lp in zip(class_weight, soft_label, log_p, strict=True) if w * t != 0)


def even_shares(amount: float, logits: Row) -> list[float]:
    """An amount spread evenly over the classes that are possible, those of a logit above -inf."""
    possible = [x > -math.inf for x in logits]
    return [amount / sum(possible) if p else 0.0 for p in possible]


def mean_weight(label: Label, class_weight: Row) -> float:
    """What a row counts in torch's mean: the class weight of an index, 1 for class probabilities."""
    return class_weight[label] if isinstance(label, int) else 1.0


def order_statistics(uniforms: Row, count: int) -> list[float]:
    """The ``count`` ascending uniforms made of ``count + 1`` exponentials (sorted uniforms need no sort)."""
    exponentials = [-math.log(1.0 - u) for u in uniforms[: count + 1]]
    total = sum(exponentials)
    return [sum(exponentials[: i + 1]) / total for i in range(count)]


def beta_draws(uniforms: Row, confidence: Row | None, kept: Sequence[bool], concentration: float) -> list[float]:
    """Sec. 6: sorted Beta(a, 1) draws, handed out by confidence; rows that are not kept get none (0)."""
    if confidence is None:
        return [u ** (1.0 / concentration) for u in uniforms]
    rows = sorted((i for i in range(len(kept)) if kept[i]), key=lambda i: confidence[i])
    draws = [0.0] * len(kept)
    for row, u in zip(rows, sorted(uniforms[: len(rows)]), strict=True):
        draws[row] = u ** (1.0 / concentration)
    return draws


def beta_smoothing(logits: Row, label: Label, class_weight: Row, draw: float, alpha: float) -> float:
    k = len(logits)
    off = (
        (1 - alpha) * (1 - draw) / (k - 1) if k > 1 else 0.0
    )  # sec. 6 in Eq. 3: what every class but the true one gets
    even = even_shares(k * off, logits)
    soft = [e + (1 - k * off) * y_c for e, y_c in zip(even, label_mass(label, k), strict=True)]
    return soft_cross_entropy(soft, logits, class_weight)


def pruned_softmax(teacher: Row, temperature: float, prune: float) -> list[float]:
    """App. 9.7: softmax over the surest classes alone; of equal ones the first."""
    k = len(teacher)
    keep = k - int(prune * k + 1e-9)
    kept = sorted(range(k), key=lambda c: (-teacher[c], c))[:keep]
    probabilities = softmax([teacher[c] / temperature for c in kept])
    return [probabilities[kept.index(c)] if c in kept else 0.0 for c in range(k)]


def self_distillation(
    logits: Row,
    label: Label,
    class_weight: Row,
    teacher: Row,
    alpha: float,
    temperature: float,
    scale_student: bool = False,
    prune: float = 0.0,
) -> float:
    q = pruned_softmax(teacher, temperature, prune)
    hard = soft_cross_entropy(label_mass(label, len(logits)), logits, class_weight)  # Eq. 1
    if scale_student:  # App. 9.2, with the T^2 of Hinton et al.
        soft = temperature**2 * soft_cross_entropy(q, [x / temperature for x in logits], class_weight)
    else:
        soft = soft_cross_entropy(q, logits, class_weight)  # Eq. 2
    return alpha * hard + (1 - alpha) * soft  # Eq. 3


def strengths(teachers: Sequence[Row], kept: Sequence[bool], temperature: float, sample_weighting: str) -> list[float]:
    """The row weights s_i of Eq. 9."""
    if sample_weighting == "none":
        return [1.0] * len(teachers)
    if sample_weighting == "exact":
        return [sum(math.exp(f / temperature) for f in row) for row in teachers]
    values = []
    for row in teachers:
        log_q = log_softmax([f / temperature for f in row])
        possible = [f for f, lq in zip(row, log_q, strict=True) if lq > -87]  # the classes that have a probability
        centre = sum(possible) / len(possible)
        values.append(sum(math.exp((f - centre) / temperature) for f in row))
    mean = sum(v for v, k in zip(values, kept, strict=True) if k) / max(sum(kept), 1)
    return [v / mean if k else 0.0 for v, k in zip(values, kept, strict=True)]


def dirichlet_map(
    logits: Row,
    label: Label,
    class_weight: Row,
    teacher: Row,
    strength: float,
    beta: float,
    temperature: float,
    gamma: float,
) -> float:
    gammas = [gamma if x > -math.inf else min(gamma, 1.0) for x in logits]
    q = softmax([f / temperature for f in teacher])
    prior = [beta * strength * q_c + gamma_c for q_c, gamma_c in zip(q, gammas, strict=True)]  # Eq. 8 as in Eq. 9
    regulariser = [max(a - 1.0, 0.0) for a in prior]  # App. 9.7: negative coefficients prune
    counts = label_mass(label, len(logits))
    return soft_cross_entropy(counts, logits, class_weight) + soft_cross_entropy(  # Eq. 6
        regulariser, logits, class_weight
    )


def label_smoothing_map(logits: Row, label: Label, class_weight: Row, beta: float) -> float:
    k = len(logits)
    likelihood = soft_cross_entropy(label_mass(label, k), logits, class_weight)
    return likelihood + soft_cross_entropy(even_shares(beta, logits), logits, class_weight)  # Eq. 7


def confidence_penalty(logits: Row, label: Label, class_weight: Row, beta: float) -> float:
    y = label_mass(label, len(logits))
    log_p = log_softmax(logits)
    entropy = -sum(math.exp(lp) * lp for lp in log_p if lp > -math.inf)
    row_weight = sum(w * y_c for w, y_c in zip(class_weight, y, strict=True))
    return soft_cross_entropy(y, logits, class_weight) - beta * row_weight * entropy  # App. 9.1, L_PU per sample


def reduce(
    losses: Sequence[float],
    labels: Sequence[Label],
    class_weight: Row,
    sample_weight: Row,
    kept: Sequence[bool],
    reduction: str,
) -> list[float] | float:
    """torch's reductions over the kept rows, with row weights; nothing to learn from is 0."""
    rows = [s * x if k else 0.0 for x, s, k in zip(losses, sample_weight, kept, strict=True)]
    if reduction == "none":
        return rows
    if reduction == "sum":
        return sum(rows)
    weights = [
        s * mean_weight(label, class_weight) if k else 0.0
        for label, s, k in zip(labels, sample_weight, kept, strict=True)
    ]
    return sum(rows) / sum(weights) if sum(weights) else 0.0


def entropy(probabilities: Row) -> float:
    """Summand of Eq. 4."""
    return -sum(p * math.log(p) for p in probabilities if p > 0)


def true_class_probability(logits: Row, label: int) -> Decimal:
    """c of Eq. 5 to 400 digits, so that its distance from 1 is exact too."""
    with localcontext(Context(prec=400)):
        others = sum((Decimal(x) - Decimal(logits[label])).exp() for c, x in enumerate(logits) if c != label)
        return 1 / (1 + others)


def differential_entropy(values: Sequence[Decimal], k: int, weights: Sequence[float] | None = None) -> float:
    """Eq. 5 by the k-th nearest neighbour among distinct values; values that are mass fill the cells around them."""
    weights = [1.0] * len(values) if weights is None else weights
    total = sum(weights)
    distinct = sorted(set(values))
    repeats = [sum(v == d for v in values) for d in distinct]
    share = [sum(w for v, w in zip(values, weights, strict=True) if v == d) / total for d in distinct]
    if len(distinct) == 1:
        return math.log(2.0**-52)
    with localcontext(Context(prec=400)):
        gaps = [b - a for a, b in itertools.pairwise(distinct)]
        beside_repeats = [
            float(min(a, b) / max(a, b))
            for (a, b), m in zip(itertools.pairwise(gaps), repeats[1:-1], strict=True)
            if m > 1
        ]
        even = len(beside_repeats) >= 10 and sum(beside_repeats) / len(beside_repeats) > 2 / 3
        few = len(distinct) < 50 and len(values) >= 2 * len(distinct)
        mass = [even or few or m > 16 for m in repeats]
        if mass.count(False) <= k:
            mass = [True] * len(distinct)
        entropy = 0.0
        for i, v in enumerate(distinct):
            if mass[i]:
                below = gaps[i - 1] / 2 if i > 0 else min(gaps[0] / 2, v)
                above = gaps[i] / 2 if i < len(gaps) else min(gaps[-1] / 2, 1 - v)
                entropy += share[i] * (float((below + above).ln()) - math.log(share[i]))
        apart = [(v, s) for v, s, m in zip(distinct, share, mass, strict=True) if not m]
        reach = max(k, math.isqrt(len(apart)))
        for i, (v, s) in enumerate(apart):
            distances = sorted(abs(v - other) for j, (other, _) in enumerate(apart) if j != i)
            around = [apart[j][1] for j in range(len(apart)) if 0 < abs(j - i) <= reach]
            density = len(apart) * sum(around) / len(around)
            width = float((2 * distances[k - 1]).ln())
            entropy += s * (float(digamma(len(apart))) - float(digamma(k)) + width - math.log(density))
    return entropy


def reliability_bins(
    confidence: Row, correct: Sequence[bool], edges: Sequence[float], weights: Row | None = None
) -> list[tuple[float, float, float]]:
    """Weight, mean confidence and accuracy of the bins (lo, hi]; the first also holds its lower edge."""
    weights = [1] * len(confidence) if weights is None else weights
    bins = []
    for b, (lo, hi) in enumerate(itertools.pairwise(edges)):
        inside = [i for i, c in enumerate(confidence) if lo < c <= hi or (b == 0 and c <= lo)]
        n = sum(weights[i] for i in inside)
        mean = math.fsum(weights[i] * confidence[i] for i in inside) / n if n else math.nan
        bins.append((n, mean, sum(weights[i] * correct[i] for i in inside) / n if n else math.nan))
    return bins


def calibration_error(bins: Sequence[tuple[float, float, float]], norm: str) -> float:
    """Guo et al. (2017), Eq. 3 (l1) and Eq. 5 (max)."""
    total = sum(n for n, _, _ in bins)
    gaps = [(n / total, abs(accuracy - confidence)) for n, confidence, accuracy in bins if n]
    if norm == "l1":
        return sum(share * gap for share, gap in gaps)
    if norm == "l2":
        return math.sqrt(sum(share * gap**2 for share, gap in gaps))
    return max(gap for _, gap in gaps)


def spread_row(source: Row, label: Label, logits: Row) -> list[float]:
    """Where the amount goes: as the source says, among the possible classes other than the label."""
    others = [c for c, x in enumerate(logits) if x > -math.inf and (not isinstance(label, int) or c != label)]
    if not others:
        return [float(c == label) for c in range(len(logits))]
    total = sum(source[c] for c in others)
    return [(source[c] / total if total > 0 else 1.0 / len(others)) if c in others else 0.0 for c in range(len(logits))]


def beta_smoothing_spread(
    logits: Row, label: Label, class_weight: Row, draw: float, alpha: float, sources: Sequence[Row]
) -> float:
    """Sec. 6 with the mean of learned spreads in the place of the even one."""
    amount = (1 - alpha) * (1 - draw)
    spreads = [spread_row(source, label, logits) for source in sources]
    soft = [
        (1 - amount) * y_c + amount * sum(s[c] for s in spreads) / len(spreads)
        for c, y_c in enumerate(label_mass(label, len(logits)))
    ]
    return soft_cross_entropy(soft, logits, class_weight)


def neighbour_spread(logits: Sequence[Row], labels: Sequence[Label], counted: Sequence[bool]) -> list[list[float]]:
    """The labels of the other rows that count, by the softmax of cosines over 0.1."""
    centred = []
    for row in logits:
        log_q = log_softmax(row)
        possible = [lq > -87 for lq in log_q]
        mean = sum(x for x, p in zip(row, possible, strict=True) if p) / sum(possible)
        centred.append([x - mean if p else 0.0 for x, p in zip(row, possible, strict=True)])
    norms = [math.sqrt(sum(z * z for z in row)) or 1.0 for row in centred]
    result = []
    for i, row in enumerate(centred):
        others = [j for j in range(len(logits)) if j != i and counted[j]]
        weights = [
            math.exp(sum(a * b for a, b in zip(row, centred[j], strict=True)) / norms[i] / norms[j] / 0.1)
            for j in others
        ]
        spread = [0.0] * len(row)
        for j, weight in zip(others, weights, strict=True):
            for c, mass in enumerate(label_mass(labels[j], len(row))):
                spread[c] += weight / sum(weights) * mass
        result.append(spread)
    return result


class ClassProfiles:
    """Per class the mean of all rows seen, until the newest n would weigh less than 1 - 0.98^n."""

    def __init__(self, num_classes: int) -> None:
        self.rows = [[1.0 / num_classes] * num_classes for _ in range(num_classes)]
        self.counts = [0.0] * num_classes

    def record(self, predictions: Sequence[Row], labels: Sequence[Label], counted: Sequence[bool]) -> None:
        k = len(self.rows)
        masses = [label_mass(y, k) if c else [0.0] * k for y, c in zip(labels, counted, strict=True)]
        for label in range(k):
            n = sum(mass[label] for mass in masses)
            if n > 0:
                self.counts[label] += n
                step = max(n / self.counts[label], 1 - 0.98**n)
                means = [
                    sum(m[label] * p[c] for m, p, kept in zip(masses, predictions, counted, strict=True) if kept) / n
                    for c in range(k)
                ]
                self.rows[label] = [(1 - step) * a + step * b for a, b in zip(self.rows[label], means, strict=True)]


def top_k_share(
    values: Row, classes: Sequence[int], num_classes: int, log_normalizer: float | None, temperature: float
) -> tuple[list[float], float]:
    """What a recorded top says of every class, and what it leaves for those that it does not name."""
    q = [0.0] * num_classes
    known = softmax([v / temperature for v in values])
    for c, v, p in zip(classes, values, known, strict=True):
        q[c] += p if log_normalizer is None else math.exp(v / temperature - log_normalizer)
    return q, 0.0 if log_normalizer is None else 1.0 - sum(q)


def top_k_distillation(
    logits: Row,
    label: int,
    class_weight: Row,
    q: Row,
    named: Sequence[int],
    rest: float,
    tail: str,
    alpha: float,
) -> float:
    """Eq. 3 with a teacher's top: the rest goes evenly to the others, or they are one category."""
    others = [c for c, x in enumerate(logits) if c not in named and x > -math.inf]
    hard = soft_cross_entropy(label_mass(label, len(logits)), logits, class_weight)
    if tail == "uniform":
        soft = [q_c + (rest / len(others) if c in others else 0.0) for c, q_c in enumerate(q)]
        return alpha * hard + (1 - alpha) * soft_cross_entropy(soft, logits, class_weight)
    p = softmax(logits)
    bucket = -rest * math.log(sum(p[c] for c in others)) if rest > 0 else 0.0
    return alpha * hard + (1 - alpha) * (soft_cross_entropy(q, logits, class_weight) + bucket)
