"""A plan with other spans in one head or one layer."""

from __future__ import annotations

from dataclasses import replace

from moa_lab.plan.card import Plan
from moa_lab.plan.rules import DENSE, SpanRule

EDITED = " (edited)"


def with_span(plan: Plan, layer: int, kv_head: int | None, tokens: int | None) -> Plan:
    """`plan` in which a KV head (None: all of the layer) keeps `tokens` at every length (None: everything).

    Its scores are dropped: they were another plan's. Raises ValueError for an unknown head, and for fewer tokens than the plan's shortest
    span.
    """
    geometry = plan.geometry
    if not 0 <= layer < geometry.layers or not (kv_head is None or 0 <= kv_head < geometry.kv_heads):
        raise ValueError(f"there is no layer {layer}, KV head {kv_head}: {geometry.layers} layers of {geometry.kv_heads} KV heads")
    if tokens is not None and tokens < plan.min_span:
        raise ValueError(f"a span must be at least the plan's shortest, {plan.min_span} tokens, got {tokens}")
    rule = DENSE if tokens is None else SpanRule(float(tokens), 0.0)
    heads = range(geometry.kv_heads) if kv_head is None else (kv_head,)
    row = tuple(rule if head in heads else old for head, old in enumerate(plan.rules[layer]))
    name = plan.name if plan.name.endswith(EDITED) else plan.name + EDITED
    return replace(plan, rules=(*plan.rules[:layer], row, *plan.rules[layer + 1 :]), name=name, scores={})
