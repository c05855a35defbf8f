"""The (head, rule) entries that the exact program needs: the relaxation's bound, dominance and shared rules exclude others."""

from __future__ import annotations

import numpy as np

from moa_lab.search.cuts import polish
from moa_lab.search.instance import Instance, with_caps
from moa_lab.search.lagrange import Dual
from moa_lab.search.layers import EXACT, LayerRelaxed, rule_excess, rules_of_layers
from moa_lab.search.problem import Limits
from moa_lab.search.relaxation import Relaxation, relax, weighted
from moa_lab.search.windows import best_classes

CORE_PER_HEAD = 2
PRICES = (0.97, 1.0, 1.03, 1.1, 1.25, 1.6, 2.5, 8.0, 64.0, 1e4)
"""Multiples of a dual's multipliers at which shared rules are chosen: at the highest the shortest rules win."""
ENOUGH = 5
"""Choices of shared rules that are worked out."""


def promising(relaxed: Relaxation, heads: int) -> np.ndarray:
    """The entries of least reduced-cost excess, `CORE_PER_HEAD` per head on average, every head's best among them."""
    excess = relaxed.dual.lead
    return excess <= np.partition(excess, CORE_PER_HEAD * heads, axis=None)[CORE_PER_HEAD * heads]


def few_rules(problem: Instance, limits: Limits, relaxed: Relaxation, ceiling: float) -> tuple[Dual, list[np.ndarray]]:
    """With few rules per layer: the best dual, and feasible choices within each layer's best rules at multiples of its multipliers."""
    most = problem.max_rules or 1
    cost = weighted_cost(problem, relaxed)
    rows = np.moveaxis(limits.usage, 0, -1)
    dual = polish(LayerRelaxed(cost, rows, limits.limit, problem.layers, most), relaxed.dual.multipliers, ceiling)
    found: list[np.ndarray] = []
    heads = len(cost) // problem.layers
    for price in PRICES:
        # Every limit gets a price above 0, so that at the highest price the shortest rules win.
        priced = cost + np.tensordot(price * (dual.multipliers + 1e-9), limits.usage, axes=1)
        kept = np.repeat(rules_of_layers(priced.reshape(problem.layers, heads, -1), most), heads, axis=0)
        found += _within(problem, limits, problem.allowed & kept)
        if len(found) == ENOUGH:
            break
    return dual, found


def few_windows(problem: Instance, limits: Limits, multipliers: np.ndarray, cost: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """With few windows in the model: entries of promising classes, bool (heads, R), and choices within the best classes at multiples of
    the dual's `multipliers` (limits,). cost: (heads, R) as of `weighted_cost`."""
    windows = problem.windows
    assert windows is not None
    tried = np.zeros(windows.count, dtype=bool)
    found: dict[bytes, list[np.ndarray]] = {}
    for price in PRICES:
        priced = cost + np.tensordot(price * (multipliers + 1e-9), limits.usage, axes=1)
        kept = best_classes(windows, priced)
        tried |= kept
        if kept.tobytes() not in found:
            found[kept.tobytes()] = _within(problem, limits, problem.allowed & kept[windows.classes])
        if sum(map(len, found.values())) == ENOUGH:
            break
    return problem.allowed & tried[windows.classes], [choice for some in found.values() for choice in some]


def _within(problem: Instance, limits: Limits, allowed: np.ndarray) -> list[np.ndarray]:
    """The relaxation's choice among the entries `allowed`; empty where these exceed a limit."""
    least = np.where(allowed, limits.usage, np.inf).min(axis=2).sum(axis=1)
    if (least > limits.limit + limits.slack).any():
        return []
    choice = relax(problem.goal, limits, allowed).choice
    return [] if choice is None else [choice]


def weighted_cost(problem: Instance, relaxed: Relaxation) -> np.ndarray:
    """The goal's cost (heads, R) with worst rows weighted as in the relaxation; infinite where a rule is not allowed."""
    return np.where(problem.allowed, problem.goal.linear + weighted(problem.goal, relaxed.weights), np.inf)


def worth_keeping(problem: Instance, relaxed: Relaxation, shared: Dual | None, value: float) -> np.ndarray:
    """Boolean (heads, R): entries that some choice no worse than the known `value` may still need."""
    keep = problem.allowed.copy()
    most = value * (1 + 1e-9) + 1e-12
    if np.isfinite(value):
        keep &= relaxed.dual.bound + relaxed.dual.lead <= most
    if problem.max_rules is None and problem.windows is None:
        return keep & ~_dominated(problem, keep)
    # A dominated rule may still be the one that a layer or the model shares.
    if problem.max_rules is not None and np.isfinite(value) and shared is not None and problem.max_rules <= EXACT:
        priced = weighted_cost(problem, relaxed) + np.tensordot(shared.multipliers, with_caps(problem).usage, axes=1)
        heads = len(keep) // problem.layers
        fits = shared.bound + rule_excess(priced.reshape(problem.layers, heads, -1), problem.max_rules) <= most
        keep &= np.repeat(fits, heads, axis=0)
    return keep


def _dominated(problem: Instance, keep: np.ndarray) -> np.ndarray:
    """Entries for which the same head has another kept rule that is no worse in every cost and limit row."""
    goals = (problem.goal, *(cap.terms for cap in problem.caps))
    rows = [*problem.limits.usage, *(goal.linear for goal in goals), *(row for goal in goals for term in goal.worst for row in term.rows)]
    stacked = np.stack(rows)
    beaten = np.zeros_like(keep)
    for rule in range(keep.shape[1]):
        other = stacked[:, :, rule, None]
        no_worse = (other <= stacked).all(axis=0)
        better = (other < stacked).any(axis=0)
        # Of equal rules the first stays.
        better |= np.arange(keep.shape[1])[None, :] > rule
        beaten |= no_worse & better & (keep & ~beaten)[:, rule, None]
    return beaten
