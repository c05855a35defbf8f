"""95% intervals of a mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

Z = 1.959964


class Interval(NamedTuple):
    """A mean, the number of observations, and the ends of its 95% interval."""

    value: float
    n: int
    low: float
    high: float


def proportion(hits: int, n: int) -> Interval:
    """Share of hits with Wilson's score interval (Wilson, 1927), which stays inside [0, 1] and is right at 0 and 1."""
    if n < 1:
        raise ValueError("a proportion needs at least one observation")
    share = hits / n
    centre = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    # At 0 and 1 an end is the share itself, but for a rounding.
    return Interval(share, n, min(max(0.0, centre - half), share), max(min(1.0, centre + half), share))


def mean(values: Sequence[float]) -> Interval:
    """Mean with Student's t interval; with one observation the interval is the value itself."""
    n = len(values)
    if n < 1:
        raise ValueError("a mean needs at least one observation")
    centre = float(np.mean(values))
    if n == 1:
        return Interval(centre, 1, centre, centre)
    half = float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n))
    return Interval(centre, n, centre - half, centre + half)
