"""An instance as the sparse mixed-integer program that HiGHS reads."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array, vstack

from moa_lab.search import highs
from moa_lab.search.instance import Instance
from moa_lab.search.windows import Windows


def program(problem: Instance, keep: np.ndarray, scale: float) -> tuple[highs.Model, np.ndarray]:
    """Variables: one binary per kept (head, rule), then one per (layer, rule) for the rule limit and one per class of windows for that
    limit, then for each class an integer, the multiples that it takes, then one per worst objective.

    Losses are multiplied by `scale` (HiGHS stops at an absolute gap of 1e-6, so the objective should be about 10). Spans are in
    units of the shortest, so that HiGHS's tolerances stay far below one token.
    """
    heads, rules = np.nonzero(keep)
    count = len(heads)
    worst = {term.objective: term for goal in (problem.goal, *(cap.terms for cap in problem.caps)) for term in goal.worst}
    pairs = (
        np.unique((heads // (len(keep) // problem.layers)) * keep.shape[1] + rules)
        if problem.max_rules is not None
        else np.array([], dtype=int)
    )
    windows = problem.windows
    classes = np.array([], dtype=int) if windows is None else np.unique(windows.classes[heads, rules])
    binaries = count + len(pairs) + len(classes)
    integers = len(classes) if windows is not None and windows.multiple > 1 else 0
    columns = binaries + integers + len(worst)
    top = {name: binaries + integers + index for index, name in enumerate(worst)}
    rows = _Rows(columns)

    rows.add_many(heads, np.arange(count), np.ones(count), low=1.0, high=1.0)
    unit = problem.limits.usage.min(axis=(1, 2))
    if windows is not None:
        _add_windows(rows, problem, windows, heads, rules, count + len(pairs), unit)
    for usage, limit, slack, floor in zip(problem.limits.usage, problem.limits.limit, problem.limits.slack, unit, strict=True):
        rows.add(np.arange(count), usage[heads, rules] / floor, (limit + slack) / floor)
    for name, term in worst.items():
        for row in term.rows:
            rows.add(np.append(np.arange(count), top[name]), np.append(scale * row[heads, rules], -1.0), 0.0)
    for cap in problem.caps:
        tops = [top[term.objective] for term in cap.terms.worst]
        coefficients = np.append(scale * cap.terms.linear[heads, rules], [term.weight for term in cap.terms.worst])
        rows.add(np.append(np.arange(count), tops).astype(int), coefficients, scale * cap.most)
    if problem.max_rules is not None:
        layer_rule = (heads // (len(keep) // problem.layers)) * keep.shape[1] + rules
        used = count + np.searchsorted(pairs, layer_rule)
        each = np.arange(count)
        rows.add_many(np.append(each, each), np.append(each, used), np.append(np.ones(count), -np.ones(count)), low=-np.inf, high=0.0)
        rows.add_many(
            pairs // keep.shape[1], count + np.arange(len(pairs)), np.ones(len(pairs)), low=-np.inf, high=float(problem.max_rules)
        )

    objective = np.zeros(columns)
    objective[:count] = scale * problem.goal.linear[heads, rules]
    for term in problem.goal.worst:
        objective[top[term.objective]] = term.weight
    matrix, low, high = rows.build()
    return highs.Model(objective, binaries, matrix, low, high, integers), np.stack([heads, rules])


@dataclass(frozen=True)
class Condensed:
    """A program without a variable for one entry of every head, which is what the others leave: fewer columns, and a row only for heads
    with several others. The whole program's variables are `first + others @ y`."""

    model: highs.Model
    first: np.ndarray
    others: csr_array

    def whole(self, y: np.ndarray | None) -> np.ndarray | None:
        """The whole program's variables for those of the condensed one."""
        return None if y is None else np.asarray(self.first + self.others @ y)


def condensed(model: highs.Model, entries: np.ndarray, lead: np.ndarray) -> Condensed:
    """The program with every head's entry of the smallest `lead` (heads, R) left out; its first rows must be those that give every head one
    entry, and it must have no limit on rules or windows."""
    heads, rules = entries
    order = np.lexsort((lead[heads, rules], heads))
    left = order[np.searchsorted(heads[order], np.arange(len(lead)))]
    kept = np.setdiff1d(np.arange(len(model.objective)), left)
    chosen = kept[: len(heads) - len(left)]
    place = np.arange(len(kept))
    rows = np.append(kept, left[heads[chosen]])
    values = np.append(np.ones(len(kept)), -np.ones(len(chosen)))
    others = csr_array((values, (rows, np.append(place, place[: len(chosen)]))), shape=(len(model.objective), len(kept)))
    first = np.zeros(len(model.objective))
    first[left] = 1.0
    several = model.matrix[: len(lead)][:, kept]
    several = several[np.diff(several.indptr) > 1]
    matrix = vstack([(model.matrix @ others)[len(lead) :], several], format="csr")
    base = (model.matrix @ first)[len(lead) :]
    low = np.append(model.low[len(lead) :] - base, np.zeros(several.shape[0]))
    high = np.append(model.high[len(lead) :] - base, np.ones(several.shape[0]))
    shorter = highs.Model(others.T @ model.objective, len(chosen), matrix, low, high, offset=float(model.objective @ first))
    return Condensed(shorter, first, others)


def _add_windows(
    rows: _Rows, problem: Instance, windows: Windows, heads: np.ndarray, rules: np.ndarray, first: int, unit: np.ndarray
) -> None:
    """Few classes, whose binaries begin at the variable `first`; and, behind these, multiples that hold their heads and keep the limits."""
    found, entry, of = np.unique(windows.classes[heads, rules], return_index=True, return_inverse=True)
    each, classes = np.arange(len(heads)), np.arange(len(entry))
    linked = np.append(np.ones(len(heads)), -np.ones(len(heads)))
    rows.add_many(np.append(each, each), np.append(each, first + of), linked, low=-np.inf, high=0.0)
    cut = first + classes[~windows.whole[found]]
    rows.add(cut, np.ones(len(cut)), float(windows.most))
    if windows.multiple == 1:
        return
    taken = first + len(classes) + classes
    held = np.append(np.ones(len(heads)), np.full(len(classes), -float(windows.multiple)))
    rows.add_many(np.append(of, classes), np.append(each, taken), held, low=-np.inf, high=0.0)
    limits = problem.limits
    for usage, limit, slack, floor in zip(limits.usage, limits.limit, limits.slack, unit, strict=True):
        rows.add(taken, windows.multiple * usage[heads[entry], rules[entry]] / floor, (limit + slack) / floor)


class _Rows:
    """Collects sparse constraint rows."""

    def __init__(self, columns: int) -> None:
        self._columns = columns
        self._count = 0
        self._parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._low: list[float] = []
        self._high: list[float] = []

    def add(self, columns: np.ndarray, values: np.ndarray, high: float) -> None:
        """One row: values . x[columns] <= high."""
        self.add_many(np.zeros(len(columns), dtype=int), columns, values, low=-np.inf, high=high)

    def add_many(self, rows: np.ndarray, columns: np.ndarray, values: np.ndarray, *, low: float, high: float) -> None:
        """Rows numbered from 0, all with the same bounds."""
        count = int(rows.max()) + 1 if len(rows) else 0
        self._parts.append((rows + self._count, columns, values))
        self._low += [low] * count
        self._high += [high] * count
        self._count += count

    def build(self) -> tuple[csr_array, np.ndarray, np.ndarray]:
        rows, columns, values = (np.concatenate(part) for part in zip(*self._parts, strict=True))
        matrix = csr_array((values, (rows, columns)), shape=(self._count, self._columns))
        return matrix, np.array(self._low), np.array(self._high)


def decode(x: np.ndarray, entries: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The choice (heads,) that the solver's `x` stands for; `entries` and `shape` are those of the program."""
    heads, rules = entries
    weight = np.full(shape, -1.0)
    weight[heads, rules] = x[: len(heads)]
    return weight.argmax(axis=1)
