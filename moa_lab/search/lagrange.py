"""Lagrangian relaxation of `min sum cost[h, x_h]` under budget rows: a proven lower bound.

Pricing the budgets with multipliers lambda >= 0 makes the heads independent: every head takes the rule of the least
reduced cost `cost + lambda . usage`, and `g(lambda) = sum_h min_r reduced - lambda . limit` never exceeds the optimum.
A worst term, `weight * max_i rows_i`, is priced alike: its rows are rows of limit 0, whose multipliers sum to the weight.
g is concave but has kinks; its soft minimum (temperature tau) is smooth, and Newton steps climb it while tau falls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.sparse import csr_array

STEPS = 20
"""Newton steps at most."""
HOT = 0.1
"""The first temperature at most, as a share of the bound per head."""
COOLED = 0.3
"""Factor of the temperature after a step that was not cut short."""
BARRIER = 5.0
"""Weight of the logarithms that keep multipliers above 0, in temperatures."""
WIDE = 4.0
"""Curvature is that at a temperature so many times higher, where more than the two best rules of a head count."""
REACH = 10.0
"""Rules behind the best one by so many temperatures are left out: exp(-10) is negligible."""
MANY = 4000
"""Where more rules than that count, the curvature is that of every second head, every third, and so on."""
GAP = 6e-3
"""Gap of the shared choice at which the ascent ends."""

Group = tuple[slice, float]
"""Multipliers that must sum to a weight: the rows of one worst term."""


@dataclass(frozen=True)
class Dual:
    """Multipliers (K,) >= 0, the bound they prove, and the reduced cost of every choice (heads, R)."""

    multipliers: np.ndarray
    bound: float
    reduced: np.ndarray

    @cached_property
    def lead(self) -> np.ndarray:
        """By how much every choice costs more than its head's cheapest (heads, R)."""
        return np.asarray(self.reduced - self.reduced.min(axis=1, keepdims=True))


class Relaxed:
    """The dual function of one problem. cost (heads, R), infinite where a rule is not allowed; rows (heads, R, K), what every choice adds
    to each row; limit (K,); groups: see `Group`."""

    def __init__(self, cost: np.ndarray, rows: np.ndarray, limit: np.ndarray, groups: Sequence[Group] = ()) -> None:
        self.cost, self.rows, self.limit, self.groups = cost, np.ascontiguousarray(rows), limit, groups
        self.flat = self.rows.reshape(-1, rows.shape[-1])
        self._heads = np.arange(len(cost))

    def reduced(self, multipliers: np.ndarray) -> np.ndarray:
        """Reduced cost of every choice (heads, R)."""
        # Head by head: one product of all rows goes to several threads, which wait for each other where another process holds a core.
        return self.cost + self.rows @ multipliers.astype(self.rows.dtype)

    def shared(self, shares: np.ndarray) -> np.ndarray:
        """What shares of all choices (heads, R) add to each row (K,)."""
        return np.asarray((shares[:, None] @ self.rows).sum(axis=0)[0])

    def used(self, reduced: np.ndarray) -> np.ndarray:
        """What the cheapest choices add to each row (K,)."""
        return self.rows[self._heads, reduced.argmin(axis=1)].sum(axis=0)

    def dual(self, multipliers: np.ndarray) -> Dual:
        """The bound that the multipliers prove."""
        reduced = self.reduced(multipliers)
        return self._proven(multipliers, reduced, reduced.min(axis=1))

    def _proven(self, multipliers: np.ndarray, reduced: np.ndarray, low: np.ndarray) -> Dual:
        paid = float(multipliers @ self.limit)
        # Large terms cancel here: subtracting the possible rounding error keeps the bound proven.
        rounding = 1e-14 * (float(np.abs(low).sum()) + paid)
        return Dual(multipliers, float(low.sum()) - paid - rounding, reduced)


def ascend(relaxed: Relaxed, gap: float = GAP) -> Dual:
    """Maximise the dual bound, until the gap of the shared choice (see `_Soft`) is below `gap`, relatively.

    The limits must be feasible, or the multipliers have no maximum.
    """
    best = relaxed.dual(_free(relaxed))
    if not relaxed.groups and (relaxed.used(best.reduced) <= relaxed.limit).all():
        return best
    here = relaxed.dual(_start(relaxed, best))
    best = max(best, here, key=lambda dual: dual.bound)
    tau = _first_temperature(here)
    slack = BARRIER * tau / here.multipliers
    for _ in range(STEPS):
        soft = _Soft(relaxed, here, tau)
        if soft.gap < gap * abs(here.bound):
            break
        step, change = _newton(soft, slack)
        here, share = _moved(soft, step)
        best = max(best, here, key=lambda dual: dual.bound)
        # A step that was cut short was not in the range where the softened dual is nearly quadratic.
        tau *= COOLED if share >= 0.5 else 0.8 if share >= 0.1 else 1.5
        slack = slack + _longest(slack, change) * change
        slack = np.clip(slack, 0.01 * BARRIER * tau / here.multipliers, 100.0 * BARRIER * tau / here.multipliers)
    return best


class _Soft:
    """The softened dual at the multipliers of `dual`, plus `BARRIER` tau times the sum of their logarithms.

    gap: how far the shared choice, of every head's softmin, is from proving the bound: what it costs more, the limits that it exceeds or
    leaves unused, at their price, and the rows of worst terms that stay behind the highest.
    """

    def __init__(self, relaxed: Relaxed, dual: Dual, tau: float) -> None:
        self.relaxed, self.dual, self.tau = relaxed, dual, tau
        entries = np.flatnonzero(dual.lead < REACH * tau)
        heads = entries // dual.lead.shape[1]
        first = np.searchsorted(heads, np.arange(len(dual.lead) + 1))
        lead = dual.lead.ravel()[entries] / tau
        share, total = _softmin(lead, first)
        self.value = _value(dual, total, tau)
        # A product with all rows is faster than with many that are picked.
        shares = np.zeros(dual.lead.shape, dtype=relaxed.rows.dtype)
        shares.ravel()[entries] = share
        self.gradient = relaxed.shared(shares) - relaxed.limit
        self.gap = tau * float(share @ lead) + _unbalanced(relaxed, dual.multipliers, self.gradient)
        every = 1 + len(entries) // MANY
        picked = np.flatnonzero(heads % every == 0)
        first = np.append(0, np.cumsum(np.diff(first)[::every]))
        rows = relaxed.flat.take(entries[picked], axis=0)
        self.curvature = every / (WIDE * tau) * _covariance(rows, lead[picked] / WIDE, first)


def _covariance(rows: np.ndarray, lead: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Of `rows` (entries, K) under the softmin of each head, summed over heads; overwrites them."""
    share, _ = _softmin(lead, first)
    mean = csr_array((share, np.arange(len(share)), first)) @ rows
    rows *= np.sqrt(share)[:, None]
    return np.asarray(rows.T @ rows - mean.T @ mean)


def _unbalanced(relaxed: Relaxed, multipliers: np.ndarray, gradient: np.ndarray) -> float:
    """The parts of the gap that belong to rows."""
    each = multipliers * np.abs(gradient)
    for members, _ in relaxed.groups:
        each[members] = multipliers[members] * (gradient[members].max() - gradient[members])
    return float(each.sum())


def _softmin(lead: np.ndarray, first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shares of the entries of each head, which begin at `first`, the last of which is their number; and the sums of exponentials by which
    they were divided."""
    share = np.exp(-lead)
    total = np.add.reduceat(share, first[:-1])
    return share / np.repeat(total, np.diff(first)), total


def _value(dual: Dual, total: np.ndarray, tau: float) -> float:
    """The softened dual with its barrier."""
    return dual.bound - tau * float(np.log(total).sum()) + BARRIER * tau * float(np.log(dual.multipliers).sum())


def _softened(dual: Dual, tau: float) -> float:
    """The softened dual with its barrier."""
    entries = np.flatnonzero(dual.lead < REACH * tau)
    first = np.searchsorted(entries, dual.lead.shape[1] * np.arange(len(dual.lead)))
    return _value(dual, np.add.reduceat(np.exp(-dual.lead.ravel()[entries] / tau), first), tau)


def _newton(soft: _Soft, slack: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Primal-dual Newton steps (K,) of the multipliers, whose groups keep their sums, and of their slacks, which the barrier pulls to
    `BARRIER` tau / multiplier (Wright, Primal-dual interior-point methods, 1997)."""
    here, target = soft.dual.multipliers, BARRIER * soft.tau / soft.dual.multipliers
    # Lengths with proportional spans make the curvature singular; a ridge, scaled per row, bounds the step.
    ridge = 1e-9 * np.diag(soft.curvature) + np.maximum(slack, 0.1 * target) / here
    sums = np.zeros((len(here), len(soft.relaxed.groups)))
    for group, (members, _) in enumerate(soft.relaxed.groups):
        sums[members, group] = 1.0
    solved = np.linalg.solve(soft.curvature + np.diag(ridge), np.column_stack([soft.gradient + target, sums]))
    step, along = solved[:, 0], solved[:, 1:]
    if len(sums[0]):
        step = step - along @ np.linalg.solve(sums.T @ along, sums.T @ step)
    return step, target - slack - slack / here * step


def _moved(soft: _Soft, step: np.ndarray) -> tuple[Dual, float]:
    """The dual after a share of a step, and that share: the largest that keeps multipliers above 0, none growing more than fourfold, and
    does not lower the softened dual."""
    here = soft.dual.multipliers
    share = min(_longest(here, step), 3.0 / max(float((step / here).max()), 3.0))
    for _ in range(5):
        found = soft.relaxed.dual(here + share * step)
        if _softened(found, soft.tau) >= soft.value - 1e-12 * abs(soft.value):
            break
        share *= 0.25
    return found, share


def _longest(here: np.ndarray, step: np.ndarray) -> float:
    """The share of a step, at most 1, that takes no component nearer to 0 than a twentieth of it."""
    return min(1.0, 0.95 / max(float((-step / here).max()), 0.95))


def _free(relaxed: Relaxed) -> np.ndarray:
    """Multipliers of 0, and equal ones in every group."""
    multipliers = np.zeros(len(relaxed.limit))
    for members, weight in relaxed.groups:
        multipliers[members] = weight / len(multipliers[members])
    return multipliers


def _start(relaxed: Relaxed, free: Dual) -> np.ndarray:
    """The multipliers of `free`, but for the limits the multiple of 1 with the best bound."""
    priced = free.multipliers == 0
    limits = Relaxed(free.reduced, relaxed.rows[..., priced], relaxed.limit[priced])
    return np.where(priced, _ray(limits, np.ones(len(limits.limit)))[0], free.multipliers)


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


def _first_temperature(dual: Dual) -> float:
    """Ten times the typical lead of a head's best rule over its second, at which most heads mix several rules; at most `HOT` of the bound
    per head."""
    if dual.reduced.shape[1] < 2:
        return 1e-9
    two = np.partition(dual.reduced, 1, axis=1)
    lead = two[:, 1] - two[:, 0]
    lead = lead[np.isfinite(lead) & (lead > 0)]
    most = HOT * dual.bound / len(dual.reduced) if dual.bound > 0 else np.inf
    return float(np.clip(10 * np.median(lead), 1e-12, most)) if len(lead) else 1e-9
