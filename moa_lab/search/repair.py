"""Feasible choices near a dual: greedy moves of single heads."""

from __future__ import annotations

import numpy as np

from moa_lab.search.lagrange import Dual

MOVES = 2048
REPAIRS = 128
IMPROVEMENTS = 128


def fit(dual: Dual, cost: np.ndarray, usage: np.ndarray, limit: np.ndarray, slack: np.ndarray, effort: int = 1) -> list[np.ndarray]:
    """Feasible choices (heads,) near a dual: one filled up from just below the budget, one repaired from just above it.

    Greedy single-head moves: those nearest to optimal by reduced cost (more with more `effort`), all of them when these find
    no feasible choice. Empty when the limits cannot be met this way.
    """
    starts = _around(dual, usage, limit + slack)
    excess = dual.lead.ravel()
    moves = effort * MOVES
    near = np.argpartition(excess, moves)[:moves] if excess.size > moves else np.arange(excess.size)
    found = []
    everything = np.flatnonzero(np.isfinite(cost))
    # Repairs may get stuck where limits conflict: as a last resort start from the shortest rules.
    shortest = np.where(np.isfinite(cost), usage.max(axis=0), np.inf).argmin(axis=1)
    for entries, around in ((near, starts), (everything, starts), (everything, [shortest])):
        for start in around:
            moved = _Moves(entries, start, cost, usage, limit, slack)
            if moved.repair(effort * REPAIRS):
                moved.improve(effort * IMPROVEMENTS)
                found.append(moved.choice)
        if found:
            break
    return found


def _around(dual: Dual, usage: np.ndarray, limit: np.ndarray) -> list[np.ndarray]:
    """The cheapest choices at the multipliers raised until they keep the limits, and those at the step before.

    Multipliers of 0 are raised as well, so that of rules of equal reduced cost the shorter ones win.
    """
    before: list[np.ndarray] = []
    heads = np.arange(usage.shape[1])
    common = max(float(dual.multipliers.mean()), 1e-12)
    dearer = np.tensordot(dual.multipliers + common, usage, axes=1)
    for raised in (0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 4.0, 32.0, 1e3, 1e6):
        choice = (dual.reduced + raised * dearer).argmin(axis=1)
        if (usage[:, heads, choice].sum(axis=1) <= limit).all():
            return [choice, *before]
        before = [choice]
    return before


class _Moves:
    """Greedy single-head moves towards (head, rule) entries, given by their flat index."""

    def __init__(
        self, entries: np.ndarray, choice: np.ndarray, cost: np.ndarray, usage: np.ndarray, limit: np.ndarray, slack: np.ndarray
    ) -> None:
        self.choice = choice.copy()
        self._limit, self._slack = limit, slack
        self._heads, self._rules = np.divmod(entries, cost.shape[1])
        self._cost, self._usage = cost[self._heads, self._rules], usage[:, self._heads, self._rules]
        index = np.arange(len(choice))
        self._cost_now, self._usage_now = cost[index, choice], usage[:, index, choice]

    def repair(self, steps: int) -> bool:
        for _ in range(steps):
            over = np.maximum(self._usage_now.sum(axis=1) - self._limit - self._slack, 0.0)
            if not over.any():
                return True
            change = self._usage - self._usage_now[:, self._heads]
            # Relief beyond what is needed does not count; exceeding another limit counts against a move.
            room = self._limit + self._slack - self._usage_now.sum(axis=1)
            relief = (over[:, None] - np.maximum(change - room[:, None], 0.0)).sum(axis=0)
            price = np.full(relief.shape, np.inf)
            np.divide(np.maximum(self._cost - self._cost_now[self._heads], 0.0), relief, out=price, where=relief > 0)
            # Of moves that cost nothing, the one with the most relief: ties cannot loop.
            best = int(np.lexsort((-relief, price))[0]) if (price == 0).any() else int(price.argmin())
            if not np.isfinite(price[best]):
                return False
            self._take(best)
        return False

    def improve(self, steps: int) -> None:
        for _ in range(steps):
            room = self._limit + self._slack - self._usage_now.sum(axis=1)
            change = self._usage - self._usage_now[:, self._heads]
            gain = np.where((change <= room[:, None]).all(axis=0), self._cost_now[self._heads] - self._cost, 0.0)
            best = int(gain.argmax())
            if gain[best] <= 1e-15:
                return
            self._take(best)

    def _take(self, entry: int) -> None:
        head = self._heads[entry]
        self.choice[head] = self._rules[entry]
        self._cost_now[head] = self._cost[entry]
        self._usage_now[:, head] = self._usage[:, entry]
