"""Two plans on the same samples: differences and ratios with 95% intervals, far narrower than those of either score alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from scipy.stats import rankdata

from moa_lab.evaluate.intervals import Interval, mean
from moa_lab.records import Measurement

RESAMPLES = 4000


def row_of(rows: Iterable[Measurement], plan: str, task: str, length: int, metric: str | None = None) -> Measurement:
    """The row of a plan. Raises KeyError where it was not measured."""
    for row in rows:
        if (row.plan, row.task, row.length) == (plan, task, length) and metric in (None, row.metric):
            return row
    raise KeyError(f"{plan}: {task} at {length} tokens was not measured")


def difference(row: Measurement, against: Measurement) -> Interval:
    """Mean difference of two rows over the samples they share, with Student's t interval of the pairs."""
    return mean([a - b for a, b in zip(*_pairs(row, against), strict=True)])


def ratio(row: Measurement, against: Measurement, seed: int = 0) -> Interval:
    """`row` over `against`, each a mean over the same samples; interval by bootstrap over the pairs (Efron, 1979; percentiles).

    1 where both are 0; infinite where only `against` is.
    """
    ours, theirs = (np.asarray(values, dtype=np.float64) for values in _pairs(row, against))
    picks = np.random.default_rng(seed).integers(len(ours), size=(RESAMPLES, len(ours)))
    drawn = [_divided(a, b) for a, b in zip(ours[picks].mean(axis=1), theirs[picks].mean(axis=1), strict=True)]
    # Draws themselves, not what lies between them: some may be infinite.
    low, high = np.quantile(drawn, (0.025, 0.975), method="inverted_cdf")
    return Interval(_divided(float(ours.mean()), float(theirs.mean())), len(ours), float(low), float(high))


def excess_perplexity(row: Measurement, dense: Measurement) -> Interval:
    """Perplexity of `row` over that of `dense`, less 1: `exp(mean difference of nats) - 1`, with its interval."""
    nats = difference(row, dense)
    return Interval(math.expm1(nats.value), nats.n, math.expm1(nats.low), math.expm1(nats.high))


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


def _spearman(x: np.ndarray, y: np.ndarray) -> float:
    a, b = rankdata(x), rankdata(y)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def _pairs(row: Measurement, against: Measurement) -> tuple[list[float], list[float]]:
    ours, theirs = (list(one.detail.get("per_sample", ())) for one in (row, against))
    if not ours or len(ours) != len(theirs):
        raise ValueError(f"{row.plan} and {against.plan} were not measured on the same samples of {row.task} at {row.length} tokens")
    return ours, theirs


def _divided(a: float, b: float) -> float:
    if b:
        return a / b
    return 1.0 if not a else math.inf
