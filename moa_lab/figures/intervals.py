"""Intervals in figures: error bars and text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from moa_lab.text import NO_INTERVAL, has_interval


class Bounds(Protocol):
    """A value with its 95% interval, for instance `evaluate.intervals.Interval` or a `Measurement`; unknown ends are infinite."""

    @property
    def value(self) -> float:
        """The value."""

    @property
    def low(self) -> float:
        """Lower end of the interval."""

    @property
    def high(self) -> float:
        """Upper end of the interval."""


def error_bars(found: Iterable[Bounds], scale: float = 1, **options: Any) -> dict[str, Any]:
    """Plotly error bars to the ends of intervals, times `scale`; none to an infinite end."""
    bounds = list(found)
    return {
        "type": "data", "symmetric": False,
        "array": [_finite(scale * (one.high - one.value)) for one in bounds],
        "arrayminus": [_finite(scale * (one.value - one.low)) for one in bounds],
        **options,
    }  # fmt: skip


def told(bounds: Bounds, show: Callable[[float], str] = "{:.3g}".format, between: str = " to ") -> str:
    """Both ends as text for a hover or a table, or `NO_INTERVAL`."""
    if not has_interval(bounds.low, bounds.high):
        return NO_INTERVAL
    return f"{show(bounds.low)}{between}{show(bounds.high)}"


def _finite(length: float) -> float | None:
    return length if math.isfinite(length) else None
