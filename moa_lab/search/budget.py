"""The fast solver behind the density slider: Lagrangian relaxation with a proven gap."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from moa_lab.plan import WHOLE_BITS, Bits, token_price, tokens_bought
from moa_lab.records import LossTable
from moa_lab.search.goals import Goal
from moa_lab.search.instance import Instance
from moa_lab.search.problem import (
    Density,
    InfeasibleError,
    Pinned,
    Usage,
    allowed_rules,
    check_feasible,
    densities,
    limit_lengths,
    terms,
)
from moa_lab.search.reduction import few_windows, weighted_cost
from moa_lab.search.relaxation import PricedRows, Relaxation, relative_gap, relax
from moa_lab.search.windows import windows_of

FILLED_SHARES = (1.0, 0.9, 0.8, 0.65, 0.5, 0.35)
"""Shares of the budget that are tried in turn where an engine fills up classes, which takes the rest."""


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


class BudgetSolver:
    """Solves any density for one table and goal; what does not depend on the density is prepared once."""

    def __init__(self, table: LossTable, goal: Goal | None = None, lengths: Iterable[int] | None = None) -> None:
        self.table = table
        self.lengths = limit_lengths(table, lengths)
        self._terms = terms(table, goal)
        self._usage = Usage(table, self.lengths)
        self._rows = PricedRows.of(self._terms, self._usage.usage)

    def solve(self, density: Density, pinned: Pinned | None = None, mix: Bits = WHOLE_BITS) -> BudgetAnswer:
        """The best plan found at `density`; a mapping limits its own lengths instead. `pinned`: {(layer, kv_head): rule index}. mix: the
        bits of K and V, which say how many tokens the bytes of that density hold. Where the table has an engine that holds few windows a
        model, these are chosen first, and the gap is to the bound without that limit.

        Raises InfeasibleError (a ValueError) naming the length that binds and the least feasible density there.
        """
        began = time.perf_counter()
        asked = densities(self.table, density, None if isinstance(density, Mapping) else self.lengths)
        targets = tokens_bought(asked, mix, self.table.geometry)
        known = tuple(targets) == self.lengths
        limits = (self._usage if known else Usage(self.table, targets)).limits(targets)
        check_feasible(self.table, limits, pinned, price=token_price(mix, self.table.geometry.head_dim))
        problem = Instance(
            self._terms, limits, (), allowed_rules(self.table, pinned), self.table.geometry.layers, None, windows_of(self.table, targets),
        )  # fmt: skip
        relaxed = relax(self._terms, limits, problem.allowed, rows=self._rows if known else None)
        best = _of_few_windows(problem, relaxed)
        if best is None:
            raise InfeasibleError(f"no plan found keeps density {density} at all of {limits.lengths}; raise density or drop a length")
        choice, value = best.reshape(self.table.geometry.layers, -1), self._terms.value(best)
        return BudgetAnswer(
            choice=choice, value=value, bound=relaxed.bound, gap=relative_gap(value, relaxed.bound),
            density={n: self.table.density(choice, n) for n in targets}, seconds=time.perf_counter() - began,
        )  # fmt: skip


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


def _of_few_windows(problem: Instance, relaxed: Relaxation) -> np.ndarray | None:
    """The relaxation's choice (heads,); where it has too many windows, the best choice of few that is found at its prices."""
    if problem.windows is None or (relaxed.choice is not None and problem.met_by(relaxed.choice)):
        return relaxed.choice
    cost, limits = weighted_cost(problem, relaxed), problem.limits
    for share in FILLED_SHARES if problem.windows.multiple > 1 else (1.0,):
        _, found = few_windows(problem, replace(limits, limit=share * limits.limit), relaxed.dual.multipliers, cost)
        if fitting := [choice for choice in found if problem.met_by(choice)]:
            return min(fitting, key=problem.goal.value)
    return None
