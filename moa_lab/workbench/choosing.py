"""Choosing a plan from a front: searched or loaded, two plans compared, plans filtered by brushes (ranges of goals)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moa_lab.evaluate.worse import chosen_text
from moa_lab.figures.front import axes, goal, goal_text
from moa_lab.figures.theme import percent
from moa_lab.plan import told_mixes
from moa_lab.records import Candidate, Front, FrontPoint, LossTable, Measurements, candidates
from moa_lab.records.candidates import origin_text
from moa_lab.search import default_goals, epsilon_front, evolve, front_values, hypervolume
from moa_lab.text import given_path
from moa_lab.workbench.jobs import Handle
from moa_lab.workbench.opening import validation_of
from moa_lab.workbench.state import State

EPSILON, PYMOO = "epsilon (exact)", "pymoo"
SOLVERS = (EPSILON, PYMOO)
AXES = 4
"""Axes of the parallel coordinates before the user chooses others: as many as a look takes in."""
REFERENCE = 1.1
"""Reference point of the hypervolume, in every goal: a little above the loss with every head at the shortest rule."""

Ranges = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Generation:
    """What pymoo's search has after a generation: values (plans, goals) in the order of `goals`, and their hypervolume."""

    number: int
    goals: tuple[str, ...]
    values: np.ndarray
    volume: float


class Choosing:
    """The state's front. picked: at most two plans, the one chosen last at the end. brushes: ranges per goal, smallest first.

    A new front in the state clears both. volumes, seconds: hypervolume after every generation and seconds since the start, by search;
    levels: hypervolume of the fronts of the exact search.
    """

    def __init__(self, state: State) -> None:
        self.state = state
        self.picked: list[FrontPoint] = []
        self.brushes: dict[str, Ranges] = {}
        self.volumes: dict[str, list[float]] = {}
        self.seconds: dict[str, list[float]] = {}
        self.levels: dict[str, float] = {}
        state.watch(["front"], self._forget)

    @property
    def points(self) -> tuple[FrontPoint, ...]:
        """The plans of the front; none where there is no front."""
        return self.state.front.points if self.state.front is not None else ()

    @property
    def goals(self) -> tuple[str, ...]:
        """Names of the goals that plans can be plotted by."""
        return axes(self.state.front) if self.state.front is not None and self.points else ()

    @property
    def first_goals(self) -> tuple[str, str]:
        """The two goals of the first plot: those of whole tasks where there are any, and two different ones where there are two."""
        whole = [name for name in self.goals if "@" not in name and name != "density"]
        names = [*whole, *(name for name in self.goals if name not in whole)]
        return names[0], names[min(1, len(names) - 1)]

    @property
    def axes(self) -> tuple[str, ...]:
        """The goals as axes of parallel coordinates: whole tasks, then those of single lengths, and the density at the end."""
        return tuple(sorted(self.goals, key=lambda name: (name == "density", "@" in name)))

    @property
    def first_axes(self) -> tuple[str, ...]:
        """The `AXES` axes that are drawn first, the density among them."""
        others = [name for name in self.axes if name != "density"]
        return tuple(name for name in self.axes if name in (*others[: AXES - 1], "density"))

    def references(self) -> tuple[FrontPoint, ...]:
        """The dense plan, and the largest uniform one (one rule for all heads) that is no denser than the front's densest plan.

        Empty without a loss table that predicts their loss; one whose name a plan of the front has is left out.
        """
        table = self.state.table
        if table is None or not self.points or not self.points[0].plan.geometry.fits(table.geometry):
            return ()
        shape = (table.geometry.layers, table.geometry.kv_heads)
        lengths = sorted({int(n) for point in self.points for n in point.density}) or list(table.lengths)
        densest = {n: max(point.plan.density(n) for point in self.points) for n in lengths}
        alike = [np.full(shape, rule) for rule in range(len(table.rules))]
        fitting = [choice for choice in alike if all(table.density(choice, n) <= densest[n] + 1e-9 for n in lengths)]
        found = {"dense": max(alike, key=lambda choice: sum(table.density(choice, n) for n in lengths))}
        if fitting:
            found["uniform"] = max(fitting, key=lambda choice: sum(table.density(choice, n) for n in lengths))
        taken = {point.plan.name for point in self.points}
        return tuple(self._reference(table, choice, name, lengths) for name, choice in found.items() if name not in taken)

    def search(self, solver: str, density: float, effort: int, handle: Handle, told: Callable[[Generation], None] | None = None) -> Front:
        """A front at `density`: `effort` intervals of the exact search, or generations of pymoo's. `keep` makes it the state's.

        told: called by pymoo's search after every generation. A search that is stopped returns what it has. Raises ValueError for an
        unknown solver, without a loss table, and for an infeasible density.
        """
        if solver not in SOLVERS:
            raise ValueError(f"search with one of {', '.join(SOLVERS)}, got {solver!r}")
        table = self.state.table
        if table is None:
            raise ValueError("a search needs a loss table: load a run")
        label = f"{solver.partition(' ')[0]} at {percent(density, 1)}"
        if solver == EPSILON:
            front = epsilon_front(
                table, density, intervals=effort, progress=lambda done, total, _: handle.tell(done, total), cancel=handle.cancel
            )
            if len(front) and not handle.cancel.is_set():
                self.levels[label] = _volume(front_values(front))
            return front
        names, began = tuple(goal.name for goal in default_goals(table)), time.perf_counter()
        volumes, seconds = self.volumes[label], self.seconds[label] = [], []

        def heard(generation: int, values: np.ndarray) -> None:
            handle.tell(generation, effort)
            volumes.append(_volume(values))
            seconds.append(time.perf_counter() - began)
            if told is not None:
                told(Generation(generation, names, values, volumes[-1]))

        return evolve(table, density, generations=effort, callback=heard, cancel=handle.cancel)

    def load(self, path: str | Path) -> Front:
        """Read a front from its file or a run's folder, and make it the state's, with the validation beside it.

        Raises FileNotFoundError where there is none, RecordError for what is no front, ValueError for one of another model.
        """
        given = given_path(path)
        file = given / "front.json" if given.is_dir() else given
        if not str(path).strip() or not file.is_file():
            raise FileNotFoundError(f"there is no front at {str(path)!r}: name a front.json, or the folder of a run")
        front = Front.load(file)
        known = next((record.geometry for record in (self.state.table, self.state.profile, self.state.plan) if record is not None), None)
        for point in front:
            if known is not None:
                point.plan.check_model(known)
        self.keep(front, validation_of(file.parent))
        return front

    def keep(self, front: Front, validation: Measurements | None = None) -> float | None:
        """Make `front` the state's, with what was measured of it; returns its hypervolume, None for a front of one goal or without plans.

        Raises ValueError for a front without plans, which would leave nothing to choose.
        """
        if not len(front):
            raise ValueError("this front has no plans; a search that is stopped early finds none")
        self.state.set(front=front, validation=validation)
        return None if len(front.objectives) < 2 else _volume(front_values(front))

    def pick(self, name: str) -> FrontPoint:
        """Choose the plan of that name, of the front or of `references`; it is compared with the one chosen before.

        Raises ValueError where there is none.
        """
        point = next((each for each in (*self.points, *self.references()) if each.plan.name == name), None)
        if point is None:
            raise ValueError(f"{name!r} is not a plan of this front")
        self.picked = [*(each for each in self.picked[-1:] if each.plan.name != name), point]
        self.state.set(plan=point.plan, other=self.picked[0].plan if len(self.picked) == 2 else None)
        return point

    def won(self) -> str:
        """Which candidate of the front won its validation; empty where that is not known."""
        found = {(one.name, one.score) for one in self._candidates if one.chosen}
        plans = [plan for plan in self.state.plans if (plan.search.get("candidate"), plan.search.get("score")) in found]
        return chosen_text(plans[0]) if plans else ""

    @property
    def is_measured(self) -> bool:
        """Whether plans of the front were measured by needles and by words."""
        return bool(self.points) and any(one.has_both for one in self._candidates)

    @property
    def _candidates(self) -> tuple[Candidate, ...]:
        return candidates(self.state.validation) if self.state.validation is not None else ()

    def compared(self, names: Sequence[str] = ()) -> list[tuple[str, list[str]]]:
        """Rows that compare the picked plans: (label, one value per plan), with the goals in `names`; empty where none is picked."""
        if not self.picked:
            return []
        n = self.state.n_tokens
        rows = [
            ("plan", [point.plan.name for point in self.picked]),
            ("kind", [origin_text(point.origin) for point in self.picked]),
            (f"density at {n:,}", [percent(point.plan.density(n), 1) for point in self.picked]),
            *([("stored in", [told_mixes(point.plan) for point in self.picked])] if any(point.plan.bits for point in self.picked) else []),
            *((goal_text(name), [_shown(goal(point, name)) for point in self.picked]) for name in dict.fromkeys(names)),
        ]
        if len(self.picked) == 2:
            first, last = (point.plan.spans(n) for point in self.picked)
            rows.append(("heads that differ", [f"{int((first != last).sum())} of {last.size}"]))
        return rows

    def brush(self, ranges: Mapping[str, Ranges]) -> bool:
        """Keep the plans that lie, in every goal named, in one of its ranges, both ends included; {} keeps all.

        Returns False if nothing changed. Raises ValueError for a goal that the front does not have.
        """
        unknown = sorted(set(ranges) - set(self.goals))
        if unknown:
            raise ValueError(f"the front has no goal {unknown[0]!r}; it has {', '.join(self.goals) or 'none'}")
        asked = {name: tuple(sorted((min(ends), max(ends)) for ends in found)) for name, found in ranges.items() if found}
        changed = asked != self.brushes
        self.brushes = asked
        return changed

    def kept(self) -> tuple[FrontPoint, ...]:
        """The plans that the brushes leave; plans without a value for a brushed goal are left out."""
        return tuple(point for point in self.points if all(_lies(goal(point, name), ranges) for name, ranges in self.brushes.items()))

    def listed(self) -> tuple[list[str], list[list[str]]]:
        """A table of the plans that the brushes leave, with all their goals: its head, and its rows."""
        head = ["plan", "kind", *map(goal_text, self.goals)]
        return head, [
            [point.plan.name, origin_text(point.origin), *(_shown(goal(point, name)) for name in self.goals)] for point in self.kept()
        ]

    def _reference(self, table: LossTable, choice: np.ndarray, name: str, lengths: Sequence[int]) -> FrontPoint:
        predicted = table.predict(choice)
        predicted |= {goal.name: goal.value(predicted) for goal in default_goals(table)}
        return FrontPoint(table.plan(choice, name), predicted, {str(n): table.density(choice, n) for n in lengths}, "one rule for all")

    def _forget(self) -> None:
        self.picked, self.brushes = [], {}


def _volume(values: np.ndarray) -> float:
    return hypervolume(values, np.full(values.shape[1], REFERENCE))


def _lies(value: float | None, ranges: Ranges) -> bool:
    return value is not None and any(low <= value <= high for low, high in ranges)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
