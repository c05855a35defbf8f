"""Plans for tiny models, shared by the tests of the runtime and of serving."""

from __future__ import annotations

import numpy as np
from transformers import PreTrainedModel

from moa_lab.geometry import ModelGeometry
from moa_lab.models import geometry_of
from moa_lab.plan import DENSE, WIDTHS, Plan, SpanRule


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


def constant_plan(spans: list[list[int | None]], sink_tokens: int = 4, max_length: int = 4096, **settings: int) -> Plan:
    """Constant spans by layer and KV head; None keeps everything."""
    geometry = ModelGeometry(len(spans), 2 * len(spans[0]), len(spans[0]), 8, max_length)
    rules = tuple(tuple(DENSE if span is None else SpanRule(float(span), 0.0) for span in row) for row in spans)
    return Plan(geometry=geometry, rules=rules, sink_tokens=sink_tokens, min_span=sink_tokens + 1, **settings)
