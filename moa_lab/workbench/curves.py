"""Measured scores over density, of all runs of the state's model that are known, with the density of the budget marked."""

from __future__ import annotations

import ipywidgets as w

from moa_lab.evaluate.recommend import TEXTS, Option, measured_at, scores_over_bytes
from moa_lab.figures.densities import score_by_density
from moa_lab.figures.theme import OUTLINE
from moa_lab.workbench.advising import Advising
from moa_lab.workbench.canvas import HALF, Canvas
from moa_lab.workbench.state import State
from moa_lab.workbench.widgets import Errors, choice


class MeasuredCurves:
    """Drawn where anything was measured; `mark` moves a line to a density."""

    def __init__(self, state: State, errors: Errors) -> None:
        self.state, self._marked = state, 0.0
        self.options: tuple[Option, ...] = ()
        self.places: list[tuple[str, int]] = []
        try:
            self.options = Advising(state).options()
            self.places = measured_at(self.options)
        except ValueError:
            # No run of this model was measured yet: there is nothing to show.
            pass
        names = [(f"{TEXTS.get(task, task)}, {length:,} tokens", (task, length)) for task, length in self.places]
        self.place = choice("measured", names or [("nothing yet", None)], "measured-place", "300px")
        self.canvas = Canvas("measured-curve", HALF)
        self.place.observe(errors.guard(lambda _: self.draw()), "value")
        state.watch_in("Budget", ["dark"], errors.guard(self.draw))
        self.box = w.VBox([self.place, self.canvas.box], layout=w.Layout(display="" if self.places else "none"))
        self.draw()

    def draw(self) -> None:
        """Draw the chosen score."""
        if not self.places:
            return
        self.canvas.draw(score_by_density(scores_over_bytes(self.options, *self.place.value), *self.place.value), self.state.dark)
        self.mark(self._marked)

    def mark(self, density: float) -> None:
        """Show where a density lies; nothing else is drawn anew."""
        self._marked = density
        if self.places:
            line = {"type": "line", "x0": 100 * density, "x1": 100 * density, "y0": 0, "y1": 1, "yref": "paper"}
            self.canvas.widget.layout.shapes = [{**line, "line": {"color": OUTLINE, "width": 2, "dash": "dot"}}]
