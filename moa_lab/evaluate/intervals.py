"""95% intervals of a mean."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from moa_lab.records.intervals import Interval, proportion, unknown


def mean(values: Sequence[float]) -> Interval:
    """Mean with Student's t interval; its ends are infinite for a single observation.

    Equal observations give an interval of width 0. That is wrong for hits and shares, which may be equal by chance: use `mean_share`
    or `mean_of_hit_differences` for those.
    """
    n = len(values)
    if n < 1:
        raise ValueError("a mean needs at least one observation")
    centre = float(np.mean(values))
    if n == 1:
        return unknown(centre)
    half = float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n))
    return Interval(centre, n, centre - half, centre + half)


def mean_share(values: Sequence[float]) -> Interval:
    """Mean of values in [0, 1] with Student's t interval; Wilson's where all are equal, since a share varies no more than a hit."""
    return proportion(sum(values), len(values)) if values and len(set(values)) == 1 else mean(values)


def mean_of_hit_differences(values: Sequence[float]) -> Interval:
    """Mean of differences of paired hits, each -1, 0 or 1, with Student's t interval.

    Where all are equal, the share of pairs that may differ is at most Wilson's bound for 0 of n; each is off by at most 1 (from 0) or
    2 (from -1 or 1).
    """
    if not values or len(set(values)) > 1:
        return mean(values)
    value, n = float(values[0]), len(values)
    others = proportion(0, n).high
    if value:
        reach = 2 * others
        return Interval(value, n, value - reach, value) if value > 0 else Interval(value, n, value, value + reach)
    return Interval(value, n, -others, others)
