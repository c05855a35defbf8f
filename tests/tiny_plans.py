"""Plans for tiny models, shared by the tests of the runtime."""

from __future__ import annotations

from transformers import PreTrainedModel

from moa_lab.models import geometry_of
from moa_lab.plan import Plan, SpanRule


def small_plan(model: PreTrainedModel) -> Plan:
    """Spans so small that a few dozen tokens overflow every one of them."""
    geometry = geometry_of(model)
    rules = tuple(
        tuple(SpanRule(float(9 + 5 * (layer + head)), 0.0) for head in range(geometry.kv_heads)) for layer in range(geometry.layers)
    )
    return Plan(geometry=geometry, rules=rules, sink_tokens=4, min_span=5)
