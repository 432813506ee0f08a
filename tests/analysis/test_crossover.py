import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from effvit.analysis.crossover import efficiency_length, slope_interval


@given(st.floats(0.5, 3.0), st.floats(0.1, 2.0), st.floats(8.0, 64000.0), st.integers(2, 8))
def test_crossover_of_two_power_laws_is_the_closed_form(slower, difference, crossing, points):
    tokens = np.geomspace(64, 16384, points)
    length = efficiency_length(tokens, (tokens / crossing) ** slower, (tokens / crossing) ** (slower + difference))
    if crossing >= 16384 * (1 + 1e-9):
        assert length is None
    elif crossing < 16384 * (1 - 1e-9):
        assert length == pytest.approx(max(crossing, 64), rel=1e-6)


def test_length_counts_from_the_last_crossing():
    assert efficiency_length([1, 2, 4, 8], [1, 4, 1, 1], [2, 2, 2, 2]) == pytest.approx(np.sqrt(8))


def test_a_tie_is_not_below_the_baseline():
    assert efficiency_length([64, 256], [1, 1], [1, 1]) is None
    assert efficiency_length([64, 256], [1, 1], [1, 2]) == pytest.approx(64)


def test_always_cheaper_pays_off_from_the_first_measured_length_on():
    assert efficiency_length([64, 256], [1, 1], [2, 2]) == 64


def test_a_stopped_baseline_is_beaten_from_the_next_measured_length_on():
    assert efficiency_length([64, 256, 1024], [3, 3, 3], [1, 2, np.inf]) == 1024


def test_a_stopped_mechanism_does_not_stay_below():
    assert efficiency_length([64, 256, 1024], [1, 1, np.inf], [2, 2, 2]) is None
    assert efficiency_length([64, 256], [1, np.inf], [2, np.inf]) is None


@given(st.floats(-3, 3), st.floats(1e-6, 1e6), st.integers(2, 10))
def test_slope_of_a_power_law_is_its_exponent(p, a, points):
    tokens = np.geomspace(64, 4096, points)
    slope, low, high = slope_interval(tokens, a * tokens**p)
    assert slope == pytest.approx(p, abs=1e-8)
    assert (low, high) == (None, None) if points == 2 else (low, high) == pytest.approx((p, p), abs=1e-4)


@given(st.integers(0, 99), st.integers(3, 9))
def test_the_interval_of_a_slope_is_students_about_the_least_squares_line(seed, points):
    tokens = np.geomspace(64, 4096, points)
    cost = tokens**1.5 * np.random.default_rng(seed).lognormal(0, 0.2, points)
    # another way to the same: the covariance of a polynomial fit, scaled by the residuals
    (p, _), covariance = np.polyfit(np.log(tokens), np.log(cost), 1, cov="unscaled")
    residuals = np.log(cost) - np.polyval(np.polyfit(np.log(tokens), np.log(cost), 1), np.log(tokens))
    half = stats.t(points - 2).isf(0.025) * np.sqrt(covariance[0, 0] * residuals @ residuals / (points - 2))
    assert slope_interval(tokens, cost) == pytest.approx((p, p - half, p + half), rel=1e-6)


@pytest.mark.parametrize("tokens", [[], [2, 1], [1, 1], [0, 1], [1, np.nan], [1, np.inf]])
def test_lengths_that_do_not_increase_are_refused(tokens):
    cost = [1.0] * len(tokens)
    with pytest.raises(ValueError, match=r"vectors|must"):
        efficiency_length(tokens, cost, cost)
    with pytest.raises(ValueError, match=r"vectors|must"):
        slope_interval(tokens, cost)


def test_slope_needs_two_points():
    with pytest.raises(ValueError, match="at least two"):
        slope_interval([64], [1.0])
