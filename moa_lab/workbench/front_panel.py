"""Front: plans to choose among, searched here or loaded; two of them side by side."""

from __future__ import annotations

import threading
from typing import Any

import ipywidgets as w
import numpy as np

from moa_lab.figures import front_scatter, parallel_goals, span_map
from moa_lab.figures.front import axes, goal
from moa_lab.figures.theme import percent
from moa_lab.records import Front, FrontPoint
from moa_lab.search import default_goals, epsilon_front, evolve, front_values, hypervolume
from moa_lab.workbench.jobs import Handle
from moa_lab.workbench.state import State
from moa_lab.workbench.widgets import Canvas, Errors, Work, choice, facts, number, row, whole


class FrontPanel:
    """A click chooses a plan; the one chosen before becomes the one it is compared with."""

    def __init__(self, state: State) -> None:
        self.state, self.errors = state, Errors("front")
        self.picked: list[FrontPoint] = []
        self.x, self.y = choice("across", [("", "")], "front-x", "330px"), choice("up", [("", "")], "front-y", "330px")
        self.solver = choice("search with", ["epsilon (exact)", "pymoo"], "solver", "230px")
        self.density = number("density", 0.5, 0.0, 1.0, 0.01, "front-density", "150px")
        self.effort = whole("intervals or generations", 4, 1, 500, "effort", "230px")
        self.work = Work("Search", "search", self.errors, lambda: self._searcher(), self._found)
        self.scatter = Canvas("front", 580, self.errors.guard(self._clicked))
        self.parallel = Canvas("parallel", 1000)
        self.difference = Canvas("difference", 1000)
        self.compared, self.volume = w.HTML(layout=w.Layout(width="420px")), w.HTML()
        self.compared.add_class("moa-compared")
        self.volume.add_class("moa-hypervolume")
        self._loading = False
        for box in (self.x, self.y):
            box.observe(self.errors.guard(lambda _: None if self._loading else self.draw()), "value")
        state.watch_in("Front", ["front"], self.errors.guard(self.load))
        state.watch_in("Front", ["dark", "n_tokens"], self.errors.guard(self.draw))
        self.box = w.VBox(
            [
                row(self.solver, self.density, self.effort, self.work.box, self.volume),
                self.errors.box,
                row(self.x, self.y),
                w.HBox([self.scatter.box, self.compared], layout=w.Layout(flex_flow="row wrap")),
                self.parallel.box,
                self.difference.box,
            ]
        )
        self.load()

    def load(self) -> None:
        """Show the state's front; nothing is chosen yet."""
        front = self.state.front
        if front is None or not len(front):
            self.compared.value = "no front yet: press Search" if self.state.table is not None else "no front: load a run"
            return
        names = axes(front)
        self._loading = True
        try:
            self.picked = []
            self.x.options = self.y.options = names
            self.x.value, self.y.value = names[0], names[1]
        finally:
            self._loading = False
        self.draw()

    def draw(self) -> None:
        """Draw the front, and what is chosen of it."""
        front = self.state.front
        if front is None or not len(front):
            return
        chosen = self.picked[-1].plan if self.picked else None
        fig = front_scatter(front, self.x.value, self.y.value, chosen)
        self.scatter.draw(fig, self.state.dark)
        self.parallel.draw(parallel_goals(front), self.state.dark)
        self._compare()

    def pick(self, point: FrontPoint) -> None:
        """Choose a plan."""
        self.picked = [*self.picked[-1:], point]
        self.state.set(plan=point.plan, other=self.picked[0].plan if len(self.picked) == 2 else None)
        self.draw()

    def _clicked(self, data: Any) -> None:
        front = self.state.front
        name = data[0] if isinstance(data, list | tuple | np.ndarray) else data
        found = [point for point in front or () if point.plan.name == name]
        if not found:
            raise ValueError(f"{name!r} is not a plan of this front")
        self.pick(found[0])

    def _compare(self) -> None:
        if not self.picked:
            self.compared.value = "click a plan; click another to compare the two"
            self.difference.box.layout.display = "none"
            return
        n, names = self.state.n_tokens, [point.plan.name for point in self.picked]
        rows = [("", " | ".join(names)), ("found by", " | ".join(point.origin for point in self.picked))]
        rows.append((f"density at {n:,}", " | ".join(percent(point.plan.density(n), 1) for point in self.picked)))
        for name in (self.x.value, self.y.value):
            values = [goal(point, name) for point in self.picked]
            rows.append((name, " | ".join("-" if value is None else f"{value:.4f}" for value in values)))
        first, last = self.picked[0].plan, self.picked[-1].plan
        fig = span_map(last, n)
        if first is not last:
            changed = int((first.spans(n) != last.spans(n)).sum())
            rows.append(("heads that differ", f"{changed} of {last.spans(n).size}"))
            fig = span_map(last, n, compared_with=first)
        self.compared.value = facts(rows)
        self.difference.box.layout.display = "flex"
        self.difference.draw(fig, self.state.dark)

    def _searcher(self) -> Any:
        if self.state.table is None:
            raise ValueError("a search needs a loss table: load a run")
        return self._evolved if self.solver.value == "pymoo" else self._by_epsilon

    def _by_epsilon(self, handle: Handle) -> Front:
        assert self.state.table is not None
        return epsilon_front(
            self.state.table, self.density.value, intervals=self.effort.value,
            progress=lambda done, total, _: handle.progress(done, total), cancel=handle.cancel,
        )  # fmt: skip

    def _evolved(self, handle: Handle) -> Front:
        assert self.state.table is not None
        reference, lock = np.full(len(default_goals(self.state.table)), 1.1), threading.Lock()

        def told(generation: int, values: np.ndarray) -> None:
            handle.progress(generation, self.effort.value)
            with lock:
                self.volume.value = f"generation {generation}: {len(values)} plans, hypervolume {hypervolume(values, reference):.4f}"

        return evolve(self.state.table, self.density.value, generations=self.effort.value, callback=told, cancel=handle.cancel)

    def _found(self, front: Front) -> None:
        if len(front.objectives) > 1:
            volume = hypervolume(front_values(front), np.full(len(front.objectives), 1.1))
            self.volume.value = f"{len(front)} plans, hypervolume {volume:.4f}"
        self.state.set(front=front)
