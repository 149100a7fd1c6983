"""Intervals against scipy; verdicts on planted, null and reversed effects."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from benchmarks.paper.statistics import Claim, Identity, Part, holm, mean_interval, seeds_to_decide, slope


def draws(mean, seeds, generator, deviation=1.0):
    return generator.normal(mean, deviation, seeds).tolist()


@pytest.mark.parametrize("confidence", [0.95, 0.99])
def test_interval_is_student_t(confidence):
    values = [97.1, 98.4, 96.9, 97.7]
    mean, half = mean_interval(values, confidence)
    low, high = stats.t.interval(confidence, 3, loc=np.mean(values), scale=stats.sem(values))
    assert (mean - half, mean + half) == (pytest.approx(low), pytest.approx(high))
    assert math.isnan(mean_interval([1.0])[1])
    assert all(map(math.isnan, mean_interval([1.0, math.nan])))


def test_slope_is_least_squares():
    x, y = [1.0, 2.0, 4.0, 8.0], [3.0, 1.0, 7.0, 8.0]
    assert slope(x, y) == pytest.approx(np.polyfit(x, y, 1)[0])


@pytest.mark.parametrize(("effect", "verdict"), [(2.0, "holds"), (-2.0, "contradicted")])
def test_planted_and_reversed_effects_are_found(effect, verdict):
    generator = np.random.default_rng(0)
    found = [Part("", draws(effect, 8, generator)).verdict() for _ in range(200)]
    assert found.count(verdict) > 190
    assert set(found) <= {verdict, "undecided"}


@pytest.mark.parametrize("parts", [1, 8])
def test_a_null_effect_is_seldom_called_anything(parts):
    """5% of false verdicts over all parts, and far fewer of false confirmations, since all parts must hold."""
    generator = np.random.default_rng(parts)
    claims = [Claim("", "", [Part("", draws(0.0, 8, generator)) for _ in range(parts)]) for _ in range(800)]
    wrong = [any(verdict != "undecided" for verdict in claim.verdicts()) for claim in claims]
    assert 0.02 < np.mean(wrong) < 0.075
    assert [claim.verdict() for claim in claims].count("holds") < 0.05 * len(claims)


def test_parts_are_adjusted_as_holm_says():
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert holm([0.04]) == [0.04]
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
    spread = [0.9, -1.2, 0.3, 1.5, -0.4, -0.8, 1.1, -1.4]
    parts = [Part("", [level + x for x in spread]) for level in (0.9, 1.0, 3.0, 0.1)]  # p = 0.048, 0.03, 0.0001, 0.8
    p_values = [stats.ttest_1samp(part.values, 0.0).pvalue for part in parts]
    assert [part.p_value() for part in parts] == pytest.approx(p_values)
    claim = Claim("", "", parts)
    for part, p, verdict, line in zip(parts, holm(p_values), claim.verdicts(), claim.describe(), strict=True):
        assert verdict == ("holds" if p < 0.05 else "undecided")
        assert (f"p = {p:.2g}: " if p >= 0.001 else "p < 0.001: ") + verdict in line
        assert f"{np.mean(part.values):+.3g}" in line
    alone = [part.verdict() for part in parts]
    assert alone.count("holds") > claim.verdicts().count("holds")  # or nothing would have been adjusted


def test_fewer_than_eight_seeds_decide_nothing():
    clear = [1.0, 1.1, 0.9, 1.05, 0.95, 1.0, 1.02, 0.99]
    assert Part("", clear).verdict() == "holds"
    assert Part("", [-value for value in clear]).verdict() == "contradicted"
    assert Part("", clear[:7]).verdict() == "undecided"
    assert "undecided, 8 seeds would decide" in Part("", clear[:7]).describe()


def parts():
    """Values that are clearly above 0, neither, and clearly below."""
    spread = [0.0, 0.1, -0.1, 0.05, -0.05, 0.02, -0.02, 0.01]
    return [Part("", [level + factor * x for x in spread]) for level, factor in ((1.0, 1.0), (0.03, 9.0), (-1.0, 1.0))]


def test_a_claim_needs_every_part():
    good, none, bad = parts()
    assert Claim("", "", [good, good]).verdict() == "holds"
    assert Claim("", "", [good, none]).verdict() == "undecided"
    assert Claim("", "", [good, none, bad]).verdict() == "contradicted"
    assert Claim("", "", []).verdict() == "undecided"
    assert Claim("", "", [Identity("", 1e-9, 1e-6)]).verdict() == "holds"
    assert Claim("", "", [Identity("", 1e-9, 1e-6), Identity("", 1e-3, 1e-6)]).verdict() == "contradicted"


def test_margin():
    slightly_worse = [-0.1, -0.12, -0.09, -0.11, -0.1, -0.13, -0.08, -0.1]
    assert Part("", slightly_worse).verdict() == "contradicted"
    assert Part("", slightly_worse, margin=0.5).verdict() == "holds"
    assert Part("", [value - 2.0 for value in slightly_worse], margin=0.5).verdict() == "contradicted"


@pytest.mark.parametrize(
    ("values", "hint"),
    [
        ([1.0], "one seed decides nothing"),
        ([0.5, 0.5], "the same for every seed"),
        ([97.1 - 97.0, 98.3 - 98.2, 0.1], "the same for every seed"),
        ([1.0, math.nan], "not finite"),
    ],
)
def test_what_cannot_be_decided_is_not(values, hint):
    part = Part("difference", values)
    assert part.verdict() == "undecided"
    assert hint in part.describe()


@pytest.mark.parametrize("effect", [0.3, 0.5, 1.0, 3.0])
def test_the_seeds_asked_for_decide(effect):
    """By simulation: that many seeds find an effect of this size in about 80% of cases, half as many do not."""
    n = max(seeds_to_decide(effect, 1.0), 8)
    generator = np.random.default_rng(0)
    holds = [Part("", draws(effect, n, generator)).verdict() == "holds" for _ in range(500)]
    assert np.mean(holds) > 0.74
    if n > 16:
        fewer = [Part("", draws(effect, n // 2, generator)).verdict() == "holds" for _ in range(500)]
        assert np.mean(fewer) < 0.7


def test_too_many_seeds_to_ask_for():
    assert seeds_to_decide(0.01, 1.0) is None
    assert seeds_to_decide(0.0, 1.0) is None
    assert seeds_to_decide(1000.0, 1.0) == 2
    assert "more than 1000 seeds" in Part("", [1.0, -1.0, 0.001]).describe()
    undecided = Part("difference", [0.5, -0.2, 0.4, 0.1])
    assert f"{undecided.seeds()} seeds would decide" in undecided.describe()
    assert undecided.seeds() > 4
    close = Part("difference", draws(0.4, 10, np.random.default_rng(0)))
    assert close.seeds(8) > close.seeds(1)


def test_a_claim_whose_premise_fails_is_undecided():
    good, _, bad = parts()
    assert Claim("", "", [good], premise=bad).verdict() == "undecided"
    assert Claim("", "", [bad], premise=good).verdict() == "contradicted"
