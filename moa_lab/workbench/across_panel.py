"""Runs: scores and fronts of several runs and models over each other."""

from __future__ import annotations

import contextlib

import ipywidgets as w
import plotly.graph_objects as go

from moa_lab.evaluate.options import TEXTS
from moa_lab.figures import fronts_over, score_by
from moa_lab.figures.front import goal_text
from moa_lab.workbench.across import Across
from moa_lab.workbench.canvas import WIDE, Canvas, with_legend
from moa_lab.workbench.opening import known_runs, named
from moa_lab.workbench.room import columns, room
from moa_lab.workbench.state import State
from moa_lab.workbench.widgets import OWN_WIDTH, Errors, button, choice, grid, row, side_by_side

TAB = "Runs"
NARROWEST = 600
"""Pixels of a figure whose legend names runs and their models."""


class AcrossPanel:
    """Draws `across`; other runs are read when they are added."""

    def __init__(self, state: State, across: Across | None = None) -> None:
        self.state, self.errors, self.across = state, Errors("across"), across or Across()
        self.path = w.Combobox(
            options=[named(path) for path in known_runs()],
            placeholder="a run's folder",
            description="run",
            layout=w.Layout(width="420px"),
            style=OWN_WIDTH,
        )
        self.path.add_class("moa-across-run")
        add, every = button("Add run", "add-run"), button("Add all known", "add-runs", "in ./runs and the recorded ones")
        self.open = choice("compared", [("", "")], "across-open", "330px")
        remove = button("Remove", "remove-run")
        self.place = choice("measured", [("nothing yet", None)], "across-place", "330px")
        self.every = w.Checkbox(False, description="all plans that were measured", indent=False, layout=w.Layout(width="auto"))
        self.every.add_class("moa-across-every")
        self.x, self.y = choice("across", [("", "")], "across-x", "300px"), choice("up", [("", "")], "across-y", "300px")
        self.table = w.HTML()
        self.table.add_class("moa-across-table")
        self.head = w.HTML()
        self.head.add_class("moa-across-head")
        self.scores, self.fronts = Canvas("across-scores", WIDE), Canvas("across-fronts", WIDE)
        self._loading = False
        add.on_click(self.errors.guard(lambda _: self.add(self.path.value)))
        every.on_click(self.errors.guard(lambda _: self._add_all()))
        remove.on_click(self.errors.guard(lambda _: self._remove(self.open.value)))
        for box in (self.place, self.every, self.x, self.y):
            box.observe(self.errors.guard(lambda _: None if self._loading else self.draw()), "value")
        state.watch_in(TAB, ["dark"], self.errors.guard(self.draw))
        state.watch_in(TAB, ["layer", "kv_head"], self.errors.guard(self._tell_head))
        state.watch_in(TAB, ["width"], self._fit)
        hint = w.HTML("Needles as a share of what each run's own dense model finds, perplexity above the dense model's; 95% intervals.")
        self.measured = w.VBox([row(self.place, self.every), hint, self.scores.box])
        self.predicted = w.VBox([row(self.x, self.y), self.fronts.box])
        self._fit()
        figures = side_by_side(self.measured, self.predicted)
        self.box = w.VBox([row(self.path, add, every), row(self.open, remove), self.errors.box, self.table, figures, self.head])
        self.load()

    def add(self, folder: str) -> None:
        """Open one more run."""
        self.across.open(folder)
        self.load()

    def _fit(self) -> None:
        for canvas, box in ((self.scores, self.measured), (self.fronts, self.predicted)):
            canvas.resize(columns(room(self.state.width), narrowest=NARROWEST))
            box.layout.width = canvas.box.layout.width

    def load(self) -> None:
        """Offer what the open runs have, and draw it."""
        across = self.across
        places = [(f"{TEXTS.get(task, task)}, {length:,} tokens", (task, length)) for task, length in across.places()]
        goals, shown = across.goals(), self.place.value
        self._loading = True
        try:
            self.open.options = list(across.runs) or [("", "")]
            self.place.options = places or [("nothing yet", None)]
            known = [place for _, place in places]
            self.place.value = shown if shown in known else next(iter(known), None)
            self.x.options = self.y.options = [(goal_text(name), name) for name in goals] or [("", "")]
            if len(goals) > 1:
                self.x.value, self.y.value = goals[-1], goals[0]
        finally:
            self._loading = False
        self.table.value = grid(*across.table()) if across.runs else "no run is compared: add some"
        self._tell_head()
        self.draw()

    def _tell_head(self) -> None:
        """The selected head in every open run."""
        layer, kv_head = self.state.layer, self.state.kv_head
        told = f"<b>Layer {layer}, KV head {kv_head} in these runs</b>{grid(*self.across.head(layer, kv_head))}"
        self.head.value = told if self.across.runs else ""

    def draw(self) -> None:
        """Draw the chosen score and the chosen goals; what no open run has is hidden."""
        place, fronts = self.place.value, self.across.fronts()
        self.measured.layout.display = "" if place else "none"
        self.predicted.layout.display = "" if fronts and self.x.value else "none"
        if place:
            rows = self.across.scores(*place, every=self.every.value)
            what = f"{TEXTS.get(place[0], place[0])}, {place[1]:,} tokens"
            title = "density (% of the dense KV cache)"
            self.scores.draw(_listed(score_by(rows, lambda row: 100 * row.density, title, series="line", what=what)), self.state.dark)
        if fronts and self.x.value:
            self.fronts.draw(_listed(fronts_over(fronts, self.x.value, self.y.value)), self.state.dark)

    def _add_all(self) -> None:
        for path in known_runs():
            # A run that has only begun has no results yet.
            with contextlib.suppress(ValueError):
                self.across.open(path)
        self.load()

    def _remove(self, path: str) -> None:
        self.across.close(path)
        self.load()


def _listed(fig: go.Figure) -> go.Figure:
    """The figure with a legend of a name a line: a model's and a run's are too long for two."""
    return with_legend(fig, per_line=1).update_layout(legend={"orientation": "v", "tracegroupgap": 0})
