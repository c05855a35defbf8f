"""Paired comparisons: against the formulas by hand, and refused where samples are not the same."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from moa_lab.evaluate.compare import difference, excess_perplexity, ratio, row_of, share_of_the_way, spearman, worst
from moa_lab.evaluate.intervals import Interval
from moa_lab.records import Measurement


def row(plan: str, values: list[float], task: str = "needles", length: int = 2048, metric: str = "retrieval") -> Measurement:
    mean = float(np.mean(values))
    return Measurement(plan, metric, task, length, mean, len(values), mean, mean, 0.5, {"per_sample": values})


def test_a_difference_is_that_of_the_pairs_with_their_t_interval() -> None:
    ours, theirs = [0.9, 0.7, 0.8, 0.5], [0.8, 0.7, 0.6, 0.6]
    found = difference(row("a", ours), row("b", theirs))
    low, high = stats.t.interval(0.95, 3, loc=0.05, scale=stats.sem(np.subtract(ours, theirs)))
    assert found.value == pytest.approx(0.05)
    assert (found.low, found.high) == pytest.approx((low, high))


def test_pairs_decide_what_two_separate_intervals_cannot() -> None:
    base = list(np.linspace(0, 5, 30))
    found = difference(row("a", [value + 0.1 for value in base]), row("b", base))
    assert found.low > 0


def test_a_ratio_holds_the_ratio_of_means_inside_its_interval() -> None:
    rng = np.random.default_rng(0)
    dense = (rng.random(128) < 0.95).astype(float)
    ours = dense * (rng.random(128) < 0.9)
    found = ratio(row("a", list(ours)), row("b", list(dense)))
    assert found.value == pytest.approx(ours.mean() / dense.mean())
    assert found.low < found.value < found.high < 1.0
    assert ratio(row("a", [0, 0]), row("b", [0, 0])).value == 1.0
    assert math.isinf(ratio(row("a", [1, 1]), row("b", [0, 0])).value)
    rare = ratio(row("a", [1, 1, 1, 1]), row("b", [1, 0, 0, 0]))
    assert rare.value == 4.0
    assert rare.low <= 4.0 <= rare.high == math.inf


def test_the_share_of_a_way_has_the_interval_of_its_samples_and_no_way_is_never_short() -> None:
    dense, uniform, ours = row("dense", [1.0, 2.0, 3.0]), row("uniform", [2.0, 4.0, 3.5]), row("ours", [1.5, 2.5, 3.25])
    found = share_of_the_way(ours, dense, uniform)
    assert found.value == pytest.approx(1.25 / 3.5)
    assert found.low < found.value < found.high <= 0.5 + 1e-9
    assert math.isinf(share_of_the_way(ours, dense, dense).value)
    assert share_of_the_way(dense, dense, dense).value == 0.0
    assert share_of_the_way(row("better", [0.9, 1.9, 2.9]), dense, dense).value == 0.0


def test_the_worst_of_several_is_sure_only_where_all_are() -> None:
    near, wide = Interval(0.9, 40, 0.88, 0.92), Interval(0.95, 30, 0.8, 1.0)
    assert worst([near, wide]) == Interval(0.9, 30, 0.8, 0.92)
    assert worst([near, wide], at_most=True) == Interval(0.95, 30, 0.88, 1.0)


def test_excess_perplexity_is_the_exponential_of_the_difference_in_nats() -> None:
    found = excess_perplexity(row("a", [2.02, 3.02]), row("b", [2.0, 3.0]))
    assert found.value == pytest.approx(math.exp(0.02) - 1)


def test_a_rank_correlation_is_spearmans() -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal(40)
    y = x + rng.standard_normal(40)
    found = spearman(list(x), list(y))
    assert found.value == pytest.approx(stats.spearmanr(x, y).statistic)
    assert found.low < found.value < found.high
    assert spearman([1, 2, 3], [5, 5, 5]).value == 0.0
    with pytest.raises(ValueError, match="at least 3"):
        spearman([1, 2], [1, 2])


def test_rows_of_other_samples_and_rows_that_are_missing_are_refused() -> None:
    with pytest.raises(ValueError, match="same samples"):
        difference(row("a", [1.0, 2.0]), row("b", [1.0]))
    with pytest.raises(KeyError, match="not measured"):
        row_of([row("a", [1.0])], "b", "needles", 2048)
    assert row_of([row("a", [1.0])], "a", "needles", 2048, "retrieval").plan == "a"
