"""95% intervals of a mean."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

Z = 1.959964


class Interval(NamedTuple):
    """A mean, the number of observations, and the ends of its 95% interval; an unknown end is infinite."""

    value: float
    n: int
    low: float
    high: float

    def mapped(self, rising: Callable[[float], float]) -> Interval:
        """The interval of a rising function of the value; infinite ends stay infinite."""
        low, high = (rising(end) if math.isfinite(end) else end for end in (self.low, self.high))
        return Interval(rising(self.value), self.n, low, high)


def unknown(value: float, n: int = 1) -> Interval:
    """A value with an infinite interval, for instance of a single observation, which says nothing about the spread."""
    return Interval(value, n, -math.inf, math.inf)


def proportion(hits: float, n: int) -> Interval:
    """Share of hits with Wilson's score interval (Wilson, 1927), which stays inside [0, 1] and is right at 0 and 1."""
    if n < 1:
        raise ValueError("a proportion needs at least one observation")
    share = hits / n
    centre = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    # At shares of 0 and 1 one end equals the share; min and max remove rounding errors.
    return Interval(share, n, min(max(0.0, centre - half), share), max(min(1.0, centre + half), share))


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
