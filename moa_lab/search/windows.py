"""The windows of a whole model as an engine counts them: classes of (head, rule) entries, of which a choice may use a few."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from moa_lab.records import LossTable
from moa_lab.search.layers import forbidding
from moa_lab.search.problem import Limits


@dataclass(frozen=True)
class Windows:
    """classes: int64 (heads, R), entries of one class have one rule, and keep the same at every limit length. whole: bool (classes,), the
    classes that keep everything. most: other classes that a choice may use. multiple: a class is allocated for so many heads, or a
    multiple of them."""

    classes: np.ndarray
    whole: np.ndarray
    most: int
    multiple: int = 1

    @property
    def count(self) -> int:
        """Number of classes."""
        return len(self.whole)

    def used(self, choice: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The classes of a choice (heads,), a head of each, and how many heads each has."""
        return np.unique(self.classes[np.arange(len(choice)), choice], return_index=True, return_counts=True)

    def met_by(self, choice: np.ndarray, limits: Limits) -> bool:
        """Whether a choice (heads,) uses few enough classes, and keeps the limits with what fills these up."""
        classes, heads, counts = self.used(choice)
        if (~self.whole[classes]).sum() > self.most:
            return False
        each = limits.usage[:, np.arange(len(choice)), choice]
        idle = (each[:, heads] * (-counts % self.multiple)).sum(axis=1)
        return bool((each.sum(axis=1) + idle <= limits.limit + limits.slack).all())


def windows_of(table: LossTable, lengths: Iterable[int]) -> Windows | None:
    """The classes of a table's engine, where it limits or fills up those of a model."""
    engine = table.engine
    if engine is None or (engine.windows_per_model is None and engine.class_multiple == 1):
        return None
    geometry, lengths = table.geometry, tuple(lengths)
    spans = np.stack([table.span_tokens(n) for n in lengths], axis=-1)
    own = np.array([window is not None for window in geometry.layer_windows])
    seen = np.array([[geometry.dense_span_tokens(layer, n) for n in lengths] for layer in range(geometry.layers)])
    # Rules that keep the same at these lengths may differ at others, but for those that keep all that a layer with a window sees.
    whole = own[:, None] & (spans == seen[:, None]).all(axis=-1)
    rules = np.where(whole, -1, np.arange(len(table.rules))[None])
    keys = np.concatenate([rules[..., None], spans], axis=-1)
    _, found = np.unique(keys.reshape(-1, keys.shape[-1]), axis=0, return_inverse=True)
    classes = np.repeat(found.reshape(rules.shape), geometry.kv_heads, axis=0).astype(np.int64)
    everything = ~own[:, None] & np.array([rule.keeps_everything for rule in table.rules])[None]
    kept = np.zeros(int(classes.max()) + 1, dtype=bool)
    kept[found.reshape(rules.shape)[everything]] = True
    return Windows(classes, kept, engine.windows_per_model or len(kept), engine.class_multiple)


def best_classes(windows: Windows, priced: np.ndarray) -> np.ndarray:
    """Bool (classes,): those that keep everything, and as many others as may be used, chosen so that the heads' cheapest entries have a
    low total price.

    priced: (heads, R), infinite where a rule is not allowed. Chosen one after the other, then exchanged while that helps (the k-median
    problem: Teitz and Bart, 1968).
    """
    priced = forbidding(priced)
    heads = np.arange(len(priced))
    by_class = np.full((len(priced), windows.count), priced.max() + 1)
    for rule in range(priced.shape[1]):
        entries = heads, windows.classes[:, rule]
        by_class[entries] = np.minimum(by_class[entries], priced[:, rule])
    free = np.flatnonzero(windows.whole).tolist()
    chosen: list[int] = free.copy()
    for _ in range(min(windows.most, windows.count - len(free))):
        chosen.append(_next(by_class, chosen))
    exchanged = True
    while exchanged:
        exchanged = False
        for place in range(len(free), len(chosen)):
            others = chosen[:place] + chosen[place + 1 :]
            best = _next(by_class, others)
            if _total(by_class, [*others, best]) < _total(by_class, chosen) - 1e-12:
                chosen[place], exchanged = best, True
    kept = np.zeros(windows.count, dtype=bool)
    kept[chosen] = True
    return kept


def _next(by_class: np.ndarray, chosen: list[int]) -> int:
    served = by_class[:, chosen].min(axis=1) if chosen else np.full(len(by_class), by_class.max())
    return int(np.minimum(served[:, None], by_class).sum(axis=0).argmin())


def _total(by_class: np.ndarray, chosen: list[int]) -> float:
    return float(by_class[:, chosen].min(axis=1).sum())
