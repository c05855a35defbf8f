"""Measured scores over density, of all runs of the state's model that are known and of what is measured now, with the density of the
budget marked."""

from __future__ import annotations

import contextlib
import html
from collections.abc import Callable, Sequence
from dataclasses import replace

import ipywidgets as w

from moa_lab.evaluate.options import NEEDLES, TEXTS, Option
from moa_lab.evaluate.over_bytes import measured_at, scores_over_bytes
from moa_lab.figures.densities import score_by_density
from moa_lab.figures.theme import OUTLINE
from moa_lab.plan import Plan, dense_plan
from moa_lab.records import Measurement
from moa_lab.workbench.advising import Advising
from moa_lab.workbench.canvas import HALF, Canvas, with_legend
from moa_lab.workbench.jobs import Handle
from moa_lab.workbench.measuring import Entry, Measuring
from moa_lab.workbench.nearest import lost_text, nearest_text
from moa_lab.workbench.state import State
from moa_lab.workbench.widgets import Errors, Work, choice, row, whole

KINDS = {NEEDLES: "retrieval", "documents": "perplexity"}
"""What measures a task here; own answers are measured by a run."""
NOW = "measured now"


class MeasuredCurves:
    """Drawn where anything was measured; `mark` moves a line to a plan's density. lost: what runs measured nearest to it, in a sentence.

    measuring: makes the controller that measures the plan that is marked, and with it loads the model, when that is first asked for;
    None: nothing is measured here.
    """

    def __init__(self, state: State, errors: Errors, measuring: Callable[[], Measuring] | None = None) -> None:
        self.state, self._make = state, measuring
        self._plan: Plan | None = None
        self._density_at: Callable[[int], float] = lambda _: 0.0
        self._measuring: Measuring | None = None
        self.options: tuple[Option, ...] = ()
        self.now: list[Measurement] = []
        self._drawn: list[Measurement] = []
        # Raised where no run of this model was measured yet.
        with contextlib.suppress(ValueError):
            self.options = Advising(state).options()
        self.places = measured_at(self.options) or [(task, state.n_tokens) for task in KINDS if measuring is not None]
        names = [(f"{TEXTS.get(task, task)}, {length:,} tokens", (task, length)) for task, length in self.places]
        self.place = choice("measured", names or [("nothing yet", None)], "measured-place", "300px")
        self.canvas = Canvas("measured-curve", HALF)
        self.nearest = w.HTML()
        self.nearest.add_class("moa-nearest")
        self.lost = w.HTML()
        self.lost.add_class("moa-lost")
        self.place.observe(errors.guard(lambda _: self.draw()), "value")
        self.texts = whole("texts", 16, 1, 1024, "measured-texts", "130px")
        self.work = Work("Measure this density", "measure-density", errors, self._begin, self._measured)
        state.watch_in("Budget", ["dark"], errors.guard(self.draw))
        measures = [row(self.texts, self.work.box)] if measuring is not None else []
        self.box = w.VBox([self.place, self.canvas.box, self.nearest, *measures], layout=w.Layout(display="" if self.places else "none"))
        self.resize(HALF)
        self.draw()

    @property
    def is_shown(self) -> bool:
        """Whether anything was measured, or may be."""
        return bool(self.places)

    def resize(self, width: int) -> None:
        """Be so many pixels wide."""
        self.canvas.resize(width)
        self.box.layout.width = f"{width}px"

    def draw(self) -> None:
        """Draw the chosen score."""
        rows = self._drawn = self._rows()
        self.canvas.box.layout.display = "" if rows else "none"
        if rows:
            fig = with_legend(score_by_density(rows, *self.place.value), per_line=1)
            # Task and length are chosen right above.
            self.canvas.draw(fig.update_layout(title_text=fig.layout.title.text.partition(":")[0]), self.state.dark)
            self._mark()

    def mark(self, plan: Plan, density_at: Callable[[int], float]) -> None:
        """Show where a plan lies, of which `density_at` tells the density by length; nothing else is drawn anew."""
        self._plan, self._density_at = plan, density_at
        self._mark()

    def _mark(self) -> None:
        told = lost_text(self.options, self._density_at)
        self.lost.value = f'<div role="status">{html.escape(told)}</div>' if self.options else ""
        if self.places and self.canvas.box.layout.display == "":
            # At the length that is drawn: a plan that keeps half of one length may keep less of a longer one.
            density = self._density_at(self.place.value[1])
            line = {"type": "line", "x0": 100 * density, "x1": 100 * density, "y0": 0, "y1": 1, "yref": "paper"}
            self.canvas.widget.layout.shapes = [{**line, "line": {"color": OUTLINE, "width": 2, "dash": "dot"}}]
            self.nearest.value = f'<div class="moa-facts">{html.escape(nearest_text(self._drawn, density))}</div>'

    def check_idle(self) -> None:
        """Raise ValueError while a density is measured."""
        if self.work.is_running:
            raise ValueError("a density is being measured: cancel that first, or wait for its end")

    def another_model(self) -> None:
        """Load the model named now at the next measurement. Raises ValueError while one is under way."""
        self.check_idle()
        self._measuring = None

    def _rows(self) -> list[Measurement]:
        if not self.places:
            return []
        task, length = self.place.value
        told = [row for row in self.now if (row.task, row.length) == (task, length)]
        return [*scores_over_bytes(self.options, task, length), *told]

    def _begin(self) -> Callable[[Handle], list[Entry]]:
        plan, (task, length), n = self._plan, self.place.value, self.texts.value
        if task not in KINDS:
            raise ValueError("own answers are measured by a run: choose needles or documents")
        if plan is None:
            raise ValueError("there is no plan to measure")
        # Beside runs the dense model is drawn as they measured it.
        plans: Sequence[Plan] = (plan,) if self.options else (dense_plan(plan.geometry), plan)
        return lambda handle: self._controller().measure(plans, [KINDS[task]], length, n, 0, handle)

    def _controller(self) -> Measuring:
        if self._measuring is None:
            assert self._make is not None, "the button is there only where something measures"
            self._measuring = self._make()
        return self._measuring

    def _measured(self, entries: Sequence[Entry]) -> None:
        for row_ in (entry.row for entry in entries):
            # Rows of one plan and name are a line; the dense model has a line of its own.
            named = row_.plan if row_.density >= 1 else f"{NOW}, n = {row_.n}-{100 * row_.density:.3g}"
            self.now.append(replace(row_, plan=named))
        self.draw()
