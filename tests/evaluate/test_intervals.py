"""95% intervals against published and computed values."""

import math

import numpy as np
import pytest
from scipy import stats

from moa_lab.evaluate.intervals import mean, mean_of_hit_differences, mean_share, proportion


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [
        # Newcombe (1998), Statistics in Medicine 17:857, table I, method 3 (score, no continuity correction).
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilsons_interval_equals_published_values(hits: int, n: int, low: float, high: float) -> None:
    found = proportion(hits, n)
    assert found.value == hits / n
    assert found.n == n
    assert (found.low, found.high) == (pytest.approx(low, abs=6e-5), pytest.approx(high, abs=6e-5))


@pytest.mark.parametrize(("hits", "n"), [(0, 1), (1, 1), (3, 7), (64, 64), (500, 1000)])
def test_wilsons_interval_equals_scipys_and_stays_inside_0_and_1(hits: int, n: int) -> None:
    expected = stats.binomtest(hits, n).proportion_ci(0.95, method="wilson")
    found = proportion(hits, n)
    assert (found.low, found.high) == (pytest.approx(expected.low, abs=1e-6), pytest.approx(expected.high, abs=1e-6))
    assert 0 <= found.low <= found.value <= found.high <= 1


def test_the_interval_of_a_mean_is_students() -> None:
    values = np.random.default_rng(0).normal(3, 2, 12)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    found = mean(list(values))
    assert (found.low, found.high) == (pytest.approx(expected.low), pytest.approx(expected.high))
    assert (found.value, found.n) == (pytest.approx(values.mean()), 12)


def test_of_one_observation_no_interval_is_known() -> None:
    assert mean([2.5]) == (2.5, 1, -math.inf, math.inf)
    assert mean([2.5]).mapped(math.exp) == (math.exp(2.5), 1, -math.inf, math.inf)
    assert mean_share([1.0]) == proportion(1, 1)


def test_hits_that_are_all_alike_still_have_an_interval() -> None:
    assert mean_share([1.0] * 4) == proportion(4, 4)
    assert mean_share([0.5, 1.0, 1.0]) == mean([0.5, 1.0, 1.0])
    bound = proportion(0, 2).high
    assert mean_of_hit_differences([0, 0]) == (0.0, 2, -bound, bound)
    assert mean_of_hit_differences([1, 1]) == (1.0, 2, 1 - 2 * bound, 1.0)
    assert mean_of_hit_differences([-1]) == (-1.0, 1, -1.0, -1 + 2 * proportion(0, 1).high)
    assert mean_of_hit_differences([1, 0, 0]) == mean([1, 0, 0])
    # Enough of them say that there is next to no difference.
    assert mean_of_hit_differences([0] * 512).high < 0.01


def test_no_observations_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one observation"):
        proportion(0, 0)
    with pytest.raises(ValueError, match="at least one observation"):
        mean([])
