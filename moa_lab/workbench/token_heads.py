"""The heads behind a traced token: a map and a list of them, and the text as one of them read it."""

from __future__ import annotations

from typing import Any

import ipywidgets as w

from moa_lab.trace import TokenTrace, label
from moa_lab.workbench import trace_text, trace_views
from moa_lab.workbench.canvas import HALF, Canvas, ring
from moa_lab.workbench.chips import Chips
from moa_lab.workbench.page import Pointed
from moa_lab.workbench.room import GAP, NARROWEST, WIDEST, room
from moa_lab.workbench.state import State
from moa_lab.workbench.tracing import Tracing
from moa_lab.workbench.widgets import Errors, choice

BROUGHT, REGAINED = "brought", "regained"
LIST = 490
"""Pixels of the list of heads."""
MAPS = [("what each head brought, dense", BROUGHT), ("what the token would regain", REGAINED)]


class TokenHeads:
    """A click on the map or in the list selects the state's head. The head under the pointer, in either, is marked in both, and what it
    read is shown until the pointer leaves it. tab: the title of the panel's tab.
    """

    def __init__(self, state: State, errors: Errors, tab: str) -> None:
        self.state = state
        self._tracing: Tracing | None = None
        self._trace: TokenTrace | None = None
        self.what = choice("map", MAPS, "trace-map", "330px")
        self.map = Canvas("token-map", HALF, errors.guard(self._clicked), on_hover=errors.guard(state.hover, keep=True), keys=True)
        self.heads = Chips("share", errors.guard(self._choose), stacked=True)
        self.pointed = Pointed()
        self.pointed.on_msg(errors.guard(lambda _, content, __: self._over(content["over"]), keep=True))
        self.where, self.reach, self.read = w.HTML(), w.HTML(), w.HTML()
        self.where.add_class("moa-trace-where")
        self.read.add_class("moa-trace-text")
        self.what.observe(errors.guard(lambda _: self.draw()), "value")
        columns = w.HTML(f'<div class="moa-columns">{trace_views.COLUMNS}</div>')
        hint = w.HTML(trace_views.heading("Heads", trace_views.HEADS_HINT))
        listed = w.VBox([hint, columns, self.heads.box, self.pointed], layout=w.Layout(max_width=f"{LIST}px"))
        mapped = w.VBox([self.what, self.map.box])
        both = w.HBox([mapped, listed], layout=w.Layout(flex_flow="row wrap", grid_gap=f"6px {GAP}px"))
        self.box = w.VBox([both, self.where, self.reach, self.read])
        state.watch_in(tab, ["width"], self._fit)
        self._fit()
        state.watch_in(tab, ["hovered"], errors.guard(self._draw_head, keep=True))

    def _fit(self) -> None:
        """The list beside the map, which has what the list leaves."""
        free = room(self.state.width)
        left = free - LIST - GAP
        self.map.resize(min(left, WIDEST) if left >= NARROWEST else free)

    def show(self, tracing: Tracing, trace: TokenTrace) -> None:
        """Draw what is behind this token."""
        self._tracing, self._trace = tracing, trace
        self.draw()

    def draw(self) -> None:
        """Draw it anew."""
        tracing, trace, state = self._tracing, self._trace, self.state
        if tracing is None or trace is None:
            return
        fig = trace_views.map_of(trace, label(tracing.piece(trace.position)), regained=self.what.value == REGAINED)
        self.map.draw(fig.add_scatter(**ring(state.layer, state.kv_head)), state.dark)
        self._draw_head()

    def _draw_head(self) -> None:
        """Mark the head under the pointer, and show what it read, or else what the selected one did."""
        tracing, trace, state = self._tracing, self._trace, self.state
        if tracing is None or trace is None:
            return
        self.map.spot(state.hovered)
        self.heads.show(trace_views.head_chips(trace, (state.layer, state.kv_head), state.hovered))
        share = trace.share(*(state.hovered or (state.layer, state.kv_head)))
        self.where.value = trace_views.heading(
            f"What layer {share.layer}, KV head {share.kv_head} read", "The text before the token, folded far from sources."
        )
        self.reach.value = trace_text.reach_html(trace, share)
        self.read.value = trace_text.text_html(tracing, trace, share)

    def _clicked(self, place: Any) -> None:
        kv_head, layer = place
        self.state.set(layer=int(layer), kv_head=int(kv_head))

    def _choose(self, number: int) -> None:
        head = self._listed(number)
        if head is not None:
            self.state.set(layer=head[0], kv_head=head[1])

    def _over(self, number: int | None) -> None:
        self.state.set(hovered=None if number is None else self._listed(number))

    def _listed(self, number: int) -> tuple[int, int] | None:
        """The head of a row of the list; None where there is no such row any more."""
        if self._trace is None:
            return None
        shown = trace_views.shown_shares(self._trace, (self.state.layer, self.state.kv_head))
        return (shown[number].layer, shown[number].kv_head) if number < len(shown) else None
