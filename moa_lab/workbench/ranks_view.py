"""Two rankings of the KV heads over each other, and where scores that others publish are read from."""

from __future__ import annotations

import html
from collections.abc import Callable
from typing import Any

import ipywidgets as w
import numpy as np

from moa_lab.evaluate.compare import rank_agreement
from moa_lab.figures import ranks_compared
from moa_lab.text import interval_text
from moa_lab.workbench.canvas import HALF, Canvas
from moa_lab.workbench.state import State
from moa_lab.workbench.widgets import OWN_WIDTH, Errors, button


class RanksView:
    """A marker for every KV head: a click chooses it, and the head under the pointer is marked here and in other figures of the tab."""

    def __init__(self, state: State, tab: str, errors: Errors) -> None:
        self.state = state
        self._places: dict[tuple[int, int], tuple[float, float]] = {}
        self.canvas = Canvas("ranks", HALF, errors.guard(self._clicked), on_hover=errors.guard(self._hovered, keep=True))
        state.watch_in(tab, ["hovered"], self._spot)

    def draw(self, ours: np.ndarray, theirs: np.ndarray, by_ours: str, by_theirs: str, kinds: np.ndarray | None = None) -> str:
        """Draw what `ranks_compared` does, and return the rank correlation in words, as HTML."""
        fig = ranks_compared(ours, theirs, by_ours, by_theirs, kinds)
        self._places = {
            (int(head[0]), int(head[1])): (float(x), float(y))
            for trace in fig.data
            for head, x, y in zip(trace.customdata, trace.x, trace.y, strict=True)
        }
        self.canvas.draw(fig, self.state.dark)
        found = rank_agreement(ours, theirs)
        interval = interval_text(found.low, found.high, ".2f")
        return f"Rank correlation with the ranks {html.escape(by_theirs)}: <b>{found.value:+.2f}</b> {interval}, n = {found.n:,} KV heads."

    def _clicked(self, head: Any) -> None:
        layer, kv_head = (int(index) for index in head)
        self.state.set(layer=layer, kv_head=kv_head)

    def _hovered(self, head: Any) -> None:
        self.state.set(hovered=None if head is None else (int(head[0]), int(head[1])))

    def _spot(self) -> None:
        head = self.state.hovered
        self.canvas.spot(None if head is None else self._places.get(head))


def scores_path(errors: Errors, load: Callable[[str], object]) -> tuple[w.Text, w.Button]:
    """A box for the file of scores that another method publishes, and the button that calls `load` with what it holds."""
    path = w.Text(
        placeholder="full_attention_heads.tsv, or KVzip's .pt", description="scores of DuoAttention or KVzip",
        layout=w.Layout(width="480px"), style=OWN_WIDTH,
    )  # fmt: skip
    path.add_class("moa-scores-path")
    pressed = button("Load scores", "load-scores", "what another method says of the heads of this model, from its own file")
    pressed.on_click(errors.guard(lambda _: load(path.value)))
    return path, pressed
