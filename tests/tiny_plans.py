"""Plans for tiny models, shared by the tests of the runtime."""

from __future__ import annotations

import numpy as np
from transformers import PreTrainedModel

from moa_lab.models import geometry_of
from moa_lab.plan import WIDTHS, Plan, SpanRule


def small_plan(model: PreTrainedModel) -> Plan:
    """Spans so small that a few dozen tokens overflow every one of them."""
    geometry = geometry_of(model)
    rules = tuple(
        tuple(SpanRule(float(9 + 5 * (layer + head)), 0.0) for head in range(geometry.kv_heads)) for layer in range(geometry.layers)
    )
    return Plan(geometry=geometry, rules=rules, sink_tokens=4, min_span=5)


def mixed_plan(model: PreTrainedModel) -> Plan:
    """Heads with little, with more, and with everything, by turns."""
    geometry = geometry_of(model)
    rules = [SpanRule(9.0, 0.0), SpanRule(30.0, 0.0), SpanRule(0.0, 1.0)]
    dealt = tuple(tuple(rules[(2 * layer + head) % 3] for head in range(geometry.kv_heads)) for layer in range(geometry.layers))
    return Plan(geometry=geometry, rules=dealt, sink_tokens=4, min_span=5)


def stored_plan(model: PreTrainedModel) -> Plan:
    """The same spans in 16, 8 and 4 bits by turns, K and V apart."""
    plan = mixed_plan(model)
    shape = (plan.geometry.layers, plan.geometry.kv_heads, 2)
    return plan.with_bits(np.array(WIDTHS)[np.arange(np.prod(shape)) % 3].reshape(shape))
