"""Front: plans to choose among, searched here or loaded; two of them side by side, some of them kept by brushes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ipywidgets as w
import numpy as np
import plotly.graph_objects as go

from moa_lab.figures import front_scatter, parallel_goals, span_map
from moa_lab.records import Front
from moa_lab.workbench.choosing import PYMOO, SOLVERS, Choosing, Ranges
from moa_lab.workbench.jobs import Handle
from moa_lab.workbench.state import State
from moa_lab.workbench.widgets import Canvas, Errors, Work, button, choice, facts, grid, number, row, whole


class FrontPanel:
    """Draws `choosing`: a click chooses a plan, a drag along an axis of the parallel coordinates keeps those that pass there."""

    def __init__(self, state: State) -> None:
        self.state, self.errors, self.choosing = state, Errors("front"), Choosing(state)
        self.x, self.y = choice("across", [("", "")], "front-x", "330px"), choice("up", [("", "")], "front-y", "330px")
        self.solver = choice("search with", SOLVERS, "solver", "230px")
        self.density = number("density", 0.5, 0.0, 1.0, 0.01, "front-density", "150px")
        self.effort = whole("intervals or generations", 4, 1, 500, "effort", "230px")
        self.work = Work("Search", "search", self.errors, self._searcher, self._found)
        self.scatter = Canvas("front", 580, self.errors.guard(self._clicked))
        self.parallel = Canvas("parallel", 1000, on_brush=self.errors.guard(self._brushed))
        self.difference = Canvas("difference", 1000)
        self.compared, self.volume, self.kept = w.HTML(layout=w.Layout(width="420px")), w.HTML(), w.HTML()
        self.compared.add_class("moa-compared")
        self.volume.add_class("moa-hypervolume")
        self.kept.add_class("moa-kept")
        self.clear = button("Clear brushes", "clear-brushes")
        self.clear.on_click(self.errors.guard(lambda _: self._cleared()))
        self._loading = False
        for box in (self.x, self.y):
            box.observe(self.errors.guard(lambda _: None if self._loading else self.draw()), "value")
        state.watch_in("Front", ["front"], self.errors.guard(self.load))
        state.watch_in("Front", ["dark"], self.errors.guard(self._recolour))
        state.watch_in("Front", ["n_tokens"], self.errors.guard(self.draw))
        self.box = w.VBox(
            [
                row(self.solver, self.density, self.effort, self.work.box, self.volume),
                self.errors.box,
                row(self.x, self.y),
                w.HBox([self.scatter.box, self.compared], layout=w.Layout(flex_flow="row wrap")),
                self.parallel.box,
                row(self.clear, self.kept),
                self.difference.box,
            ]
        )
        self.load()

    def load(self) -> None:
        """Show the state's front; nothing is chosen yet, and nothing brushed."""
        names = self.choosing.goals
        has_plans = bool(self.choosing.points)
        for part in (self.scatter.box, self.parallel.box, self.clear):
            part.layout.display = "" if has_plans else "none"
        if not has_plans:
            self.compared.value = "no front yet: press Search" if self.state.table is not None else "no front: load a run"
            self.kept.value, self.difference.box.layout.display = "", "none"
            return
        self._loading = True
        try:
            self.x.options = self.y.options = names
            self.x.value, self.y.value = names[0], names[min(1, len(names) - 1)]
        finally:
            self._loading = False
        self._recolour()

    def draw(self) -> None:
        """Draw the front, what is chosen of it, and what the brushes leave; the parallel coordinates keep what was dragged there."""
        front = self.state.front
        if front is None or not self.choosing.points:
            return
        picked = self.choosing.picked
        fig = front_scatter(front, self.x.value, self.y.value, picked[-1].plan if picked else None)
        self.scatter.draw(_dimmed(fig, {point.plan.name for point in self.choosing.kept()}), self.state.dark)
        self._compare()
        self._list()

    def pick(self, name: str) -> None:
        """Choose a plan."""
        self.choosing.pick(name)
        self.draw()

    def brush(self, ranges: dict[str, Ranges]) -> None:
        """Keep the plans within the ranges; the others are dimmed."""
        if self.choosing.brush(ranges):
            self.draw()

    def _recolour(self) -> None:
        if self.state.front is not None and self.choosing.points:
            fig = parallel_goals(self.state.front)
            for axis in fig.data[0].dimensions:
                axis.constraintrange = _given(self.choosing.brushes.get(axis.name, ()))
            self.parallel.draw(fig, self.state.dark)
        self.draw()

    def _clicked(self, data: Any) -> None:
        self.pick(str(data[0] if isinstance(data, list | tuple | np.ndarray) else data))

    def _brushed(self, ranges: dict[str, Ranges]) -> None:
        self.brush({name: found for name, found in ranges.items() if name in self.choosing.goals})

    def _cleared(self) -> None:
        self.choosing.brush({})
        self._recolour()

    def _compare(self) -> None:
        picked, n = self.choosing.picked, self.state.n_tokens
        if not picked:
            self.compared.value = "click a plan; click another to compare the two"
            self.difference.box.layout.display = "none"
            return
        self.compared.value = facts([(name, " | ".join(values)) for name, values in self.choosing.compared([self.x.value, self.y.value])])
        last, first = picked[-1].plan, picked[0].plan
        self.difference.box.layout.display = ""
        self.difference.draw(span_map(last, n, compared_with=first if len(picked) == 2 else None), self.state.dark)

    def _list(self) -> None:
        brushed, head, rows = self.choosing.brushes, *self.choosing.listed()
        self.clear.disabled = not brushed
        if not brushed:
            self.kept.value = "drag along an axis to keep the plans that pass there; click beside the stroke to let all back in"
            return
        told = f"{len(rows)} of {len(self.choosing.points)} plans kept by {', '.join(brushed)}"
        self.kept.value = f"{told}{grid(head, rows) if rows else ''}"

    def _searcher(self) -> Callable[[Handle], Front]:
        solver, density, effort = self.solver.value, self.density.value, self.effort.value
        if self.state.table is None:
            raise ValueError("a search needs a loss table: load a run")

        def told(generation: int, plans: int, volume: float) -> None:
            self.volume.value = f"generation {generation}: {plans} plans, hypervolume {volume:.4f}"

        return lambda handle: self.choosing.search(solver, density, effort, handle, told if solver == PYMOO else None)

    def _found(self, front: Front) -> None:
        volume = self.choosing.keep(front)
        self.volume.value = "" if volume is None else f"{len(front)} plans, hypervolume {volume:.4f}"


def _dimmed(fig: go.Figure, kept: set[str]) -> go.Figure:
    """All plans but those named `kept` nearly transparent."""
    for trace in fig.data:
        if trace.customdata is not None:
            trace.selectedpoints = [index for index, name in enumerate(trace.customdata) if name in kept]
            trace.unselected = {"marker": {"opacity": 0.15}}
    return fig


def _given(ranges: Ranges) -> Any:
    """Ranges as plotly takes them: none, one, or a list of them."""
    return None if not ranges else ranges[0] if len(ranges) == 1 else ranges
