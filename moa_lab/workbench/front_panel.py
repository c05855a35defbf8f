"""Front: search or load plans, compare two of them, filter them by brushes."""

from __future__ import annotations

import html
import time
from collections.abc import Callable
from typing import Any

import ipywidgets as w
import numpy as np
import plotly.graph_objects as go

from moa_lab.figures import archive_scatter, front_scatter, hypervolume_curve, measured_front, parallel_goals, span_map
from moa_lab.figures.front import goal_text
from moa_lab.records import Front
from moa_lab.workbench.canvas import HALF, PAIR, WIDE, Canvas, ring, with_legend
from moa_lab.workbench.choosing import SOLVERS, Choosing, Generation, Ranges
from moa_lab.workbench.jobs import Handle
from moa_lab.workbench.room import columns, room
from moa_lab.workbench.state import State
from moa_lab.workbench.widgets import OWN_WIDTH, Errors, Work, button, choice, facts, grid, number, row, side_by_side, whole

DRAW_S = 0.25
"""Least seconds between two drawings of a running search."""


class FrontPanel:
    """Draws `choosing`: a click chooses a plan, a drag along an axis of the parallel coordinates keeps those that pass there."""

    def __init__(self, state: State) -> None:
        self.state, self.errors, self.choosing = state, Errors("front"), Choosing(state)
        self.x, self.y = choice("across", [("", "")], "front-x", "330px"), choice("up", [("", "")], "front-y", "330px")
        self.solver = choice("search with", SOLVERS, "solver", "230px")
        self.density = number("density", 0.5, 0.0, 1.0, 0.01, "front-density", "150px")
        self.effort = whole("intervals or generations", 4, 1, 500, "effort", "230px")
        self.work = Work("Search", "search", self.errors, self._searcher, self._found)
        self.path = w.Text(placeholder="a run's folder, or its front.json", layout=w.Layout(width="300px"))
        self.path.add_class("moa-front-path")
        load = button("Load front", "load-front")
        load.on_click(self.errors.guard(lambda _: self.choosing.load(self.path.value)))
        self.archive, self.volumes = Canvas("archive", PAIR), Canvas("volumes", PAIR)
        self.live = w.HBox([self.archive.box, self.volumes.box], layout=w.Layout(flex_flow="row wrap", display="none"))
        self._drawn_s, self._loading = 0.0, False
        self._newest: Generation | None = None
        self.scatter = Canvas("front", HALF, self.errors.guard(self._clicked))
        self.measured = Canvas("measured", HALF, self.errors.guard(self._clicked))
        self.parallel = Canvas("parallel", WIDE, on_brush=self.errors.guard(self._brushed))
        self.difference = Canvas("difference", WIDE, self.errors.guard(self._chose_head), on_hover=state.hover, keys=True)
        self.compared, self.volume, self.kept, self.won = w.HTML(), w.HTML(), w.HTML(), w.HTML()
        self.compared.add_class("moa-compared")
        self.won.add_class("moa-won")
        self.volume.add_class("moa-hypervolume")
        self.kept.add_class("moa-kept")
        self.axes = w.SelectMultiple(description="axes", rows=5, layout=w.Layout(width="430px"), style=OWN_WIDTH)
        self.axes.add_class("moa-front-axes")
        self.axes.observe(self.errors.guard(lambda _: None if self._loading else self._new_axes()), "value")
        self.clear = button("Clear brushes", "clear-brushes")
        self.clear.on_click(self.errors.guard(lambda _: self._cleared()))
        for box in (self.x, self.y):
            box.observe(self.errors.guard(lambda _: None if self._loading else self.draw()), "value")
        changed = state.watch_in("Front", ["front"], self.errors.guard(self.load))
        state.watch_in("Front", ["dark"], self.errors.guard(self._darken))
        measured = state.watch_in("Front", ["front", "validation"], self.errors.guard(self._tell_measured))
        state.watch_in("Front", ["n_tokens"], self.errors.guard(self.draw))
        state.watch_in("Front", ["layer", "kv_head"], self.errors.guard(self._compare))
        state.watch_in("Front", ["width"], self.errors.guard(self._refit, keep=True))
        self.works = (self.work,)
        self._plots = [w.VBox([self.scatter.box, self.compared]), w.VBox([self.measured.box, self.won])]
        self.box = w.VBox(
            [
                row(self.solver, self.density, self.effort, self.work.box, self.volume),
                row(self.path, load),
                self.errors.box,
                self.live,
                row(self.x, self.y),
                side_by_side(*self._plots),
                self.axes,
                self.parallel.box,
                row(self.clear, self.kept),
                self.difference.box,
            ]
        )
        self._fit()
        changed()
        measured()

    def _fit(self) -> None:
        """The two plots side by side, what is said of each below it; the others as wide as the panel."""
        free = room(self.state.width)
        for plot, box in zip((self.scatter, self.measured), self._plots, strict=True):
            plot.resize(columns(free))
            box.layout.width = plot.box.layout.width
        for plot in (self.archive, self.volumes):
            plot.resize(columns(free))
        for plot in (self.parallel, self.difference):
            plot.resize(free)
        self._per_line = 2 if columns(free) >= HALF else 1

    def _refit(self) -> None:
        self._fit()
        self.draw()
        self._tell_measured()

    def load(self) -> None:
        """Show the state's front; nothing is chosen yet, and nothing brushed."""
        has_plans = bool(self.choosing.points)
        for part in (self.scatter.box, self.axes, self.parallel.box, self.clear):
            part.layout.display = "" if has_plans else "none"
        if not has_plans:
            self.compared.value = "no front yet: press Search, or load one" if self.state.table is not None else "no front yet: load one"
            self.kept.value, self.difference.box.layout.display = "", "none"
            return
        self._loading = True
        try:
            self.x.options = self.y.options = [(goal_text(name), name) for name in self.choosing.goals]
            self.x.value, self.y.value = self.choosing.first_goals
            self.axes.options = [(goal_text(name), name) for name in self.choosing.axes]
            self.axes.value = self.choosing.first_axes
        finally:
            self._loading = False
        self._recolour()

    def draw(self) -> None:
        """Draw the front, what is chosen of it, and what the brushes leave; the parallel coordinates keep what was dragged there."""
        front = self.state.front
        if front is None or not self.choosing.points:
            return
        picked = self.choosing.picked
        known = self.choosing.references()
        fig = front_scatter(front, self.x.value, self.y.value, picked[-1].plan if picked else None, known)
        kept = {point.plan.name for point in (*self.choosing.kept(), *known)}
        self.scatter.draw(_dimmed(with_legend(fig, self._per_line), kept), self.state.dark)
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
            fig = parallel_goals(self.state.front, self.axes.value or self.choosing.first_axes)
            # A name of its own makes it another figure on the page, which keeps what is brushed where axes are the same.
            fig.data[0].name = " ".join(axis.name for axis in fig.data[0].dimensions)
            for axis in fig.data[0].dimensions:
                axis.constraintrange = _given(self.choosing.brushes.get(axis.name, ()))
            self.parallel.draw(fig, self.state.dark)
        self.draw()

    def _tell_measured(self) -> None:
        """What every candidate lost in validation, and which won; hidden where the front was not measured."""
        is_measured = self.choosing.is_measured
        self.measured.box.layout.display = self.won.layout.display = "" if is_measured else "none"
        if is_measured and self.state.validation is not None:
            fig = with_legend(measured_front(self.state.validation), self._per_line)
            # The axes say what is lost.
            self.measured.draw(fig.update_layout(title_text="Measured candidates"), self.state.dark)
            told = f"{self.choosing.won()} Measured on validation samples; lower left is better. Click a marker to choose its plan."
            self.won.value = f'<div class="moa-facts">{html.escape(told.strip())}</div>'

    def _darken(self) -> None:
        self._tell_measured()
        self._recolour()
        self._watch(self._newest)

    def _clicked(self, data: Any) -> None:
        self.pick(str(data[0] if isinstance(data, list | tuple | np.ndarray) else data))

    def _brushed(self, ranges: dict[str, Ranges]) -> None:
        self.brush({name: found for name, found in ranges.items() if name in self.choosing.goals})

    def _new_axes(self) -> None:
        """Draw other axes; what is brushed on those that go is let back in."""
        shown = self.axes.value or self.choosing.first_axes
        self.choosing.brush({name: found for name, found in self.choosing.brushes.items() if name in shown})
        self._recolour()

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
        fig = span_map(last, n, compared_with=first if len(picked) == 2 else None).add_scatter(**ring(self.state.layer, self.state.kv_head))
        self.difference.draw(fig.update_layout(showlegend=False), self.state.dark)

    def _chose_head(self, place: Any) -> None:
        kv_head, layer = (int(index) for index in place)
        self.state.set(layer=layer, kv_head=kv_head)

    def _list(self) -> None:
        brushed, head, rows = self.choosing.brushes, *self.choosing.listed()
        self.clear.disabled = not brushed
        if not brushed:
            self.kept.value = "drag along an axis to keep the plans that pass there; click beside the stroke to let all back in"
            return
        told = f"{len(rows)} of {len(self.choosing.points)} plans kept by {'; '.join(map(goal_text, brushed))}"
        self.kept.value = f"{told}{grid(head, rows) if rows else ''}"

    def _searcher(self) -> Callable[[Handle], Front]:
        solver, density, effort = self.solver.value, self.density.value, self.effort.value
        if self.state.table is None:
            raise ValueError("a search needs a loss table: load a run")

        def told(now: Generation) -> None:
            self.volume.value = f"generation {now.number}: {len(now.values)} plans, hypervolume {now.volume:.4f}"
            if time.monotonic() - self._drawn_s > DRAW_S or now.number == effort:
                self._watch(now)
                self._drawn_s = time.monotonic()

        return lambda handle: self.choosing.search(solver, density, effort, handle, told)

    def _watch(self, now: Generation | None = None) -> None:
        """The search while it runs: its plans, and how their hypervolume grew, beside those of other searches."""
        choosing = self.choosing
        self._newest = now or self._newest
        if now is not None and len(now.goals) > 1:
            self.archive.draw(archive_scatter(now.values, now.goals, now.number), self.state.dark)
        if any(choosing.volumes.values()):
            known = {name: list(values) for name, values in choosing.volumes.items() if values}
            seconds = {name: choosing.seconds[name][: len(values)] for name, values in known.items()}
            fig = hypervolume_curve(known, seconds, choosing.levels).update_layout(title_text="Hypervolume, by generation")
            self.volumes.draw(fig, self.state.dark)
            self.live.layout.display = ""

    def _found(self, front: Front) -> None:
        volume = self.choosing.keep(front)
        self.volume.value = "" if volume is None else f"{len(front)} plans, hypervolume {volume:.4f}"
        self._watch()


def _dimmed(fig: go.Figure, kept: set[str]) -> go.Figure:
    """The figure with all plans but those named `kept` nearly transparent."""
    for trace in fig.data:
        if trace.customdata is not None:
            trace.selectedpoints = [index for index, name in enumerate(trace.customdata) if name in kept]
            trace.unselected = {"marker": {"opacity": 0.15}}
    return fig


def _given(ranges: Ranges) -> Any:
    """Ranges as plotly takes them: none, one, or a list of them."""
    return None if not ranges else ranges[0] if len(ranges) == 1 else ranges
