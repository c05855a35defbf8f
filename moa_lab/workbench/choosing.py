"""Choosing a plan from a front: searched or loaded, two of its plans side by side, some of them kept by brushes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from moa_lab.figures.front import axes, goal
from moa_lab.figures.theme import percent
from moa_lab.records import Front, FrontPoint
from moa_lab.search import default_goals, epsilon_front, evolve, front_values, hypervolume
from moa_lab.workbench.jobs import Handle
from moa_lab.workbench.state import State

EPSILON, PYMOO = "epsilon (exact)", "pymoo"
SOLVERS = (EPSILON, PYMOO)
REFERENCE = 1.1
"""Of the hypervolume, in every goal: a little more than everything at the shortest rule loses."""

Ranges = tuple[tuple[float, float], ...]


class Choosing:
    """The state's front. picked: at most two of its plans, the one chosen last at the end. brushes: ranges per goal, smallest first.

    A new front in the state ends both.
    """

    def __init__(self, state: State) -> None:
        self.state = state
        self.picked: list[FrontPoint] = []
        self.brushes: dict[str, Ranges] = {}
        state.watch(["front"], self._forget)

    @property
    def points(self) -> tuple[FrontPoint, ...]:
        """The plans of the front; none where there is no front."""
        return self.state.front.points if self.state.front is not None else ()

    @property
    def goals(self) -> tuple[str, ...]:
        """What the plans can be placed by."""
        return axes(self.state.front) if self.state.front is not None and self.points else ()

    def search(
        self, solver: str, density: float, effort: int, handle: Handle, told: Callable[[int, int, float], None] | None = None
    ) -> Front:
        """A front at `density`: `effort` intervals of the exact search, or generations of pymoo's. `keep` shows it.

        told: called by pymoo's search with the generation, its plans, and their hypervolume. A search that is stopped returns what it
        has. Raises ValueError for an unknown solver, without a loss table, and for a density that cannot be had.
        """
        if solver not in SOLVERS:
            raise ValueError(f"search with one of {', '.join(SOLVERS)}, got {solver!r}")
        table = self.state.table
        if table is None:
            raise ValueError("a search needs a loss table: load a run")
        if solver == EPSILON:
            return epsilon_front(
                table, density, intervals=effort, progress=lambda done, total, _: handle.progress(done, total), cancel=handle.cancel
            )
        reference, lock = np.full(len(default_goals(table)), REFERENCE), threading.Lock()

        def heard(generation: int, values: np.ndarray) -> None:
            handle.progress(generation, effort)
            if told is not None:
                with lock:
                    told(generation, len(values), hypervolume(values, reference))

        return evolve(table, density, generations=effort, callback=heard, cancel=handle.cancel)

    def keep(self, front: Front) -> float | None:
        """Make `front` the state's; returns its hypervolume, None for a front of one goal or without plans.

        Raises ValueError for a front without plans, which would leave nothing to choose.
        """
        if not len(front):
            raise ValueError("the search was stopped before it found a plan")
        self.state.set(front=front)
        if len(front.objectives) < 2:
            return None
        return hypervolume(front_values(front), np.full(len(front.objectives), REFERENCE))

    def pick(self, name: str) -> FrontPoint:
        """Choose the plan of that name; the one chosen before is what it is compared with. Raises ValueError where there is none."""
        point = next((each for each in self.points if each.plan.name == name), None)
        if point is None:
            raise ValueError(f"{name!r} is not a plan of this front")
        self.picked = [*(each for each in self.picked[-1:] if each is not point), point]
        self.state.set(plan=point.plan, other=self.picked[0].plan if len(self.picked) == 2 else None)
        return point

    def compared(self, names: Sequence[str] = ()) -> list[tuple[str, list[str]]]:
        """What is picked, side by side: (what, one value a plan), with the goals named; nothing where nothing is picked."""
        if not self.picked:
            return []
        n = self.state.n_tokens
        rows = [
            ("plan", [point.plan.name for point in self.picked]),
            ("found by", [point.origin for point in self.picked]),
            (f"density at {n:,}", [percent(point.plan.density(n), 1) for point in self.picked]),
            *((name, [_shown(goal(point, name)) for point in self.picked]) for name in dict.fromkeys(names)),
        ]
        if len(self.picked) == 2:
            first, last = (point.plan.spans(n) for point in self.picked)
            rows.append(("heads that differ", [f"{int((first != last).sum())} of {last.size}"]))
        return rows

    def brush(self, ranges: Mapping[str, Ranges]) -> bool:
        """Keep the plans that lie, in every goal named, in one of its ranges, both ends included; {} keeps all.

        Returns False where that is what was asked for before. Raises ValueError for a goal that the front has not.
        """
        unknown = sorted(set(ranges) - set(self.goals))
        if unknown:
            raise ValueError(f"the front has no goal {unknown[0]!r}; it has {', '.join(self.goals) or 'none'}")
        asked = {name: tuple(sorted((min(ends), max(ends)) for ends in found)) for name, found in ranges.items() if found}
        changed = asked != self.brushes
        self.brushes = asked
        return changed

    def kept(self) -> tuple[FrontPoint, ...]:
        """The plans that the brushes leave; one that has not a brushed goal is not among them."""
        return tuple(point for point in self.points if all(_lies(goal(point, name), ranges) for name, ranges in self.brushes.items()))

    def listed(self) -> tuple[list[str], list[list[str]]]:
        """A table of the plans that the brushes leave, with all their goals: its head, and its rows."""
        head = ["plan", "found by", *self.goals]
        return head, [[point.plan.name, point.origin, *(_shown(goal(point, name)) for name in self.goals)] for point in self.kept()]

    def _forget(self) -> None:
        self.picked, self.brushes = [], {}


def _lies(value: float | None, ranges: Ranges) -> bool:
    return value is not None and any(low <= value <= high for low, high in ranges)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
