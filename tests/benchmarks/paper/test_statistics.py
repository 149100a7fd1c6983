"""Intervals against scipy; verdicts on planted, null and reversed effects."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from benchmarks.paper.statistics import Claim, Identity, Part, mean_interval, seeds_to_decide, slope


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
    """5% of false contradictions over all parts, and far fewer of false confirmations, since all parts must hold."""
    generator = np.random.default_rng(parts)
    claims = [Claim("", "", [Part("", draws(0.0, 5, generator)) for _ in range(parts)]).verdict() for _ in range(800)]
    assert claims.count("contradicted") < 0.075 * len(claims)
    assert claims.count("holds") < 0.05 * len(claims)
    assert claims.count("undecided") > 0.88 * len(claims)


def test_a_claim_needs_every_part():
    good, none, bad = Part("", [1.0, 1.1, 0.9]), Part("", [1.0, -1.0, 0.1]), Part("", [-1.0, -1.1, -0.9])
    assert Claim("", "", [good, good]).verdict() == "holds"
    assert Claim("", "", [good, none]).verdict() == "undecided"
    assert Claim("", "", [good, none, bad]).verdict() == "contradicted"
    assert Claim("", "", []).verdict() == "undecided"
    assert Claim("", "", [Identity("", 1e-9, 1e-6)]).verdict() == "holds"
    assert Claim("", "", [Identity("", 1e-3, 1e-6), good]).verdict() == "contradicted"


def test_margin():
    slightly_worse = [-0.1, -0.12, -0.09]
    assert Part("", slightly_worse).verdict() == "contradicted"
    assert Part("", slightly_worse, margin=0.5).verdict() == "holds"
    assert Part("", [-2.0, -2.1, -1.9], margin=0.5).verdict() == "contradicted"


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
    n = seeds_to_decide(effect, 1.0)
    generator = np.random.default_rng(0)
    holds = [Part("", draws(effect, n, generator)).verdict() == "holds" for _ in range(500)]
    assert np.mean(holds) > 0.74
    if n > 6:
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
    wrong_way = Part("difference", [-1, -0.55, -1.3, -0.25, -0.9])  # clear alone, not among eight
    assert (wrong_way.verdict(), wrong_way.verdict(8)) == ("contradicted", "undecided")
    assert wrong_way.seeds(8) > wrong_way.seeds(1)
    half = float(wrong_way.describe(8).split("± ")[1].split()[0])
    assert -0.8 + half > 0  # the interval that is printed is the one that was used


def test_a_claim_whose_premise_fails_is_undecided():
    good, bad = Part("", [1.0, 1.1, 0.9]), Part("", [-1.0, -1.1, -0.9])
    assert Claim("", "", [good], premise=bad).verdict() == "undecided"
    assert Claim("", "", [bad], premise=good).verdict() == "contradicted"
