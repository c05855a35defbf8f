"""Heads: a map of their long-range influence, details of one of them, and a comparison with another profile, task or length."""

from __future__ import annotations

import math
from typing import Any

import ipywidgets as w

from moa_lab.figures import difference_map, head_blocks, influence_by_distance, influence_map, kind_map, score_map
from moa_lab.records import InfluenceProfile
from moa_lab.workbench.biography import Biography
from moa_lab.workbench.biography_panel import BiographyPanel
from moa_lab.workbench.canvas import PAIR, WIDE, Canvas, ring
from moa_lab.workbench.heads import NUMBER, ORDERS, OWN, SPAN, Heads, described
from moa_lab.workbench.profiles import profile_path
from moa_lab.workbench.room import GAP, columns, room
from moa_lab.workbench.state import State
from moa_lab.workbench.widgets import OWN_WIDTH, Errors, choice, facts, row, side_by_side, whole

INFLUENCE, DIFFERENCE, KIND, SCORES = "influence", "difference", "kind of head", "others' scores"
BY_KV_HEAD = (KIND, SCORES)
"""Views with a row for every KV head, by number."""
EACH = "each"
"""Stands for None, with which a drop-down list has nothing selected."""
POOLS = [("every query head", EACH), ("KV heads: largest", "max"), ("KV heads: mean", "mean"), ("KV heads: sum", "sum")]
BESIDE = 1380
"""Pixels of a panel from which on all three figures stand side by side."""


class HeadsPanel:
    """Draws `heads`: a click on the map chooses the state's head. Needs a profile in the state."""

    def __init__(self, state: State, others: dict[str, InfluenceProfile] | None = None) -> None:
        self.state, self.errors, self.heads = state, Errors("heads"), Heads(state, others)
        keys = [(f"{task}, {length:,} tokens", (task, length)) for task, length in self.heads.profile.keys]
        self.what = choice("influence on", keys, "heads-key", "280px")
        self.what.value = self.heads.key
        self.beyond = whole("beyond (tokens)", self.heads.beyond, 0, max(self.heads.profile.lengths) - 1, "beyond", "170px")
        self.pool = choice("rows", POOLS, "heads-pool", "190px")
        self.view = choice("show", [INFLUENCE, DIFFERENCE, KIND, SCORES], "heads-view", "180px")
        self.against = choice("compared with", self._sources(), "against", "380px")
        self.against.value = self.heads.against
        self.order = choice("heads by", ORDERS, "heads-order", "230px")
        self.name = w.Text(
            placeholder="L12 H3", description="find head", continuous_update=False, layout=w.Layout(width="160px"), style=OWN_WIDTH
        )
        self.name.add_class("moa-heads-find")
        tooltip = "of other calibration texts, lengths or weights of the same model"
        self.path, load = profile_path(self.errors, self.load, "another profile", tooltip)
        self.stability, self.facts = w.HTML(), w.HTML()
        self.stability.add_class("moa-stability")
        self.facts.add_class("moa-head-facts")
        self.map = Canvas(
            "influence", WIDE, self.errors.guard(self._clicked), on_hover=self.errors.guard(self._hovered, keep=True), keys=True
        )
        self.biography = BiographyPanel(state, self.heads, self.errors)
        self.blocks, self.curve = Canvas("blocks", PAIR), Canvas("curve", PAIR)
        self._mapped: tuple[Any, ...] = ()
        self.what.observe(self.errors.guard(lambda change: self.heads.choose_key(*change["new"])), "value")
        self.beyond.observe(self.errors.guard(self._new_beyond), "value")
        self.pool.observe(self.errors.guard(self._new_pool), "value")
        self.view.observe(self.errors.guard(lambda _: self._new_view()), "value")
        self.order.observe(self.errors.guard(self._new_order), "value")
        self.name.observe(self.errors.guard(lambda change: self._find(change["new"])), "value")
        self.against.observe(self.errors.guard(self._new_against), "value")
        self.biography.versus.observe(self.errors.guard(lambda _: self.draw()), "value")
        # One watcher for all: a plan and a head that change together are drawn once.
        watched = ["layer", "kv_head", "task", "length", "plan", "n_tokens", "dark"]
        state.watch_in("Heads", ["hovered"], self._spot)
        state.watch_in("Heads", ["width"], self._fit)
        self._column = w.VBox([self.map.box, self.facts])
        self._fit()
        changed = state.watch_in("Heads", watched, self.errors.guard(self.draw))
        self.box = w.VBox(
            [
                row(self.what, self.beyond, self.pool, self.view, self.order, self.name),
                row(self.against, self.stability),
                row(self.path, load),
                self.errors.box,
                side_by_side(self._column, side_by_side(self.blocks.box, self.curve.box)),
                self.biography.box,
            ]
        )
        changed()

    def _fit(self) -> None:
        """The map as wide as the panel, or as what the head's two figures leave of a wide one."""
        free = room(self.state.width)
        beside = 2 * (PAIR + GAP)
        self.map.resize(free - beside if free >= BESIDE else free)
        self._column.layout.width = self.map.box.layout.width
        for canvas in (self.blocks, self.curve):
            canvas.resize(PAIR if free >= BESIDE else columns(free))

    def draw(self) -> None:
        """Draw the panel; the map only if it changed."""
        heads, state = self.heads, self.state
        self.what.value = heads.key
        head = heads.follow()
        by_span = state.plan if heads.order == SPAN else None
        theirs = self.biography.scores if self.view.value == SCORES else None
        shown = (heads.key, heads.beyond, heads.pool, heads.against, self.view.value, heads.order, by_span, theirs and theirs.name)
        mapped = (*shown, state.layer, heads.head(), state.dark)
        if mapped != self._mapped:
            self._draw_map()
            self._mapped = mapped
        task, length = heads.key
        has_blocks = heads.profile.has_blocks(task, length)
        self.blocks.box.layout.display = "" if has_blocks else "none"
        if has_blocks:
            blocks = head_blocks(heads.profile, task, length, state.layer, head, state.plan)
            # A shorter title: the full one, with task and length, is wider than the figure.
            title = f"L{state.layer} H{head}{'; outlined: seen' if state.plan else ''}"
            self.blocks.draw(blocks.update_layout(title_text=title), state.dark)
        curve = influence_by_distance(heads.profile, task, length, state.layer, head, state.plan)
        self.curve.draw(curve.update_layout(title_text="Influence by distance"), state.dark)
        self.facts.value = facts(heads.facts())
        self.biography.draw()

    def load(self, path: str) -> None:
        """Read another profile, and compare with it."""
        self.heads.load(path)
        against = self.heads.against
        self.against.options = self._sources()
        # Setting the options selected the first one.
        self.against.value = against
        self.biography.offer()
        self.draw()

    @property
    def known(self) -> Biography:
        """What is known of every head."""
        return self.biography.biography

    def step(self, layers: int, rows: int) -> None:
        """Choose the head so many layers to the right and rows down on the map, or the last one on the way."""
        geometry, state = self.heads.profile.geometry, self.state
        count = geometry.kv_heads if self._by_kv_head or self.heads.pool else geometry.query_heads
        row = state.kv_head if self._by_kv_head else self.heads.row()
        self._clicked((min(max(row + rows, 0), count - 1), min(max(state.layer + layers, 0), geometry.layers - 1)))

    def _draw_map(self) -> None:
        heads, (task, length) = self.heads, self.heads.key
        if self.view.value == KIND:
            fig = kind_map(self.biography.biography.patterns(OWN, heads.key).kinds, f"Kinds of heads: {task}, {length:,} tokens")
        elif self.view.value == SCORES:
            scores = self.biography.scores
            if scores is None:
                raise ValueError("load scores of DuoAttention or KVzip below, or choose loaded ones at 'ranks against'")
            fig = score_map(scores.values, f"{scores.method}: {scores.name}", "score")
        elif self.view.value == DIFFERENCE:
            name, key = heads.against
            fig = difference_map(
                heads.profile, heads.key, heads.profiles[name], key, heads.beyond, heads.pool, described(heads.against)
            )  # fmt: skip
        else:
            fig = influence_map(heads.profile, *heads.key, heads.beyond, heads.pool, order=heads.ordered(), by=heads.order)
        fig.add_scatter(**ring(self.state.layer, self.state.kv_head if self._by_kv_head else heads.row()))
        self.map.draw(fig.update_layout(showlegend=False), self.state.dark)
        found = heads.stability()
        told = "not defined: no influence that far back" if math.isnan(found) else f"{found:+.2f}"
        self.stability.value = f"rank correlation of heads: <b>{told}</b>"

    @property
    def _by_kv_head(self) -> bool:
        return self.view.value in BY_KV_HEAD

    def _hovered(self, place: Any) -> None:
        if place is None:
            self.state.set(hovered=None)
            return
        row, layer = (int(index) for index in place)
        self.state.set(hovered=(layer, row if self._by_kv_head else self.heads.kv_head_of(layer, row)))

    def _spot(self) -> None:
        """Mark on the map the head that the pointer is over elsewhere."""
        head = self.state.hovered
        self.map.spot(None if head is None else (head[0], head[1] if self._by_kv_head else self.heads.rows_of(*head)[0]))

    def _sources(self) -> list[tuple[str, Any]]:
        return [(described(source), source) for source in self.heads.sources]

    def _new_beyond(self, change: dict[str, int]) -> None:
        self.heads.beyond = change["new"]
        self.draw()

    def _new_pool(self, change: dict[str, Any]) -> None:
        self.heads.pool = None if change["new"] == EACH else change["new"]
        self.draw()

    def _new_view(self) -> None:
        # Only the map of influence has its heads in another order than by number.
        self.order.disabled = self.view.value != INFLUENCE
        self.heads.order = NUMBER if self.order.disabled else self.order.value
        self.draw()

    def _new_order(self, change: dict[str, str]) -> None:
        self.heads.order = change["new"]
        self.draw()

    def _find(self, text: str) -> None:
        if text.strip() and not self.heads.find(text):
            self.draw()

    def _new_against(self, change: dict[str, Any]) -> None:
        self.heads.compare(change["new"])
        self.draw()

    def _clicked(self, place: Any) -> None:
        row, layer = (int(index) for index in place)
        if self._by_kv_head:
            self.state.set(layer=layer, kv_head=row)
        elif not self.heads.choose_row(layer, row):
            # Another query head of the same KV head: the state is unchanged, so no watcher draws.
            self.draw()
