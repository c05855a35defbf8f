"""Heads: which matter far back, and one of them up close."""

from __future__ import annotations

from typing import Any

import ipywidgets as w
import numpy as np
from scipy.stats import spearmanr

from moa_lab.figures import head_blocks, influence_by_distance, influence_map, long_range_influence
from moa_lab.records import InfluenceProfile, ProfileKey
from moa_lab.workbench.state import State
from moa_lab.workbench.widgets import Canvas, Errors, choice, facts, ring, row, whole


def rank_stability(first: InfluenceProfile, key: ProfileKey, second: InfluenceProfile, other: ProfileKey, beyond_tokens: int) -> float:
    """Spearman's correlation of the heads' long-range influence in two profiles (or two lengths or tasks of one).

    Raises ValueError for profiles of other models.
    """
    if first.geometry != second.geometry:
        raise ValueError("the two profiles are of models of different geometry: their heads cannot be compared")
    values = [long_range_influence(profile, task, length, beyond_tokens) for profile, (task, length) in ((first, key), (second, other))]
    return float(spearmanr(values[0].ravel(), values[1].ravel()).statistic)


class HeadsPanel:
    """Needs a profile in the state; a click on the map chooses the state's head."""

    def __init__(self, state: State, others: dict[str, InfluenceProfile] | None = None) -> None:
        if state.profile is None:
            raise ValueError("heads are shown from a profile: load a run, or make one with moa_lab.profile(model, samples)")
        self.state, self.profile, self.errors = state, state.profile, Errors("heads")
        self.profiles = {"this profile": state.profile, **(others or {})}
        self.query_head = state.kv_head * state.profile.geometry.group_size
        keys = [(f"{task}, {length:,} tokens", (task, length)) for task, length in self.profile.keys]
        self.what = choice("influence on", keys, "heads-key", "320px")
        self.what.value = (state.task, state.length)
        self.beyond = whole("beyond (tokens)", 128, 0, max(self.profile.lengths) - 1, "beyond", "190px")
        self.against = choice("ranks against", self._comparable(), "against", "400px")
        self.stability, self.rule = w.HTML(), w.HTML()
        self.rule.add_class("moa-head-facts")
        self.map = Canvas("influence", 1000, self.errors.guard(self._clicked))
        self.blocks, self.curve = Canvas("blocks", 480), Canvas("curve", 520)
        self.what.observe(self.errors.guard(self._new_key), "value")
        self.beyond.observe(self.errors.guard(lambda _: self._draw_map()), "value")
        self.against.observe(self.errors.guard(lambda _: self._draw_map()), "value")
        state.watch_in("Heads", ["layer", "kv_head"], self._new_head)
        state.watch_in("Heads", ["plan", "n_tokens"], self._draw_head)
        state.watch_in("Heads", ["dark"], self.draw)
        self.box = w.VBox(
            [
                row(self.what, self.beyond, self.against, self.stability),
                self.errors.box,
                self.map.box,
                self.rule,
                w.HBox([self.blocks.box, self.curve.box], layout=w.Layout(flex_flow="row wrap")),
            ]
        )
        self.draw()

    def draw(self) -> None:
        """Draw everything."""
        self._draw_map()
        self._draw_head()

    def _draw_map(self) -> None:
        task, length = self.what.value
        fig = influence_map(self.profile, task, length, self.beyond.value)
        fig.add_scatter(**ring(self.state.layer, self.query_head))
        self.map.draw(fig.update_layout(showlegend=False), self.state.dark)
        name, key = self.against.value
        found = rank_stability(self.profile, (task, length), self.profiles[name], key, self.beyond.value)
        self.stability.value = f"rank correlation of heads: <b>{found:+.2f}</b>"

    def _draw_head(self) -> None:
        task, length = self.what.value
        layer, head, plan = self.state.layer, self.query_head, self.state.plan
        self.blocks.draw(head_blocks(self.profile, task, length, layer, head, plan), self.state.dark)
        self.curve.draw(influence_by_distance(self.profile, task, length, layer, head, plan), self.state.dark)
        self.rule.value = facts(self._told(task, length))

    def _told(self, task: str, length: int) -> list[tuple[str, str]]:
        layer, kv_head = self.state.layer, self.state.kv_head
        far = long_range_influence(self.profile, task, length, self.beyond.value)
        rank = int((far > far[layer, self.query_head]).sum()) + 1
        rows = [
            ("head", f"layer {layer}, query head {self.query_head} (KV head {kv_head})"),
            ("influence", f"{far[layer, self.query_head]:.3g} nats beyond {self.beyond.value:,} tokens, rank {rank} of {far.size}"),
        ]
        plan = self.state.plan
        if plan is not None:
            rule, n = plan.rules[layer][kv_head], self.state.n_tokens
            grown = f"{rule.alpha:,.0f} + {rule.beta:.3g} N tokens" if not rule.keeps_everything else "everything"
            rows.append(("rule", f"{grown}: {int(plan.spans(n)[layer, kv_head]):,} of {n:,} tokens"))
        return rows

    def _comparable(self) -> list[tuple[str, tuple[str, ProfileKey]]]:
        return [
            (f"{name}: {task}, {length:,} tokens", (name, (task, length)))
            for name, profile in self.profiles.items()
            for task, length in profile.keys
        ]

    def _new_key(self, change: dict[str, ProfileKey]) -> None:
        task, length = change["new"]
        self.state.set(task=task, length=length)
        self.draw()

    def _clicked(self, place: Any) -> None:
        head, layer = (int(index) for index in place)
        group = self.profile.geometry.group_size
        before = (self.state.layer, self.state.kv_head)
        self.query_head = head
        self.state.set(layer=layer, kv_head=head // group)
        if before == (layer, head // group):
            self.draw()

    def _new_head(self) -> None:
        group = self.profile.geometry.group_size
        if self.query_head // group != self.state.kv_head:
            # Chosen elsewhere, as a KV head: the query head of its group that looks furthest.
            heads = np.arange(self.state.kv_head * group, (self.state.kv_head + 1) * group)
            task, length = self.what.value
            far = long_range_influence(self.profile, task, length, self.beyond.value)[self.state.layer]
            self.query_head = int(heads[far[heads].argmax()])
        self.draw()
