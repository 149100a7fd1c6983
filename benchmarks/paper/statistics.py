"""Intervals and verdicts: every claim is decided by a test of values paired by seed, none by hand."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from scipy import stats

Verdict = Literal["holds", "contradicted", "undecided"]

CONFIDENCE = 0.95
LEAST_SEEDS = 8  # fewer decide nothing: their spread is a guess, and another machine gives another
POWER = 0.8  # probability with which the number of seeds that is asked for would decide
MOST_SEEDS = 1000


def mean_interval(values: list[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Mean, and half-width of its two-sided interval by Student's t (nan for one value)."""
    n = len(values)
    if not all(math.isfinite(value) for value in values):
        return math.nan, math.nan
    mean = math.fsum(values) / n
    if n == 1:
        return mean, math.nan
    return mean, float(stats.t.ppf((1 + confidence) / 2, n - 1)) * deviation(values) / math.sqrt(n)


def deviation(values: list[float]) -> float:
    """Standard deviation, with n - 1."""
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def holm(p_values: list[float]) -> list[float]:
    """Adjust the p-values of several tests (Holm, 1979), so that any is below 0.05 by chance in at most 5% of cases."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, largest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(order):
        largest = max(largest, min((len(p_values) - place) * p_values[index], 1.0))
        adjusted[index] = largest
    return adjusted


def slope(x: list[float], y: list[float]) -> float:
    """Slope of the least-squares line."""
    mean_x, mean_y = math.fsum(x) / len(x), math.fsum(y) / len(y)
    products = math.fsum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return products / math.fsum((a - mean_x) ** 2 for a in x)


def seeds_to_decide(mean: float, spread: float, confidence: float = CONFIDENCE) -> int | None:
    """Seeds with which a two-sided t-test would find ``mean`` with 80% probability; None: more than 1000."""

    def power(n: int) -> float:
        critical = stats.t.ppf((1 + confidence) / 2, n - 1)
        return float(stats.nct.sf(critical, n - 1, abs(mean) / spread * math.sqrt(n)))

    if spread == 0:
        return 2 if mean else None
    low, high = 1, 2
    while not power(high) >= POWER:  # scipy's noncentral t gives nan far out, which is no power
        if abs(mean) / spread * math.sqrt(high) > 30:  # where the power is 1
            break
        low, high = high, 2 * high
        if high > 2 * MOST_SEEDS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle) >= POWER else (middle, high)
    return high if high <= MOST_SEEDS else None


@dataclass(frozen=True)
class Part:
    """One inequality of a claim: the mean of ``values`` over seeds is more than ``-margin``.

    Args:
        text: What is compared, as a difference or slope that the claim says is positive.
        values: One value per seed.
        unit: Of the values.
        margin: 0, or how much worse still counts as no harm.
    """

    text: str
    values: list[float]
    unit: str = "points"
    margin: float = 0.0

    def p_value(self) -> float:
        """Two-sided t-test of a mean of ``-margin``; 1 where one value, or all the same, says nothing."""
        n, mean = len(self.values), mean_interval(self.values)[0] + self.margin
        if n == 1 or not math.isfinite(mean) or self.all_the_same():
            return 1.0
        return float(2 * stats.t.sf(abs(mean) / deviation(self.values) * math.sqrt(n), n - 1))

    def verdict(self, p: float | None = None) -> Verdict:
        """Test the inequality.

        *holds*: the mean is above ``-margin``, and ``p``, by default the p-value of this part alone, is below 0.05.
        *contradicted*: it is below, with such a ``p``. Fewer than 8 seeds decide nothing.
        """
        p = self.p_value() if p is None else p
        if len(self.values) < LEAST_SEEDS or not p < 1 - CONFIDENCE:
            return "undecided"
        return "holds" if mean_interval(self.values)[0] > -self.margin else "contradicted"

    def all_the_same(self) -> bool:
        """Tell whether the values agree, which those of a metric with few digits may do by chance."""
        return len(self.values) > 1 and max(self.values) - min(self.values) <= 1e-9 * max(map(abs, self.values))

    def seeds(self, parts: int = 1) -> int | None:
        """Give the seeds that would decide one of so many parts (None: more than 1000, or nothing is known)."""
        mean = mean_interval(self.values)[0] + self.margin
        if len(self.values) == 1 or not math.isfinite(mean):
            return None
        needed = seeds_to_decide(mean, deviation(self.values), 1 - (1 - CONFIDENCE) / parts)
        return None if needed is None else max(needed, len(self.values) + 1, LEAST_SEEDS)

    def describe(self, p: float | None = None, parts: int = 1) -> str:
        """Say the mean, its 95% interval, ``p`` and the verdict."""
        p = self.p_value() if p is None else p
        mean, half = mean_interval(self.values)
        interval = "" if math.isnan(half) else f" ± {half:.2g}"
        margin = f" (no harm: above {-self.margin:g})" if self.margin else ""
        level = "p < 0.001" if p < 0.001 else f"p = {p:.2g}"
        verdict = self.verdict(p)
        hint = self.hint(parts) if verdict == "undecided" else ""
        return f"{self.text}: {mean:+.3g}{interval} {self.unit}{margin}, {level}: {verdict}{hint}"

    def hint(self, parts: int = 1) -> str:
        """Say how many seeds would decide what is undecided."""
        if not all(math.isfinite(value) for value in self.values):
            return ", since a value is not finite"
        if len(self.values) == 1:
            return ", one seed decides nothing"
        if self.all_the_same():
            return ", the same for every seed"
        seeds = self.seeds(parts)
        return f", {seeds} seeds would decide" if seeds else f", more than {MOST_SEEDS} seeds would be needed"


@dataclass(frozen=True)
class Identity:
    """A part that is exact: the deviation is rounding, or the identity is false."""

    text: str
    deviation: float
    tolerance: float

    def verdict(self) -> Verdict:
        """Compare with the tolerance."""
        return "holds" if self.deviation <= self.tolerance else "contradicted"

    def describe(self) -> str:
        """Say the deviation, the tolerance and the verdict."""
        return f"{self.text}: off by {self.deviation:.1e} (tolerance {self.tolerance:g}): {self.verdict()}"


@dataclass(frozen=True)
class Claim:
    """A claim *holds* if all of its parts do, is *contradicted* if one of them is, and else is *undecided*.

    Its parts are several tests, and their p-values are adjusted for that. Where the ``premise`` does not hold, there is
    nothing to decide.
    """

    name: str
    text: str
    parts: list[Part] | list[Identity]
    premise: Part | None = None

    def verdict(self) -> Verdict:
        """Decide the claim."""
        if self.premise is not None and self.premise.verdict() != "holds":
            return "undecided"
        verdicts = self.verdicts()
        if "contradicted" in verdicts:
            return "contradicted"
        return "holds" if verdicts and all(verdict == "holds" for verdict in verdicts) else "undecided"

    def verdicts(self) -> list[Verdict]:
        """Decide each part."""
        return [part.verdict(*p) for part, *p in self._tests()]

    def describe(self) -> list[str]:
        """One line per part."""
        lines = [part.describe(*p, *([len(self.parts)] if p else [])) for part, *p in self._tests()]
        return lines if self.premise is None else [f"premise: {self.premise.describe()}", *lines]

    def _tests(self) -> list[tuple[Any, ...]]:
        """Each part with its adjusted p-value, if it is a test."""
        if any(isinstance(part, Identity) for part in self.parts):
            return [(part,) for part in self.parts]
        return list(zip(self.parts, holm([part.p_value() for part in self.parts]), strict=True))
