"""What a 95% interval is, and that of a share of hits; those that need scipy are in `moa_lab.evaluate.intervals`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

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


def proportion(hits: float, n: int, z: float = Z) -> Interval:
    """Share of hits with Wilson's score interval (Wilson, 1927), which stays inside [0, 1] and is right at 0 and 1.

    z: the normal quantile of the interval, 95% unless given.
    """
    if n < 1:
        raise ValueError("a proportion needs at least one observation")
    share = hits / n
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    # At shares of 0 and 1 one end equals the share; min and max remove rounding errors.
    return Interval(share, n, min(max(0.0, centre - half), share), max(min(1.0, centre + half), share))
