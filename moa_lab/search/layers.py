"""At most k distinct rules per layer: the relaxation whose subproblem picks each layer's rules."""

from __future__ import annotations

import numpy as np

from moa_lab.search.lagrange import Dual, Relaxed

EXACT = 2
"""Up to two rules per layer the subproblem is exact, so its bound is proven; beyond, rules are added greedily."""


class LayerRelaxed(Relaxed):
    """The dual function when every layer has at most `most` (1 or 2) distinct rules; heads are grouped by layer."""

    def __init__(self, cost: np.ndarray, rows: np.ndarray, limit: np.ndarray, layers: int, most: int) -> None:
        super().__init__(cost, rows, limit)
        self._layers, self._most = layers, most

    def dual(self, multipliers: np.ndarray) -> Dual:
        """The bound that the multipliers prove; in its reduced costs all but each layer's best rules are infinite."""
        priced = self.reduced(multipliers)
        heads = len(priced) // self._layers
        kept = np.repeat(rules_of_layers(priced.reshape(self._layers, heads, -1), self._most), heads, axis=0)
        reduced = np.where(kept, priced, np.inf)
        return self._proven(multipliers, reduced, reduced.min(axis=1))


def rules_of_layers(priced: np.ndarray, most: int) -> np.ndarray:
    """The `most` rules that serve each layer's heads at the least total price. priced (layers, heads, R); bool (layers, R)."""
    priced = forbidding(priced)
    kept = np.zeros((len(priced), priced.shape[2]), dtype=bool)
    for layer, heads in enumerate(priced):
        totals = _totals(heads, most)
        chosen = [int(index) for index in np.unravel_index(totals.argmin(), totals.shape)]
        served = heads[:, chosen].min(axis=1)
        while len(chosen) < most:
            chosen.append(int(np.minimum(served[:, None], heads).sum(axis=0).argmin()))
            served = np.minimum(served, heads[:, chosen[-1]])
        kept[layer, chosen] = True
    return kept


def rule_excess(priced: np.ndarray, most: int) -> np.ndarray:
    """By how much a layer's total price rises, at least, when it uses a given rule: (layers, R); `most` is 1 or 2."""
    excess = []
    for heads in forbidding(priced):
        totals = _totals(heads, most)
        least = totals if totals.ndim == 1 else totals.min(axis=1)
        excess.append(least - least.min())
    return np.array(excess)


def forbidding(priced: np.ndarray) -> np.ndarray:
    """Prices (..., heads, R) with infinite ones replaced by finite ones above the sum of the allowed prices, so that sums compare."""
    allowed = np.isfinite(priced)
    highest = np.abs(priced, where=allowed, out=np.zeros_like(priced)).max()
    return np.where(allowed, priced, 4 * priced.shape[-2] * (highest + 1))


def _totals(heads: np.ndarray, most: int) -> np.ndarray:
    """Total price of one layer per rule (R,), or per pair of rules (R, R)."""
    if most == 1:
        return heads.sum(axis=0)
    total = np.zeros((heads.shape[1], heads.shape[1]))
    for head in heads:
        total += np.minimum(head[:, None], head[None, :])
    return total
