"""A solver of many densities, one after the other, each within a slider's time."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from moa_lab.records import LossTable
from moa_lab.search.budget import BudgetSolver
from moa_lab.search.goals import Goal
from moa_lab.search.problem import InfeasibleError, allowed_rules, check_feasible
from moa_lab.search.relaxation import relax

ANCHORS = 20
"""Densities, from 1 / ANCHORS to 1, at which the weights of worst terms are found from nothing; others start from the nearest's."""


class SliderSolver(BudgetSolver):
    """`BudgetSolver` whose goals with worst terms start from an anchor nearby, and end at a proven gap of 1%: the same answers whatever was
    solved before."""

    def __init__(self, table: LossTable, goal: Goal | None = None, lengths: Iterable[int] | None = None) -> None:
        super().__init__(table, goal, lengths)
        self._anchors: dict[int, list[np.ndarray]] = {}

    def prepare(self) -> None:
        """Find all anchors now (some seconds for a large table whose goal has worst terms), not when the slider first comes near them."""
        for place in range(1, ANCHORS + 1):
            self._start(place / ANCHORS)

    def _start(self, density: float) -> list[np.ndarray] | None:
        """Weights of the anchor nearest to a density; None where nothing keeps it, and for a goal without worst terms."""
        if not self._terms.worst:
            return None
        place = min(max(round(density * ANCHORS), 1), ANCHORS)
        if place not in self._anchors:
            limits = self._usage.limits(dict.fromkeys(self.lengths, place / ANCHORS))
            try:
                check_feasible(self.table, limits, None)
            except InfeasibleError:
                return None
            self._anchors[place] = relax(self._terms, limits, allowed_rules(self.table, None)).weights
        return self._anchors[place]
