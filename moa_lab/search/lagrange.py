"""Lagrangian relaxation of `min sum cost[h, x_h]` under K budget rows: a proven lower bound and a good feasible choice.

Pricing the budgets with multipliers lambda >= 0 makes the heads independent: every head takes the rule of the least
reduced cost `cost + lambda . usage`, and `g(lambda) = sum_h min_r reduced - lambda . limit` never exceeds the optimum.
g is concave but has kinks; its soft minimum (temperature tau) is smooth, so a few Newton steps per temperature climb it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

TEMPERATURES = 8
NEWTON_STEPS = 4
GAIN = 2e-4
MOVES = 2048
REPAIRS = 128
IMPROVEMENTS = 128


@dataclass(frozen=True)
class Dual:
    """Multipliers (K,) >= 0, the bound they prove, and the reduced cost of every choice (heads, R)."""

    multipliers: np.ndarray
    bound: float
    reduced: np.ndarray


def ascend(cost: np.ndarray, usage: np.ndarray, limit: np.ndarray, start: np.ndarray | None = None) -> Dual:
    """Maximise the dual bound. cost (heads, R), infinite where a rule is not allowed; usage (K, heads, R); limit (K,).

    `start`: multipliers of a problem nearby. The budget must be feasible, or the multipliers have no maximum.
    """
    relaxed = Relaxed(cost, usage, limit)
    free = relaxed.dual(np.zeros(len(limit)))
    if (relaxed.used(free.reduced) <= limit).all():
        return free
    best = relaxed.dual(_ray(relaxed, np.ones(len(limit)) if start is None or not start.any() else start))
    multipliers, tau = best.multipliers, _first_temperature(best.reduced)
    for _ in range(TEMPERATURES):
        before = best.bound
        multipliers, best = _climb(relaxed, multipliers, tau, best)
        if 0 < best.bound - before < GAIN * abs(best.bound):
            break
        tau *= 0.3
    return best


def fit(dual: Dual, cost: np.ndarray, usage: np.ndarray, limit: np.ndarray, slack: np.ndarray, effort: int = 1) -> list[np.ndarray]:
    """Feasible choices (heads,) near a dual: one filled up from just below the budget, one repaired from just above it.

    Greedy single-head moves: those nearest to optimal by reduced cost (more with more `effort`), all of them when these find
    no feasible choice. Empty when the limits cannot be met this way.
    """
    relaxed = Relaxed(cost, usage, limit)
    starts = _around(relaxed, dual.multipliers, limit + slack)
    excess = (dual.reduced - dual.reduced.min(axis=1, keepdims=True)).ravel()
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


def _around(relaxed: Relaxed, multipliers: np.ndarray, limit: np.ndarray) -> list[np.ndarray]:
    """The cheapest choices at the multipliers raised until they keep the limits, and those at the step before.

    Multipliers of 0 are raised as well, so that of rules of equal reduced cost the shorter ones win.
    """
    before: list[np.ndarray] = []
    common = max(float(multipliers.mean()), 1e-12)
    for raised in (0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 4.0, 32.0, 1e3, 1e6):
        choice = relaxed.reduced((1 + raised) * multipliers + raised * common).argmin(axis=1)
        if (relaxed.usage[:, np.arange(len(choice)), choice].sum(axis=1) <= limit).all():
            return [choice, *before]
        before = [choice]
    return before


class Relaxed:
    """The dual function of one problem."""

    def __init__(self, cost: np.ndarray, usage: np.ndarray, limit: np.ndarray) -> None:
        self.cost, self.usage, self.limit = cost, usage, limit
        self.flat = usage.reshape(len(usage), -1)
        self._heads = np.arange(len(cost))

    def reduced(self, multipliers: np.ndarray) -> np.ndarray:
        """Reduced cost of every choice (heads, R)."""
        return self.cost + (multipliers @ self.flat).reshape(self.cost.shape)

    def used(self, reduced: np.ndarray) -> np.ndarray:
        """What the cheapest choices use (K,)."""
        return self.usage[:, self._heads, reduced.argmin(axis=1)].sum(axis=1)

    def dual(self, multipliers: np.ndarray) -> Dual:
        """The bound that the multipliers prove."""
        reduced = self.reduced(multipliers)
        return self._proven(multipliers, reduced, reduced.min(axis=1))

    def _proven(self, multipliers: np.ndarray, reduced: np.ndarray, low: np.ndarray) -> Dual:
        paid = float(multipliers @ self.limit)
        # Large terms cancel here: subtracting the possible rounding error keeps the bound proven.
        rounding = 1e-14 * (float(np.abs(low).sum()) + paid)
        return Dual(multipliers, float(low.sum()) - paid - rounding, reduced)

    def soft(self, multipliers: np.ndarray, tau: float) -> tuple[float, np.ndarray, np.ndarray, Dual]:
        """Value, gradient and (negative) curvature of the softened dual, and the true dual at the same multipliers."""
        reduced = self.reduced(multipliers)
        low = reduced.min(axis=1)
        paid = float(multipliers @ self.limit)
        # Clipped, as subnormal exponentials are ten times slower; exp(-40) is negligible.
        share = np.exp(np.maximum((low[:, None] - reduced) / tau, -40.0))
        total = share.sum(axis=1)
        share /= total[:, None]
        shared = self.usage * share
        mean = np.einsum("khr->kh", shared)
        second = shared.reshape(self.flat.shape) @ self.flat.T
        value = float((low - tau * np.log(total)).sum()) - paid
        curvature = (second - mean @ mean.T) / tau
        return value, mean.sum(axis=1) - self.limit, curvature, self._proven(multipliers, reduced, low)


def _climb(relaxed: Relaxed, start: np.ndarray, tau: float, best: Dual) -> tuple[np.ndarray, Dual]:
    """Projected Newton steps at one temperature; a step that does not raise the softened bound is halved."""
    here = start
    value, gradient, curvature, dual = relaxed.soft(here, tau)
    best = max(best, dual, key=lambda d: d.bound)
    for _ in range(NEWTON_STEPS):
        step = _newton(here, gradient, curvature)
        if not step.any():
            break
        for scale in (1.0, 0.25, 0.0625):
            trial = np.maximum(here + scale * step, 0.0)
            found = relaxed.soft(trial, tau)
            best = max(best, found[3], key=lambda d: d.bound)
            if found[0] > value:
                break
        else:
            break
        gained = found[0] - value
        here, (value, gradient, curvature, _) = trial, found
        if gained < 1e-6 * abs(value):
            break
    return here, best


def _newton(here: np.ndarray, gradient: np.ndarray, curvature: np.ndarray) -> np.ndarray:
    """Newton direction in the multipliers that are positive or have a positive gradient."""
    step = np.zeros_like(here)
    free = (here > 0) | (gradient > 0)
    if free.any():
        block = curvature[np.ix_(free, free)]
        # Lengths with proportional spans make the curvature singular; a ridge, scaled per limit, bounds the step.
        ridge = 1e-6 * np.diag(block) + 1e-12
        step[free] = np.linalg.solve(block + np.diag(ridge), gradient[free])
    return step


def _ray(relaxed: Relaxed, direction: np.ndarray) -> np.ndarray:
    """The multiple of `direction` with the best bound, to some 20%: the bound is concave along a ray, so a hill climb finds it."""
    scale, best = 1.0, relaxed.dual(direction).bound
    factor = 16.0
    while factor > 1.2:
        for step in (factor, 1 / factor):
            while 1e-12 < scale < 1e9:
                bound = relaxed.dual(scale * step * direction).bound
                if bound <= best:
                    break
                scale, best = scale * step, bound
        factor **= 0.5
    return scale * direction


def _first_temperature(reduced: np.ndarray) -> float:
    """Ten times the typical lead of a head's best rule over its second: at this temperature most heads mix several rules."""
    if reduced.shape[1] < 2:
        return 1e-9
    two = np.partition(reduced, 1, axis=1)
    lead = two[:, 1] - two[:, 0]
    lead = lead[np.isfinite(lead) & (lead > 0)]
    return max(10 * float(np.median(lead)), 1e-12) if len(lead) else 1e-9


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
            price = np.where(relief > 0, np.maximum(self._cost - self._cost_now[self._heads], 0.0) / np.maximum(relief, 1e-300), np.inf)
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
