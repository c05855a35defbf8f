"""`with apply_plan(model, plan):` runs transformers' own model under a plan."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, TypeVar

from transformers import PreTrainedModel

from moa_lab.geometry.wrappers import plain_model
from moa_lab.interface import route_attention
from moa_lab.interface.routes import routes
from moa_lab.models import geometry_of, weights_fingerprint
from moa_lab.plan import PlanOrPath, as_plan
from moa_lab.runtime.arguments import whole_number
from moa_lab.runtime.attention import SpanAttention
from moa_lab.runtime.caches import check_cache, check_generation
from moa_lab.runtime.hf_cache import RingCache

Model = TypeVar("Model")


@contextlib.contextmanager
def apply_plan(model: Model, plan: PlanOrPath, n_tokens: int | None = None) -> Iterator[Model]:
    """Give every KV head of `model` its sink and window; the model is as before on exit, also after an exception.

    plan: a plan, or the path of its config card. n_tokens: the length N that elastic rules are evaluated at: prompt and new tokens
    together. None: the length of each new prompt, so pass it when a prompt is fed in chunks or when generation is long.
    Every query of a head sees the sink and its window, in prefill as in decoding. Wherever transformers would make a cache, in a
    forward pass or in `generate`, a `RingCache` is made, which keeps nothing else; a cache that is passed in is used as it is, and
    masked. `generate` refuses another kind by name (`cache_implementation`), and static caches altogether, with ValueError.
    Blocks may be nested: the inner plan alone is in force, and takes no cache of the outer one.
    model: a transformers model or what wraps one (`plain_model`: compiled, PEFT, data parallel). The plan holds for the thread or task
    that enters it, each its own; where another calls the model without one, RuntimeError is raised before any work is done.
    A compiled model may be compiled before or after: attention and caches stay outside its graphs. Compiled whole (fullgraph=True) it
    makes a cache of its own, which the plan masks but which keeps everything; to go on over it, `n_tokens` must be given.
    Raises ValueError for a plan of another geometry, a length beyond the model, or a model that cannot be routed.
    """
    plan = as_plan(plan)
    inner = plain_model(model)
    geometry = geometry_of(inner)
    plan.check_model(geometry, weights_fingerprint(inner) if plan.provenance.weights else None)
    if n_tokens is not None and not 1 <= whole_number("n_tokens", n_tokens, None) <= geometry.max_length:
        raise ValueError(f"n_tokens must lie in 1..{geometry.max_length} (the model's maximum length), got {n_tokens}")
    # A head that keeps everything keeps as much as this model takes, whatever length the card was written with.
    spans = SpanAttention(replace(plan, geometry=geometry), n_tokens)
    try:
        with route_attention(inner, spans.handler, _Rings(spans)):
            yield model
    finally:
        spans.active = False


def ring_cache(model: PreTrainedModel, capacity: int | None = None) -> RingCache:
    """An empty cache for `model` under the plan that is applied to it, with room for `capacity` tokens a row.

    Raises ValueError where no plan is applied in this thread or task, and for a capacity below 1.
    """
    if capacity is not None:
        whole_number("capacity", capacity)
    inner = plain_model(model)
    for route in routes():
        if route.model is inner and isinstance(route.caches, _Rings):
            return route.caches.new(capacity)
    raise ValueError("no plan is applied to this model: make its cache inside `with apply_plan(model, plan):`")


class _Rings:
    """Ring caches, wherever a forward pass or `generate` would make a cache."""

    def __init__(self, spans: SpanAttention) -> None:
        self._spans = spans

    def begin(self, past: Any) -> None:
        check_cache(past, self._spans)
        self._spans.begin(past)

    def begin_in_graph(self, *, goes_on: bool) -> None:
        if not goes_on:
            self._spans.begin(None)
        elif self._spans.fixed is None:
            raise RuntimeError(
                "a graph of one piece goes on over a cache, and cannot ask it for the length that spans are taken at: "
                "give apply_plan n_tokens, or compile without fullgraph=True"
            )

    def check_generation(self, generation_config: Any, given: Any) -> None:
        check_generation(generation_config, given)

    def new(self, capacity: int | None = None) -> RingCache:
        return RingCache(self._spans, capacity)
