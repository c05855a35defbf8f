"""A map of the spans of a plan's KV heads, in a chosen order: a click, a key or a name chooses the state's head."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import ipywidgets as w
import numpy as np

from moa_lab.figures import largest_first, long_range_influence, span_map
from moa_lab.figures.order import in_order
from moa_lab.figures.plan import span_details
from moa_lab.figures.theme import OUTLINE, TITLE_HEIGHT
from moa_lab.geometry import ModelGeometry
from moa_lab.plan import Plan
from moa_lab.workbench.canvas import HALF, Canvas, ring
from moa_lab.workbench.finding import find_head
from moa_lab.workbench.heads import INFLUENCE, NUMBER, SPAN
from moa_lab.workbench.state import State
from moa_lab.workbench.widgets import OWN_WIDTH, Errors, choice

LARGE = 1000
"""Heads of a model from which on its map is `LARGE_MAP` pixels across, and tells less of a head."""
LARGE_MAP = 660
TALL = 330
"""Pixels from top to bottom of the map of a model of few KV heads."""


@dataclass(frozen=True)
class Shown:
    """What is drawn: a plan, its spans at `n_tokens` (int64 (layers, kv_heads)), and the heads that are pinned."""

    plan: Plan
    spans: np.ndarray
    n_tokens: int
    pinned: tuple[tuple[int, int], ...] = ()


def is_large(geometry: ModelGeometry) -> bool:
    """Whether a model has so many heads that every change of its map is felt."""
    return geometry.layers * geometry.kv_heads >= LARGE


class SpansMap:
    """Draws the plan that it was shown last. name: the class of its box on the page; `order` and `find` are named after it.

    By influence the heads can be ordered where the state has a profile.
    """

    def __init__(self, state: State, geometry: ModelGeometry, errors: Errors, name: str, find: str, order: str) -> None:
        self.state, self._geometry, self._is_large = state, geometry, is_large(geometry)
        orders = [NUMBER, SPAN, *([INFLUENCE] if state.profile is not None else [])]
        self.order = choice("heads by", orders, order, "200px")
        self.find = w.Text(
            placeholder="L12 H3", description="find head", continuous_update=False, layout=w.Layout(width="160px"), style=OWN_WIDTH
        )
        self.find.add_class(f"moa-{find}")
        width = LARGE_MAP if self._is_large else HALF
        self.canvas = Canvas(name, width, errors.guard(self.choose), on_hover=errors.guard(self._hovered, keep=True), keys=True)
        self._shown: Shown | None = None
        self._look: tuple[object, ...] = ()
        self.order.observe(errors.guard(lambda _: self.draw()), "value")
        self.find.observe(errors.guard(lambda change: self._find(change["new"])), "value")

    def resize(self, width: int) -> None:
        """Be so many pixels wide; a large model's is never narrower than `LARGE_MAP`."""
        self.canvas.resize(max(width, LARGE_MAP) if self._is_large else width)

    def show(self, plan: Plan, spans: np.ndarray, n_tokens: int, pinned: Collection[tuple[int, int]] = ()) -> None:
        """What `draw` draws from now on; spans: the plan's at `n_tokens`, (layers, kv_heads)."""
        self._shown = Shown(plan, spans, n_tokens, tuple(pinned))

    def draw(self) -> None:
        """Draw it; while length, order and theme stay, only the cells and the marks are sent to the page."""
        if self._shown is None:
            return
        shown, order = self._shown, self._order(self._shown.spans)
        places = [
            {"x": [layer for layer, _ in shown.pinned], "y": [_row(order, *head) for head in shown.pinned]},
            {"x": [self.state.layer], "y": [_row(order, self.state.layer, self.state.kv_head)]},
        ]
        look = (shown.n_tokens, self.order.value, self.state.dark)
        if look == self._look:
            self.canvas.recolour(self._grids(shown, order), places)
            return
        fig = span_map(shown.plan, shown.n_tokens, order=order, by=self.order.value, detailed=not self._is_large)
        tall = max(fig.layout.height, TALL)
        fig.update_layout(title_text=f"Spans at {shown.n_tokens:,} tokens", showlegend=False, height=tall)
        fig.update_traces(colorbar_y=1 - TITLE_HEIGHT / tall, selector={"type": "heatmap"})
        cross = {"symbol": "x-thin-open", "size": 11, "color": OUTLINE, "line": {"width": 2, "color": OUTLINE}}
        fig.add_scatter(**places[0], mode="markers", name="pinned", marker=cross, hoverinfo="skip")
        fig.add_scatter(**{**ring(0, 0), **places[1]})
        self.canvas.draw(fig, self.state.dark)
        self._look = look

    def choose(self, place: Any) -> None:
        """Select the head of a (row, layer) of the map."""
        layer, kv_head = self._head_at(place)
        self.state.set(layer=layer, kv_head=kv_head)

    def step(self, layers: int, rows: int) -> None:
        """Select the head so many layers to the right and rows down on the map, or the last one on the way."""
        order, state = None if self._shown is None else self._order(self._shown.spans), self.state
        row = min(max(_row(order, state.layer, state.kv_head) + rows, 0), self._geometry.kv_heads - 1)
        self.choose((row, min(max(state.layer + layers, 0), self._geometry.layers - 1)))

    def spot(self, head: tuple[int, int] | None) -> None:
        """Mark the head that the pointer is over elsewhere."""
        order = None if self._shown is None else self._order(self._shown.spans)
        self.canvas.spot(None if head is None else (head[0], _row(order, *head)))

    def _grids(self, shown: Shown, order: np.ndarray | None) -> dict[str, Any]:
        grids = {"z": in_order(shown.spans, order).T}
        if not self._is_large:
            grids["customdata"] = span_details(shown.plan, shown.spans, shown.n_tokens, order)
        elif order is not None:
            grids["customdata"] = order.T
        return grids

    def _hovered(self, place: Any) -> None:
        self.state.set(hovered=None if place is None else self._head_at(place))

    def _head_at(self, place: Any) -> tuple[int, int]:
        row, layer = (int(index) for index in place)
        order = None if self._shown is None else self._order(self._shown.spans)
        return layer, row if order is None else int(order[layer, row])

    def _order(self, spans: np.ndarray) -> np.ndarray | None:
        """The heads of every layer from the first row of the map to the last, (layers, kv_heads); None: by number."""
        if self.order.value == NUMBER:
            return None
        if self.order.value == INFLUENCE and self.state.profile is not None:
            return largest_first(long_range_influence(self.state.profile, self.state.task, self.state.length, pool="sum"))
        return largest_first(spans)

    def _find(self, text: str) -> None:
        if text.strip():
            layer, kv_head = find_head(text, self._geometry.layers, self._geometry.kv_heads)
            self.state.set(layer=layer, kv_head=kv_head)


def _row(order: np.ndarray | None, layer: int, kv_head: int) -> int:
    """The row of the map that shows a head."""
    return kv_head if order is None else int(np.flatnonzero(order[layer] == kv_head)[0])
