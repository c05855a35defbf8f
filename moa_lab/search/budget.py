"""The fast solver behind the density slider: Lagrangian relaxation with a proven gap."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from moa_lab.plan import WHOLE_BITS, Bits, token_price, tokens_bought
from moa_lab.records import LossTable
from moa_lab.search.cuts import polish
from moa_lab.search.goals import Goal
from moa_lab.search.lagrange import Dual, Relaxed, ascend, fit
from moa_lab.search.problem import (
    Density,
    InfeasibleError,
    Limits,
    Pinned,
    Terms,
    Usage,
    WorstTerm,
    allowed_rules,
    check_feasible,
    densities,
    limit_lengths,
    terms,
)

WORST_ROUNDS = 16
ANCHORS = 20
"""Densities, from 1 / ANCHORS to 1, at which the weights of worst terms are found from nothing; others start from the nearest's."""
ANCHORED_GAP = 0.01
"""A start from an anchor is left as soon as this gap is proven."""


@dataclass(frozen=True)
class BudgetAnswer:
    """A feasible choice (layers, kv_heads) with its goal value and the bound that no feasible choice can beat.

    `gap` is (value - bound) / value; `density` is what the choice keeps at every limit length.
    """

    choice: np.ndarray
    value: float
    bound: float
    gap: float
    density: dict[int, float]
    seconds: float


@dataclass(frozen=True)
class Relaxation:
    """The best feasible choice (heads,) if any, its value, the proven bound, and the dual that proves it, with its simplex
    weights over the rows of each worst term."""

    choice: np.ndarray | None
    value: float
    bound: float
    dual: Dual
    weights: list[np.ndarray]


class BudgetSolver:
    """Solves any density for one table and goal; what does not depend on the density is prepared once."""

    def __init__(self, table: LossTable, goal: Goal | None = None, lengths: Iterable[int] | None = None) -> None:
        self.table = table
        self.lengths = limit_lengths(table, lengths)
        self._terms = terms(table, goal)
        self._usage = Usage(table, self.lengths)
        self._anchors: dict[int, list[np.ndarray]] = {}

    def prepare(self) -> None:
        """Find all anchors now (some seconds for a large table whose goal has worst terms), not when the slider first comes near them."""
        for place in range(1, ANCHORS + 1 if self._terms.worst else 1):
            self._anchor(place / ANCHORS)

    def solve(self, density: Density, pinned: Pinned | None = None, mix: Bits = WHOLE_BITS) -> BudgetAnswer:
        """The best plan found at `density`; a mapping limits its own lengths instead. `pinned`: {(layer, kv_head): rule index}. mix: the
        bits of K and V, which say how many tokens the bytes of that density hold.

        Raises InfeasibleError (a ValueError) naming the length that binds and the least feasible density there.
        """
        began = time.perf_counter()
        asked = densities(self.table, density, None if isinstance(density, Mapping) else self.lengths)
        targets = tokens_bought(asked, mix, self.table.geometry)
        limits = (self._usage if tuple(targets) == self.lengths else Usage(self.table, targets)).limits(targets)
        check_feasible(self.table, limits, pinned, price=token_price(mix, self.table.geometry))
        start = self._anchor(max(targets.values())) if self._terms.worst else None
        found = relax(self._terms, limits, allowed_rules(self.table, pinned), start=start)
        if found.choice is None:
            raise InfeasibleError(f"no plan keeps density {density} at all of {limits.lengths} together; raise density or drop a length")
        choice = found.choice.reshape(self.table.geometry.layers, -1)
        return BudgetAnswer(
            choice=choice, value=found.value, bound=found.bound, gap=relative_gap(found.value, found.bound),
            density={n: self.table.density(choice, n) for n in targets}, seconds=time.perf_counter() - began,
        )  # fmt: skip

    def _anchor(self, density: float) -> list[np.ndarray] | None:
        """Weights of the anchor nearest to a density; None where nothing keeps it. The same whatever was solved before."""
        place = min(max(round(density * ANCHORS), 1), ANCHORS)
        if place not in self._anchors:
            targets = dict.fromkeys(self.lengths, place / ANCHORS)
            limits = self._usage.limits(targets)
            try:
                check_feasible(self.table, limits, None)
            except InfeasibleError:
                return None
            self._anchors[place] = relax(self._terms, limits, allowed_rules(self.table, None)).weights
        return self._anchors[place]


def solve_budget(
    table: LossTable, density: Density, *, goal: Goal | None = None, lengths: Iterable[int] | None = None, pinned: Pinned | None = None
) -> BudgetAnswer:
    """One solve of `BudgetSolver`: near-optimal for `goal` (None: the mean of the default goals), with a proven gap.

    The maximum in a worst_distance objective is replaced by simplex weights over its rows, moved towards the rows that bind.
    Any weights prove a bound, but the gap is wider than that of a linear goal.
    """
    if lengths is None and isinstance(density, Mapping):
        lengths = density
    return BudgetSolver(table, goal, lengths).solve(density, pinned)


def relative_gap(value: float, bound: float) -> float:
    """(value - bound) / value, at least 0; 0 when both are 0."""
    return max(value - bound, 0.0) / max(abs(value), 1e-9)


def relax(goal: Terms, limits: Limits, allowed: np.ndarray, effort: int = 1, start: list[np.ndarray] | None = None) -> Relaxation:
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
