"""Paired comparisons of two plans on the same samples: differences and ratios, whose 95% intervals are narrower than unpaired ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from scipy.optimize import brentq
from scipy.stats import rankdata

from moa_lab.evaluate.intervals import Interval, mean, mean_of_hit_differences, unknown
from moa_lab.records import Measurement
from moa_lab.records.intervals import Z

RESAMPLES = 4000
FARTHEST = 20.0
"""Logarithm of a share of hits beyond any that samples tell of."""


def row_of(rows: Iterable[Measurement], plan: str, task: str, length: int, metric: str | None = None) -> Measurement:
    """The row of a plan. Raises KeyError where it was not measured."""
    for row in rows:
        if (row.plan, row.task, row.length) == (plan, task, length) and metric in (None, row.metric):
            return row
    raise KeyError(f"{plan}: {task} at {length} tokens was not measured")


def difference(row: Measurement, against: Measurement) -> Interval:
    """Mean difference of two rows over the samples they share, with Student's t interval of the pairs."""
    ours, theirs = _pairs(row, against)
    of_hits = {*ours, *theirs} <= {0, 1}
    return (mean_of_hit_differences if of_hits else mean)([a - b for a, b in zip(ours, theirs, strict=True)])


def ratio(row: Measurement, against: Measurement, seed: int = 0) -> Interval:
    """`row` over `against`, each a mean over the same samples; interval by bootstrap over the pairs (Efron, 1979; percentiles).

    1 where both are 0; infinite where only `against` is.
    """
    return _ratio(*_pairs(row, against), seed, _divided)


def share_of_hits(row: Measurement, dense: Measurement) -> Interval:
    """Hits of `row` over those of `dense`, with a 95% interval that holds for few samples and for all or no hits.

    Of pairs: the score interval (Nam and Blackwelder, 2002), each end of which is too sure in some 2.5% of cases, also where the dense
    model misses nothing; without samples in common, the least that Wilson's intervals of both allow. Infinite where the dense model has
    none.
    """
    ours, theirs = (list(one.detail.get("per_sample", ())) for one in (row, dense))
    value = row.value / dense.value if dense.value else math.inf
    if not ours or len(ours) != len(theirs) or not {*ours, *theirs} <= {0, 1} or row.detail.get("samples") != dense.detail.get("samples"):
        return Interval(value, row.n, row.low / dense.high if dense.high else 0.0, row.high / dense.low if dense.low > 0 else math.inf)
    pairs = list(zip(ours, theirs, strict=True))
    counts = [sum(1 for pair in pairs if pair == kind) for kind in ((1, 1), (1, 0), (0, 1))]
    return Interval(value, len(ours), *_ends_of_share(*counts))


def _ends_of_share(both: int, ours: int, theirs: int) -> tuple[float, float]:
    """Ends of the 95% score interval of (both + ours) / (both + theirs), of pairs that hit both, ours alone and theirs alone."""
    first, second, some = both + ours, both + theirs, both + ours + theirs

    def off(logarithm: float, by: float) -> float:
        """Standard errors that the hits are off where the true share is of that logarithm, less `by`: it falls as the share grows."""
        share = math.exp(logarithm)
        gone = first - share * second
        if not gone:
            return -by
        # The likeliest chance of a hit of ours alone where that is the share, then of theirs; of pairs with any hit.
        linear = share**2 * (second + 2 * ours) - first
        root = math.sqrt(max(linear**2 + 4 * some * share**2 * (1 - share**2) * ours, 0.0))
        alone = min(max((linear + root) / (2 * some * share * (1 + share)), 1 - 1 / share, 0.0), share / (1 + share))
        other = max(1 - share + share * alone, 0.0)
        return gone / math.sqrt(some * share * (alone + other)) - by

    low = math.exp(brentq(off, -FARTHEST, FARTHEST, args=(Z,))) if first else 0.0
    high = math.exp(brentq(off, -FARTHEST, FARTHEST, args=(-Z,))) if second else math.inf
    return low, high


def share_of_the_way(row: Measurement, start: Measurement, end: Measurement, seed: int = 0) -> Interval:
    """How far `row` is from `start` (0) to `end` (1), as means over the same samples; interval as in `ratio`.

    Where `end` is not above `start`: 0 if `row` is not above it either, else infinite.
    """
    gone, way = ([a - b for a, b in zip(*_pairs(one, start), strict=True)] for one in (row, end))
    return _ratio(gone, way, seed, _along)


def worst(found: Iterable[Interval], at_most: bool = False) -> Interval:
    """For a goal that every length or task must meet: the worst value (at_most: the largest) and the worst of each interval end, so that
    it is decided only where all are. n is the smallest."""
    every, pick = list(found), max if at_most else min
    return Interval(
        pick(one.value for one in every), min(one.n for one in every), pick(one.low for one in every), pick(one.high for one in every)
    )


def excess_perplexity(row: Measurement, dense: Measurement) -> Interval:
    """Perplexity of `row` over that of `dense`, less 1: `exp(mean difference of nats) - 1`, with its interval."""
    return difference(row, dense).mapped(math.expm1)


def excess_over_dense(rows: Iterable[Measurement], plan: str, task: str, length: int) -> Interval:
    """`excess_perplexity` of a plan, against the row named dense. Raises KeyError where one of them was not measured."""
    rows = tuple(rows)
    ours, dense = (row_of(rows, name, task, length, "cross_entropy") for name in (plan, "dense"))
    return excess_perplexity(ours, dense)


def spearman(a: Sequence[float], b: Sequence[float], seed: int = 0) -> Interval:
    """Rank correlation with a bootstrap interval over the pairs; 0 where one side is constant."""
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if len(x) != len(y) or len(x) < 3:
        raise ValueError(f"a rank correlation needs two equally long lists of at least 3 numbers, got {len(x)} and {len(y)}")
    picks = np.random.default_rng(seed).integers(len(x), size=(RESAMPLES // 4, len(x)))
    low, high = np.quantile([_spearman(x[pick], y[pick]) for pick in picks], (0.025, 0.975))
    return Interval(_spearman(x, y), len(x), float(low), float(high))


def rank_agreement(a: np.ndarray, b: np.ndarray) -> Interval:
    """Rank correlation with the interval of Bonett and Wright (2000), at once also for thousands of pairs; 0 where one side is constant."""
    x, y = np.asarray(a, dtype=np.float64).ravel(), np.asarray(b, dtype=np.float64).ravel()
    if len(x) != len(y) or len(x) < 4:
        raise ValueError(f"a rank correlation needs two equally large sets of at least 4 numbers, got {len(x)} and {len(y)}")
    found = _spearman(x, y)
    middle, error = np.arctanh(np.clip(found, -1 + 1e-12, 1 - 1e-12)), 1.96 * np.sqrt((1 + found**2 / 2) / (len(x) - 3))
    return Interval(found, len(x), float(np.tanh(middle - error)), float(np.tanh(middle + error)))


def _spearman(x: np.ndarray, y: np.ndarray) -> float:
    a, b = rankdata(x), rankdata(y)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def answers_way(rows: Iterable[Measurement], plan: str, uniform: str, length: int) -> Interval:
    """How far a plan's own answers stand from the dense model's (0) to those under uniform windows (1); see `share_of_the_way`."""
    known = tuple(rows)
    ours, dense, far = (row_of(known, name, "summaries", length) for name in (plan, "dense", uniform))
    return share_of_the_way(ours, dense, far)


def _pairs(row: Measurement, against: Measurement) -> tuple[list[float], list[float]]:
    ours, theirs = (list(one.detail.get("per_sample", ())) for one in (row, against))
    which = {one.detail["samples"] for one in (row, against) if "samples" in one.detail}
    if not ours or len(ours) != len(theirs) or len(which) > 1:
        raise ValueError(f"{row.plan} and {against.plan} were not measured on the same samples of {row.task} at {row.length} tokens")
    return ours, theirs


def _ratio(ours: Sequence[float], theirs: Sequence[float], seed: int, divided: Callable[[float, float], float]) -> Interval:
    a, b = (np.asarray(values, dtype=np.float64) for values in (ours, theirs))
    value = divided(float(a.mean()), float(b.mean()))
    if len(a) < 2:
        return unknown(value)
    picks = np.random.default_rng(seed).integers(len(a), size=(RESAMPLES, len(a)))
    drawn = [divided(float(x), float(y)) for x, y in zip(a[picks].mean(axis=1), b[picks].mean(axis=1), strict=True)]
    # No interpolation between draws: some may be infinite.
    low, high = np.quantile(drawn, (0.025, 0.975), method="inverted_cdf")
    return Interval(value, len(a), float(low), float(high))


def _divided(a: float, b: float) -> float:
    if b:
        return a / b
    return 1.0 if not a else math.inf


def _along(gone: float, way: float) -> float:
    if way > 0:
        return gone / way
    return 0.0 if gone <= 0 else math.inf
