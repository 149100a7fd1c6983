"""Conversions, both ways and against the paper's numbers."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softlabels import tuning


@given(e=st.floats(0, 0.999), k=st.integers(2, 10**6))
def test_smoothing_round_trips(e, k):
    assert tuning.label_smoothing_for(tuning.true_class_for(e, k), k) == pytest.approx(e, abs=1e-9)
    assert tuning.beta_to_smoothing(tuning.smoothing_to_beta(e)) == pytest.approx(e, abs=1e-12)


@given(alpha=st.floats(0, 0.9), share=st.floats(0.001, 0.999))
def test_concentration_gives_the_mean(alpha, share):
    true_class = alpha + (1 - alpha) * share
    a = tuning.beta_concentration(true_class, alpha)
    assert alpha + (1 - alpha) * a / (a + 1) == pytest.approx(true_class)


def test_paper_numbers():
    assert tuning.beta_concentration(0.85, alpha=0.4) == pytest.approx(3.0)
    assert tuning.beta_concentration(1.0, alpha=0.4) == math.inf
    assert tuning.label_smoothing_for(1.0, 10) == 0.0
    assert tuning.label_smoothing_for(0.1, 10) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tuning.beta_concentration(0.3, 0.4), "true_class must be greater than alpha=0.4"),
        (lambda: tuning.beta_concentration(1.2, 0.4), r"true_class must be in \[0, 1\], got 1.2"),
        (lambda: tuning.beta_concentration(0.9, 1.0), r"alpha must be in \[0, 1\), got 1.0"),
        (lambda: tuning.label_smoothing_for(0.05, 10), r"true_class must be in \[0.1, 1\], got 0.05"),
        (lambda: tuning.label_smoothing_for(0.5, 1), "num_classes must be an int of at least 2, got 1"),
        (lambda: tuning.true_class_for(0.1, 2.0), "num_classes must be an int of at least 1, got 2.0"),
        (lambda: tuning.smoothing_to_beta(1.0), r"label_smoothing must be in \[0, 1\), got 1.0"),
        (lambda: tuning.beta_to_smoothing(math.inf), r"beta must be in \[0, inf\), got inf"),
        (lambda: tuning.beta_to_smoothing(math.nan), r"beta must be in \[0, inf\), got nan"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
