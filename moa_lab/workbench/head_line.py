"""One line about a head, above all panels: the one under the pointer in whatever figure, or else the selected one."""

from __future__ import annotations

import html
from collections.abc import Callable, Collection

import ipywidgets as w

from moa_lab.workbench.biography import Biography
from moa_lab.workbench.heads import kept_text
from moa_lab.workbench.state import State

KEYS_HINT = "On a map of heads, arrow keys move the selected head, and space pins it."


def told_head(state: State, biography: Biography | None, pinned: Collection[tuple[int, int]] = ()) -> str:
    """What is known of the head: its kind and ranks where there is a profile, its span where there is a plan, whether it is pinned."""
    layer, kv_head = state.hovered or (state.layer, state.kv_head)
    name = f"Layer {layer}, KV head {kv_head}"
    told = biography.told(layer, kv_head) if biography is not None else f"{name}."
    plan, n = state.plan, state.n_tokens
    if plan is not None and n and layer < plan.geometry.layers and kv_head < plan.geometry.kv_heads:
        # One head alone: all spans of a large model would cost the slider milliseconds.
        rule = plan.rules[layer][kv_head]
        kept = min(rule.span_tokens(n, plan.min_span, plan.span_multiple), plan.geometry.dense_span_tokens(layer, n))
        is_pinned = ", pinned" if (layer, kv_head) in pinned else ""
        told += f" Under {plan.name} it keeps {kept_text(plan.geometry, layer, kept, n)}{is_pinned}."
    return told


class HeadLine:
    """The line as a widget. pinned: the heads that are pinned now."""

    def __init__(self, state: State, biography: Biography | None, pinned: Callable[[], Collection[tuple[int, int]]]) -> None:
        self.state, self._biography, self._pinned = state, biography, pinned
        self.box = w.HTML()
        self.box.add_class("moa-head-line")
        state.watch(["layer", "kv_head", "hovered", "plan", "n_tokens"], self.tell)
        self.tell()

    def tell(self) -> None:
        """Say it anew."""
        pointed = "under the pointer" if self.state.hovered else "selected"
        told = html.escape(told_head(self.state, self._biography, self._pinned()))
        self.box.value = f'<div role="status" title="{KEYS_HINT}"><b>{pointed}:</b> {told}</div>'
