"""Figures on a panel: drawn again in place, clicked, hovered over, brushed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import ipywidgets as w
import numpy as np
import plotly.graph_objects as go
from plotly.io.json import to_json_plotly

from moa_lab.figures import template
from moa_lab.figures.theme import OUTLINE, TITLE_HEIGHT
from moa_lab.workbench.page import Figure

WIDE, HALF, PAIR = 790, 520, 389
"""Pixels of a figure that is as wide as a panel on a small laptop (1280 pixels, the file browser open), of one with facts beside it, and of
each of two that stand side by side there; where a panel has more room, `moa_lab.workbench.room` gives it to them."""


class Canvas:
    """A figure `width` pixels wide that is redrawn in place; the width is told, since plotly cannot measure it in a hidden tab.

    Nothing reaches the page before the first `draw`.

    on_click: called with the clicked point's (row, column) of a heat-map, or its customdata. on_hover: called with the same of the point
    under the pointer, and with None when the pointer leaves it. on_brush: called with the ranges kept on every brushed axis of parallel
    coordinates, by the axis's name, whenever they or the order of the axes change. keys: it is a map of heads, which can have the focus,
    so that arrow keys move the selected head.
    """

    def __init__(
        self,
        name: str,
        width: int,
        on_click: Callable[[Any], None] | None = None,
        on_brush: Callable[[dict[str, Any]], None] | None = None,
        on_hover: Callable[[Any], None] | None = None,
        keys: bool = False,
    ) -> None:
        self._width = width
        self._widget: go.FigureWidget | None = None
        self.box = w.Box([], layout=w.Layout(width=f"{width}px", overflow="hidden"))
        self.box.add_class(f"moa-{name}")
        if keys:
            self.box.add_class("moa-keys")
        self._on_click, self._on_brush, self._on_hover = on_click, on_brush, on_hover
        self._shapes: tuple[Any, ...] = ()
        self._spot: tuple[float, float] | None = None
        self._is_under_pointer = False
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
        self._shapes = tuple(layout.get("shapes", ()))
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
            self._drawn, self._spot = drawn, None

    def resize(self, width: int) -> None:
        """Be `width` pixels wide from now on."""
        if width != self._width:
            self._width = width
            self.box.layout.width = f"{width}px"
            if self._widget is not None:
                self._widget.layout.width = width

    def recolour(self, grids: dict[str, Any], marks: Sequence[dict[str, Any]]) -> None:
        """Change the heat-map drawn last, and the places of the markers over it, and nothing else: what a slider may cost.

        grids: its "z" and whatever else changed, as rows of numbers without NaN. marks: x and y of every further trace, in order.
        """
        heat, *others = self.widget.data
        with self.widget.batch_update():
            heat.update({name: np.ascontiguousarray(grid) for name, grid in grids.items()})
            for trace, mark in zip(others, marks, strict=True):
                trace.update({"x": mark["x"], "y": mark["y"]})

    def spot(self, place: tuple[float, float] | None) -> None:
        """Mark what the pointer is over in another figure, at x and y, and nothing else; None takes the mark away.

        The figure that the pointer is over itself is left as it is: it shows what the pointer is at.
        """
        if self._is_under_pointer:
            place = None
        if self._widget is None or place == self._spot:
            return
        self._spot = place
        mark = () if place is None else (_spot(*place),)
        # A shape, which the page draws without drawing the traces anew.
        self._widget.layout.shapes = (*self._shapes, *mark)

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
                continue
            if self._on_click is not None:
                trace.on_click(self._clicked)
            if self._on_hover is not None:
                trace.on_hover(self._hovered)
                trace.on_unhover(lambda *_: self._hovered(None, None, None))

    def _brushed(self, _: Any, axes: Any) -> None:
        if self._on_brush is not None:
            self._on_brush({axis.name: _ranges(axis.constraintrange) for axis in axes if axis.constraintrange})

    def _clicked(self, trace: Any, points: Any, _: Any) -> None:
        place = _place(trace, points)
        if self._on_click is not None and place is not None:
            self._on_click(place)

    def _hovered(self, trace: Any, points: Any, _: Any) -> None:
        place = None if points is None else _place(trace, points)
        if points is not None and place is None:
            # Every trace hears of a hover; this is not the one that the pointer is over.
            return
        self._is_under_pointer = place is not None
        if self._on_hover is not None:
            self._on_hover(place)


def _place(trace: Any, points: Any) -> Any:
    """(row, column) of a heat-map's point, or a point's customdata; None where there is neither."""
    if not points.point_inds:
        return None
    index = points.point_inds[0]
    if isinstance(index, list | tuple):
        return tuple(index)
    return None if trace.customdata is None else trace.customdata[index]


def _spot(x: float, y: float) -> dict[str, Any]:
    """A circle around a point, of the same size however large the axes."""
    ends = {"x0": -9, "x1": 9, "y0": -9, "y1": 9, "xsizemode": "pixel", "ysizemode": "pixel", "xanchor": x, "yanchor": y}
    return {"type": "circle", **ends, "line": {"color": OUTLINE, "width": 2}}


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


def with_legend(fig: go.Figure, per_line: int = 2) -> go.Figure:
    """The figure with room for its legend, which has so many names per line."""
    lines = -(-sum(trace.showlegend is not False for trace in fig.data) // per_line)
    return fig.update_layout(margin_t=TITLE_HEIGHT + 10 + 20 * lines, height=370 + 20 * lines)


def ring(x: float, y: float) -> dict[str, Any]:
    """A marker around the cell of a heat-map that is selected."""
    marker = {"symbol": "square-open", "size": 15, "color": OUTLINE, "line": {"width": 2.5, "color": OUTLINE}}
    return {"x": [x], "y": [y], "mode": "markers", "name": "selected", "marker": marker, "hoverinfo": "skip", "cliponaxis": False}
