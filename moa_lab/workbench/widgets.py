"""Parts of all panels: error messages, figures that are redrawn in place, progress of long work."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from functools import cache, wraps
from typing import Any, ParamSpec

import ipywidgets as w
import numpy as np
import plotly.graph_objects as go
from plotly.io.json import to_json_plotly

from moa_lab.figures import template
from moa_lab.figures.theme import OUTLINE
from moa_lab.text import one_line
from moa_lab.workbench.jobs import Handle, Job
from moa_lab.workbench.page import Figure

P = ParamSpec("P")

WIDE, HALF = 860, 520
"""Pixels of a figure that is as wide as a panel on a laptop (1366 pixels, the file browser open), and of one with facts beside it."""

STYLE = """<style>
.moa-bench { max-width: 1180px; }
.moa-bench .widget-tab > .lm-TabBar .lm-TabBar-tab { flex: 0 1 auto; }
.moa-error { border-left: 4px solid #d55e00; padding: 4px 10px; white-space: pre-wrap; }
.moa-worse p { margin: 0; max-width: 860px; line-height: 1.4; }
.moa-facts table, .moa-history table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.moa-facts, .moa-history { line-height: 1.5; }
.moa-facts td, .moa-facts th, .moa-history td, .moa-history th { padding: 2px 10px 2px 0; text-align: left; font-size: 13px; }
.moa-history { max-width: 860px; max-height: 320px; overflow: auto; }
.moa-parallel .axis .domain, .moa-parallel .axis line { stroke: #7a808a !important; stroke-opacity: 0.8 !important; }
.moa-history td, .moa-history th { white-space: nowrap; text-align: left !important; }
.moa-history td:last-child { white-space: normal; min-width: 12em; }
.moa-advice { line-height: 1.5; max-width: 860px; }
.moa-bench pre { white-space: pre; overflow-x: auto; max-width: 860px; line-height: 1.3; }
.moa-said { white-space: pre-wrap; max-height: 240px; overflow: auto; }
</style>"""


class Errors:
    """A box for error messages. `guard` makes a callback that clears the box and shows its own error there."""

    def __init__(self, name: str) -> None:
        self.box = w.HTML()
        self.box.add_class(f"moa-{name}-error")

    def show(self, message: str) -> None:
        """Show `message`; "" for none."""
        self.box.value = f'<div class="moa-error" role="alert">{html.escape(message)}</div>' if message else ""

    def guard(self, callback: Callable[P, object]) -> Callable[P, None]:
        """`callback` with its errors shown; an error raised in a widget's callback would go unnoticed."""

        @wraps(callback)
        def guarded(*args: P.args, **settings: P.kwargs) -> None:
            # Cleared before the call, not after it: messages of watchers and jobs that it starts must stay.
            self.show("")
            try:
                callback(*args, **settings)
            # Any error.
            except Exception as error:
                self.show(one_line(error))

        return guarded


class Canvas:
    """A figure `width` pixels wide that is redrawn in place; the width is fixed, since plotly cannot measure it in a hidden tab.

    Nothing reaches the page before the first `draw`.

    on_click: called with the clicked point's (row, column) of a heat-map, or its customdata. on_brush: called with the ranges kept on
    every brushed axis of parallel coordinates, by the axis's name, whenever they or the order of the axes change.
    """

    def __init__(
        self, name: str, width: int, on_click: Callable[[Any], None] | None = None, on_brush: Callable[[dict[str, Any]], None] | None = None
    ) -> None:
        self._width = width
        self._widget: go.FigureWidget | None = None
        self.box = w.Box([], layout=w.Layout(width=f"{width}px", overflow="hidden"))
        self.box.add_class(f"moa-{name}")
        self._on_click, self._on_brush = on_click, on_brush
        self._drawn: tuple[bool, str] | None = None

    @property
    def widget(self) -> go.FigureWidget:
        """The figure on the page. Raises ValueError before the first `draw`."""
        if self._widget is None:
            raise ValueError("nothing was drawn here yet")
        return self._widget

    def draw(self, fig: go.Figure, dark: bool = False) -> None:
        """Show `fig`: traces of the same kinds are updated where they are, which keeps zoom and clicks; only what changed is sent."""
        traces = [trace.to_plotly_json() for trace in fig.data]
        layout = {**fig.layout.to_plotly_json(), "width": self._width, "template": _template(dark)}
        for trace in traces:
            if trace["type"] == "heatmap":
                # A grid is sent as JSON, which has no NaN.
                trace.update({name: _with_none(trace[name]) for name in ("z", "customdata") if name in trace})
        drawn = (dark, to_json_plotly({name: value for name, value in layout.items() if name != "template"}))
        if self._widget is None:
            self._widget = Figure(go.Figure(traces, layout))
            self.box.children = (self._widget,)
            self._listen()
            self._drawn = drawn
            return
        with self.widget.batch_update():
            if [(trace["type"], trace.get("name")) for trace in traces] == [(trace.type, trace.name) for trace in self.widget.data]:
                for old, new in zip(self.widget.data, traces, strict=True):
                    old.update(new, overwrite=True)
            else:
                self.widget.data = []
                self.widget.add_traces(traces)
                self._listen()
        # An unchanged layout is not sent: it is as much work for the page as the traces.
        if drawn != self._drawn:
            self._lay_out(layout)
            self._drawn = drawn

    def recolour(self, grids: dict[str, Any], marks: Sequence[dict[str, Any]]) -> None:
        """Change the heat-map drawn last, and the places of the markers over it, and nothing else: what a slider may cost.

        grids: its "z" and whatever else changed, as rows of numbers without NaN. marks: x and y of every further trace, in order.
        """
        heat, *others = self.widget.data
        with self.widget.batch_update():
            heat.update({name: np.ascontiguousarray(grid) for name, grid in grids.items()})
            for trace, mark in zip(others, marks, strict=True):
                trace.update({"x": mark["x"], "y": mark["y"]})

    def _lay_out(self, layout: dict[str, Any]) -> None:
        # The page merges a new layout into the old one: entries it no longer has (shapes, notes) must be removed.
        gone = set(self.widget.layout.to_plotly_json()) - set(layout)
        if gone:
            self.widget.plotly_relayout(dict.fromkeys(gone))
        self.widget.layout = layout

    def _listen(self) -> None:
        for trace in self.widget.data:
            if trace.type == "parcoords":
                trace.on_change(self._brushed, "dimensions")
            elif self._on_click is not None:
                trace.on_click(self._clicked)

    def _brushed(self, _: Any, axes: Any) -> None:
        if self._on_brush is not None:
            self._on_brush({axis.name: _ranges(axis.constraintrange) for axis in axes if axis.constraintrange})

    def _clicked(self, trace: Any, points: Any, _: Any) -> None:
        if self._on_click is None or not points.point_inds:
            return
        index = points.point_inds[0]
        if isinstance(index, list | tuple):
            self._on_click(tuple(index))
        elif trace.customdata is not None:
            self._on_click(trace.customdata[index])


@cache
def _template(dark: bool) -> dict[str, Any]:
    found: dict[str, Any] = template(dark).to_plotly_json()
    return found


def _ranges(kept: Any) -> tuple[tuple[float, float], ...]:
    """The ranges of an axis, which plotly gives as one pair or as many."""
    pairs = kept if isinstance(kept[0], list | tuple) else [kept]
    return tuple((float(low), float(high)) for low, high in pairs)


def _with_none(grid: Any) -> Any:
    """Numbers with None for NaN; anything else as it is."""
    numbers = np.asarray(grid)
    if grid is None or not np.issubdtype(numbers.dtype, np.floating):
        return grid
    told = numbers.astype(object)
    told[~np.isfinite(numbers)] = None
    return told


def ring(x: float, y: float) -> dict[str, Any]:
    """A marker around the cell of a heat-map that is selected."""
    marker = {"symbol": "square-open", "size": 15, "color": OUTLINE, "line": {"width": 2.5, "color": OUTLINE}}
    return {"x": [x], "y": [y], "mode": "markers", "name": "selected", "marker": marker, "hoverinfo": "skip"}


class Work:
    """A button that starts a job, its progress, and a button that ends it. One job at a time."""

    def __init__(
        self, label: str, name: str, errors: Errors, begin: Callable[[], Callable[[Handle], Any]], finish: Callable[[Any], None]
    ) -> None:
        self._errors, self._begin, self._finish = errors, begin, finish
        self.job: Job[Any] | None = None
        self.start = w.Button(description=label, button_style="primary", layout=w.Layout(width="auto"))
        self.cancel = w.Button(description="Cancel", disabled=True, layout=w.Layout(width="auto"))
        self.bar = w.IntProgress(0, 0, 1, layout=w.Layout(width="160px", display="none"))
        self.label = w.HTML()
        self.label.add_class(f"moa-{name}-status")
        self.start.on_click(errors.guard(self._started))
        self.cancel.on_click(lambda _: self.stop())
        self.box = w.HBox([self.start, self.cancel, self.bar, self.label], layout=w.Layout(align_items="center", flex_flow="row wrap"))
        self.box.add_class(f"moa-{name}")

    @property
    def is_running(self) -> bool:
        """True from the press of the button to the end of the job."""
        return self.job is not None and self.job.is_running

    def stop(self) -> None:
        """Ask the job, if there is one, to stop."""
        if self.job is not None:
            self.job.cancel()
            if self.job.is_running:
                self.label.value = "stopping at the next step"

    def _started(self, _: object) -> None:
        if self.is_running:
            raise ValueError("it is running already: cancel it first, or wait for its end")
        self.job = Job(self._begin(), self._told)
        self.job.start()

    def _told(self, job: Job[Any]) -> None:
        self.start.disabled, self.cancel.disabled = job.is_running, not job.is_running
        self.bar.layout.display = "" if job.is_running else "none"
        self.bar.max, self.bar.value = max(job.total, 1), job.done
        left = f", about {job.left_s:.0f} s left" if job.left_s is not None else ""
        steps = f" {job.done} of {job.total}{left}" if job.is_running and job.total else ""
        self.label.value = f"{job.status}{steps}" if job.is_running else f"{job.status} after {job.elapsed_s:.1f} s"
        if job.status == "failed":
            self._errors.show(job.error)
        elif job.status == "done":
            self._errors.guard(self._finish)(job.result)


def row(*children: w.Widget) -> w.HBox:
    """Widgets side by side, wrapping where there is no room."""
    return w.HBox(list(children), layout=w.Layout(flex_flow="row wrap", align_items="center", grid_gap="6px 10px"))


def number(label: str, value: float, low: float, high: float, step: float, name: str, width: str = "190px") -> w.BoundedFloatText:
    """A number box, which unlike a slider has a name for screen readers."""
    box = w.BoundedFloatText(
        value=value, min=low, max=high, step=step, description=label, layout=w.Layout(width=width), style={"description_width": "initial"}
    )
    box.add_class(f"moa-{name}")
    return box


def whole(label: str, value: int, low: int, high: int, name: str, width: str = "150px") -> w.BoundedIntText:
    """A box for a whole number."""
    box = w.BoundedIntText(
        value=value, min=low, max=high, description=label, layout=w.Layout(width=width), style={"description_width": "initial"}
    )
    box.add_class(f"moa-{name}")
    return box


def choice(label: str, options: Any, name: str, width: str = "230px") -> w.Dropdown:
    """A list to choose from."""
    box = w.Dropdown(options=options, description=label, layout=w.Layout(width=width), style={"description_width": "initial"})
    box.add_class(f"moa-{name}")
    return box


def button(label: str, name: str, tooltip: str = "") -> w.Button:
    """A button as wide as its words."""
    made = w.Button(description=label, tooltip=tooltip, layout=w.Layout(width="auto"))
    made.add_class(f"moa-{name}")
    return made


def facts(rows: list[tuple[str, str]]) -> str:
    """A small table of names and values."""
    cells = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in rows)
    return f'<div class="moa-facts"><table>{cells}</table></div>'


def grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with a head, which scrolls where it is too large."""
    cells = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    titles = "".join(f"<th>{html.escape(title)}</th>" for title in head)
    return f'<div class="moa-history"><table><thead><tr>{titles}</tr></thead><tbody>{cells}</tbody></table></div>'
