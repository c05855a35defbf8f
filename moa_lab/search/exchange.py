"""A choice improved by the goal's true value: one or two heads at a time take other rules, which keeps a tight budget and balances the rows
of worst terms."""

from __future__ import annotations

import numpy as np

from moa_lab.search.lagrange import Dual, Relaxed
from moa_lab.search.problem import Limits, Terms

ENTRIES = 64
"""Changes that are tried alone and in pairs."""
EXCHANGES = 16


def exchange(goal: Terms, limits: Limits, relaxed: Relaxed, dual: Dual, choice: np.ndarray, effort: int = 1) -> np.ndarray:
    """A choice (heads,) that keeps the limits, as the given one does, and is no worse: the best exchange, again and again, up to
    `EXCHANGES` times `effort`.

    relaxed and dual: over the limits, then the rows of the worst terms.
    """
    lead, rules, count = dual.lead.ravel(), dual.lead.shape[1], len(limits.limit)
    begin = rules * np.arange(len(choice))
    entries = _entries(lead, begin, begin + choice, effort * ENTRIES)
    heads = entries // rules
    first, second = _pairs(heads)
    choice, value = choice.copy(), goal.value(choice)
    costs, weights = goal.linear.ravel(), np.array([weight for _, weight in relaxed.groups])
    for _ in range(effort * EXCHANGES):
        own = begin + choice
        total = relaxed.flat[own].sum(axis=0)
        # The last change is none, so that its pairs are changes of one head.
        more = np.append(lead[entries] - lead[own[heads]], 0.0)
        linear = np.append(costs[entries] - costs[own[heads]], 0.0)
        rows = np.append(relaxed.flat[entries] - relaxed.flat[own[heads]], np.zeros((1, len(total))), axis=0).T
        highest = [members.start + int(total[members].argmax()) for members, _ in relaxed.groups]
        now = linear + weights @ rows[highest]
        # A choice costs the bound and its heads' leads at least, and no less than the rows that are highest now make it.
        fits = np.flatnonzero((more[first] + more[second] < value - dual.bound - lead[own].sum()) & (now[first] + now[second] < 0))
        one, two = first[fits], second[fits]
        used = total[:count, None] + rows[:count, one] + rows[:count, two]
        fits = (used <= (limits.limit + limits.slack)[:, None]).all(axis=0)
        one, two = one[fits], two[fits]
        if not len(one):
            break
        values = costs[own].sum() + linear[one] + linear[two]
        for members, weight in relaxed.groups:
            values += weight * (total[members, None] + rows[members][:, one] + rows[members][:, two]).max(axis=0)
        best = int(values.argmin())
        if values[best] >= value - 1e-12 * abs(value):
            break
        for entry in (one[best], two[best]):
            if entry < len(entries):
                choice[heads[entry]] = entries[entry] % rules
        value = values[best]
    return choice


def _entries(lead: np.ndarray, begin: np.ndarray, own: np.ndarray, count: int) -> np.ndarray:
    """Flat indices of `count` entries of the smallest lead that are not their head's best; of their heads also the best and its own."""
    rules = len(lead) // len(begin)
    best = begin + lead.reshape(-1, rules).argmin(axis=1)
    others = lead.copy()
    others[best] = np.inf
    near = np.argpartition(others, count)[:count] if count < len(others) else np.arange(len(others))
    near = np.concatenate([near[np.isfinite(others[near])], own[own != best]])
    return np.unique(np.append(near, best[near // rules]))


def _pairs(heads: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of all pairs of changes of different heads, and of every change with the one behind the last, which is none."""
    first, second = np.triu_indices(len(heads) + 1, 1)
    apart = np.append(heads, -1)
    return tuple(index[apart[first] != apart[second]] for index in (first, second))
