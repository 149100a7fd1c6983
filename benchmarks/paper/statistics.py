"""Intervals and verdicts: every claim is decided by a test of values paired by seed, none by hand."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from scipy import stats

Verdict = Literal["holds", "contradicted", "undecided"]

CONFIDENCE = 0.95
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


def _simultaneous(parts: int) -> float:
    """Confidence at which each of several intervals must be taken for all to be right in 95% of cases."""
    return 1 - (1 - CONFIDENCE) / parts


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

    def verdict(self, parts: int = 1) -> Verdict:
        """Test the inequality.

        *holds*: the 95% interval of the mean lies above ``-margin``. *contradicted*: the interval of
        1 - 0.05 / ``parts`` lies below it, so that among the several parts of a claim chance contradicts one in at
        most 5% of cases. Values that are all the same have no interval and decide nothing.
        """
        mean, half = mean_interval(self.values)
        if self.all_the_same():
            return "undecided"
        wide = mean_interval(self.values, _simultaneous(parts))[1]
        if mean - half > -self.margin:
            return "holds"
        if mean + wide < -self.margin:
            return "contradicted"
        return "undecided"

    def all_the_same(self) -> bool:
        """Tell whether the values agree, which those of a metric with few digits may do by chance."""
        return len(self.values) > 1 and max(self.values) - min(self.values) <= 1e-9 * max(map(abs, self.values))

    def seeds(self, parts: int = 1) -> int | None:
        """Give the seeds that would decide (None: more than 1000, or nothing is known of the spread)."""
        mean = mean_interval(self.values)[0] + self.margin
        if len(self.values) == 1 or not math.isfinite(mean):
            return None
        needed = seeds_to_decide(mean, deviation(self.values), CONFIDENCE if mean > 0 else _simultaneous(parts))
        return None if needed is None else max(needed, len(self.values) + 1)

    def describe(self, parts: int = 1) -> str:
        """Say the mean, its interval and the verdict."""
        mean, half = mean_interval(self.values)
        if mean + half < -self.margin:
            half = mean_interval(self.values, _simultaneous(parts))[1]
        interval = "" if math.isnan(half) else f" ± {half:.2g}"
        margin = f" (no harm: above {-self.margin:g})" if self.margin else ""
        return f"{self.text}: {mean:+.3g}{interval} {self.unit}{margin}: {self.verdict(parts)}{self.hint(parts)}"

    def hint(self, parts: int = 1) -> str:
        """Say how many seeds would decide what is undecided."""
        if self.verdict(parts) != "undecided":
            return ""
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

    def verdict(self, parts: int = 1) -> Verdict:
        """Compare with the tolerance."""
        return "holds" if self.deviation <= self.tolerance else "contradicted"

    def describe(self, parts: int = 1) -> str:
        """Say the deviation, the tolerance and the verdict."""
        return f"{self.text}: off by {self.deviation:.1e} (tolerance {self.tolerance:g}): {self.verdict()}"


@dataclass(frozen=True)
class Claim:
    """A claim *holds* if all of its parts do, is *contradicted* if one of them is, and else is *undecided*.

    Where the ``premise`` does not hold, there is nothing to decide.
    """

    name: str
    text: str
    parts: list[Part | Identity]
    premise: Part | None = None

    def verdict(self) -> Verdict:
        """Decide the claim."""
        if self.premise is not None and self.premise.verdict() != "holds":
            return "undecided"
        verdicts = [part.verdict(len(self.parts)) for part in self.parts]
        if "contradicted" in verdicts:
            return "contradicted"
        return "holds" if verdicts and all(verdict == "holds" for verdict in verdicts) else "undecided"

    def describe(self) -> list[str]:
        """One line per part."""
        lines = [part.describe(len(self.parts)) for part in self.parts]
        return lines if self.premise is None else [f"premise: {self.premise.describe()}", *lines]
