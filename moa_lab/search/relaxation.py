"""Lagrangian relaxation of a goal under limits: a proven bound, and a feasible choice near it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moa_lab.search.cuts import polish
from moa_lab.search.lagrange import Dual, Relaxed, ascend, fit
from moa_lab.search.problem import Limits, Terms, WorstTerm

WORST_ROUNDS = 16
ANCHORED_GAP = 0.01
"""A start from weights of a problem nearby is left as soon as this gap is proven."""


@dataclass(frozen=True)
class Relaxation:
    """The best feasible choice (heads,) if any, its value, the proven bound, and the dual that proves it, with its simplex
    weights over the rows of each worst term."""

    choice: np.ndarray | None
    value: float
    bound: float
    dual: Dual
    weights: list[np.ndarray]


def relative_gap(value: float, bound: float) -> float:
    """(value - bound) / value, at least 0; 0 when both are 0."""
    return max(value - bound, 0.0) / max(abs(value), 1e-9)


def relax(
    goal: Terms, limits: Limits, allowed: np.ndarray, effort: int = 1, *, start: list[np.ndarray] | None = None
) -> Relaxation:  # fmt: skip
    """Lower bound and feasible choice for a goal under limits; worst terms by multiplicative weights over their rows.

    With `effort` above 1 the dual is polished by cutting planes and more moves are tried for the choice. start: weights of a problem
    nearby, from which a gap of `ANCHORED_GAP` is enough.
    """
    weights = start or [np.full(len(term.rows), 1.0 / len(term.rows)) for term in goal.worst]
    enough = 1e-6 if start is None else ANCHORED_GAP
    best: Relaxation | None = None
    prices: np.ndarray | None = None
    for turn in range(WORST_ROUNDS if goal.worst else 1):
        cost = np.where(allowed, goal.linear + weighted(goal, weights), np.inf)
        dual = ascend(cost, limits.usage, limits.limit, prices)
        prices = dual.multipliers
        best = _better(best, _round(goal, limits, cost, dual, effort), dual, weights)
        if best.bound >= best.value * (1 - enough):
            break
        weights = [_towards(term, w, dual, turn) for term, w in zip(goal.worst, weights, strict=True)]
    assert best is not None
    return _polished(goal, limits, allowed, best, effort) if effort > 1 and best.bound < best.value else best


def _polished(goal: Terms, limits: Limits, allowed: np.ndarray, known: Relaxation, effort: int) -> Relaxation:
    """The relaxation with its dual maximised over multipliers and row weights, and the choice rounded from there."""
    rows, groups, start = [limits.usage], [], [known.dual.multipliers]
    first = len(limits.usage)
    for term, w in zip(goal.worst, known.weights, strict=True):
        rows.append(term.rows)
        groups.append((slice(first, first + len(w)), term.weight))
        start.append(term.weight * w)
        first += len(w)
    cost = np.where(allowed, goal.linear, np.inf)
    limit = np.concatenate([limits.limit, np.zeros(first - len(limits.limit))])
    joint = polish(Relaxed(cost, np.concatenate(rows), limit), np.concatenate(start), groups)
    prices = joint.multipliers[: len(limits.limit)]
    dual = Dual(prices, joint.bound, joint.reduced)
    found = [joint.multipliers[members] / weight for members, weight in groups]
    priced = np.where(allowed, goal.linear + weighted(goal, found), np.inf)
    return _better(known, _round(goal, limits, priced, dual, effort), dual, found)


def _round(goal: Terms, limits: Limits, cost: np.ndarray, dual: Dual, effort: int) -> tuple[np.ndarray, float] | None:
    """The best feasible choice near the dual, by the goal's true value."""
    found = [(choice, goal.value(choice)) for choice in fit(dual, cost, limits.usage, limits.limit, limits.slack, effort)]
    return min(found, key=lambda pair: pair[1]) if found else None


def _better(best: Relaxation | None, found: tuple[np.ndarray, float] | None, dual: Dual, weights: list[np.ndarray]) -> Relaxation:
    choice, value = found if found is not None else (None, np.inf)
    if best is not None and best.value <= value:
        choice, value = best.choice, best.value
    # The best bound and the best choice may come from different rounds; a bound above the value is rounding error.
    if best is not None and best.dual.bound >= dual.bound:
        dual, weights = best.dual, best.weights
    return Relaxation(choice, value, min(dual.bound, value), dual, weights)


def weighted(goal: Terms, weights: list[np.ndarray]) -> np.ndarray | float:
    """The worst terms, each a weighted mean of its rows: (heads, R)."""
    return sum((term.weight * np.tensordot(w, term.rows, axes=1) for term, w in zip(goal.worst, weights, strict=True)), 0.0)


def _towards(term: WorstTerm, weights: np.ndarray, dual: Dual, turn: int) -> np.ndarray:
    sums = term.sums(dual.reduced.argmin(axis=1))
    lead = (sums - sums.max()) / max(float(sums.max()), 1e-300)
    moved = weights * np.exp(2.0 * lead / np.sqrt(turn + 1.0))
    return moved / moved.sum()
