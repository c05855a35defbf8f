"""Lagrangian relaxation of a goal under limits: a proven bound, and a feasible choice near it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from moa_lab.search.cuts import polish
from moa_lab.search.exchange import exchange
from moa_lab.search.lagrange import Dual, Group, Relaxed, ascend
from moa_lab.search.problem import Limits, Terms
from moa_lab.search.repair import fit

CLOSE = 1e-4
"""As `GAP`, where the dual is polished afterwards."""
THOROUGH = 4
"""Effort of exchanges where no slider waits."""
STARTS = (1, 2, 4)
"""Efforts of the greedy moves whose choices are all exchanged then, as none is better in general."""


@dataclass(frozen=True)
class Relaxation:
    """The best feasible choice (heads,) if any, its value, the proven bound, and the dual that proves it (its multipliers are those of the
    limits), with its simplex weights over the rows of each worst term; and what was relaxed."""

    choice: np.ndarray | None
    value: float
    bound: float
    dual: Dual
    weights: list[np.ndarray]
    relaxed: Relaxed


def relative_gap(value: float, bound: float) -> float:
    """(value - bound) / value, at least 0; 0 when both are 0."""
    return max(value - bound, 0.0) / max(abs(value), 1e-9)


@dataclass(frozen=True)
class PricedRows:
    """What every choice adds to each row that has a multiplier, (heads, R, rows), in double and in single precision."""

    double: np.ndarray
    single: np.ndarray

    @classmethod
    def of(cls, goal: Terms, usage: np.ndarray) -> PricedRows:
        """The rows of `usage` (K, heads, R), then those of worst terms."""
        rows = np.ascontiguousarray(np.moveaxis(np.concatenate([usage, *(term.rows for term in goal.worst)]), 0, -1))
        return cls(rows, rows.astype(np.float32))


def relax(goal: Terms, limits: Limits, allowed: np.ndarray, effort: int = 1, rows: PricedRows | None = None) -> Relaxation:
    """Lower bound and feasible choice for a goal under limits; the rows of worst terms are priced as the limits are.

    With `effort` above 1 the dual is polished by cutting planes and more moves are tried for the choice. rows: those of the goal and of
    the limits, where they are known.
    """
    rows = rows or PricedRows.of(goal, limits.usage)
    first, groups = len(limits.limit), list[Group]()
    for term in goal.worst:
        groups.append((slice(first, first + len(term.rows)), term.weight))
        first += len(term.rows)
    limit = np.append(limits.limit, np.zeros(first - len(limits.limit)))
    relaxed = Relaxed(np.where(allowed, goal.linear, np.inf), rows.double, limit, groups)
    if effort == 1:
        # Single precision finds multipliers in half the time; the bound that they prove is worked out in double.
        single = Relaxed(relaxed.cost.astype(np.float32), rows.single, limit, groups)
        return _rounded(goal, limits, relaxed, relaxed.dual(ascend(single).multipliers), effort)
    dual = ascend(relaxed, CLOSE)
    found = _rounded(goal, limits, relaxed, dual, 1)
    if found.bound >= found.value:
        return found
    later = _rounded(goal, limits, relaxed, polish(relaxed, dual.multipliers), effort)
    return later if later.value <= found.value else replace(later, choice=found.choice, value=found.value)


def _rounded(goal: Terms, limits: Limits, relaxed: Relaxed, joint: Dual, effort: int) -> Relaxation:
    """The best feasible choice near a dual over all rows, by the goal's true value."""
    count = len(limits.limit)
    dual = Dual(joint.multipliers[:count], joint.bound, joint.reduced)
    weights = [joint.multipliers[members] / weight for members, weight in relaxed.groups]
    cost = dual.reduced - np.tensordot(dual.multipliers, limits.usage, axes=1)
    moved = STARTS if effort > 1 else (1,)
    choices = [choice for moves in moved for choice in fit(dual, cost, limits.usage, limits.limit, limits.slack, moves)]
    if effort == 1:
        choices = sorted(choices, key=goal.value)[:1]
    choices = [exchange(goal, limits, relaxed, dual, choice, 1 if effort == 1 else THOROUGH) for choice in choices]
    choice = min(choices, key=goal.value, default=None)
    value = np.inf if choice is None else goal.value(choice)
    # A bound above the value is rounding error.
    return Relaxation(choice, value, min(dual.bound, value), dual, weights, relaxed)


def weighted(goal: Terms, weights: list[np.ndarray]) -> np.ndarray | float:
    """The worst terms, each a weighted mean of its rows: (heads, R)."""
    return sum((term.weight * np.tensordot(w, term.rows, axes=1) for term, w in zip(goal.worst, weights, strict=True)), 0.0)
