"""`with apply_plan(model, plan):` runs transformers' own model under a plan."""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from moa_lab.interface import route_attention
from moa_lab.models import geometry_of, weights_fingerprint
from moa_lab.plan import PlanOrPath, as_plan
from moa_lab.runtime.arguments import whole_number
from moa_lab.runtime.attention import SpanAttention
from moa_lab.runtime.caches import check_cache, check_generation
from moa_lab.runtime.hf_cache import RingCache

PREPARE = "_prepare_cache_for_generation"
"""Where `generate` makes its cache; a method of its own, so this is the one name of transformers' that is not public."""

_in_force: weakref.WeakKeyDictionary[PreTrainedModel, SpanAttention] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def apply_plan(model: PreTrainedModel, plan: PlanOrPath, n_tokens: int | None = None) -> Iterator[PreTrainedModel]:
    """Give every KV head of `model` its sink and window; the model is as before on exit, also after an exception.

    plan: a plan, or the path of its config card. n_tokens: the length N that elastic rules are evaluated at: prompt and new tokens
    together. None: the length of each new prompt, so pass it when a prompt is fed in chunks or when generation is long.
    Every query of a head sees the sink and its window, in prefill as in decoding. Wherever transformers would make a cache, in a
    forward pass or in `generate`, a `RingCache` is made, which keeps nothing else; a cache that is passed in is used as it is, and
    masked. `generate` refuses another kind by name (`cache_implementation`), and static caches altogether, with ValueError.
    Blocks may be nested: the inner plan alone is in force, and takes no cache of the outer one.
    Raises ValueError for a plan of another geometry, a length beyond the model, or a model that cannot be routed.
    """
    plan = as_plan(plan)
    geometry = geometry_of(model)
    plan.check_model(geometry, weights_fingerprint(model) if plan.provenance.weights else None)
    if n_tokens is not None and not 1 <= whole_number("n_tokens", n_tokens, None) <= geometry.max_length:
        raise ValueError(f"n_tokens must lie in 1..{geometry.max_length} (the model's maximum length), got {n_tokens}")
    # A head that keeps everything keeps as much as this model takes, whatever length the card was written with.
    spans = SpanAttention(replace(plan, geometry=geometry), n_tokens)
    with route_attention(model, spans.handler), _ring_caches(model, spans):
        outer = _in_force.get(model)
        _in_force[model] = spans
        try:
            yield model
        finally:
            spans.active = False
            _in_force.pop(model)
            if outer is not None:
                _in_force[model] = outer


def ring_cache(model: PreTrainedModel, capacity: int | None = None) -> RingCache:
    """An empty cache for `model` under the plan that is applied to it, with room for `capacity` tokens a row.

    Raises ValueError where no plan is applied, and for a capacity below 1.
    """
    if capacity is not None:
        whole_number("capacity", capacity)
    if model not in _in_force:
        raise ValueError("no plan is applied to this model: make its cache inside `with apply_plan(model, plan):`")
    return RingCache(_in_force[model], capacity)


@contextlib.contextmanager
def _ring_caches(model: PreTrainedModel, spans: SpanAttention) -> Iterator[None]:
    """Put a `RingCache` where a forward pass or `generate` would make a cache."""

    def before(_: torch.nn.Module, arguments: tuple[Any, ...], settings: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # Within an inner `apply_plan` the outer one rests.
        if _in_force.get(model) is not spans:
            return arguments, settings
        past = settings.get("past_key_values")
        check_cache(past, spans)
        spans.begin(past)
        wanted = settings.get("use_cache", model.config.get_text_config(decoder=True).use_cache)
        # Attention modules that are trained may be run twice (checkpointing), and keep nothing.
        if wanted and past is None and not model.training:
            settings = {**settings, "past_key_values": RingCache(spans)}
        return arguments, settings

    prepare: Callable[..., Any] = getattr(model, PREPARE)

    def prepared(generation_config: Any, model_kwargs: dict[str, Any], *arguments: Any, **settings: Any) -> Any:
        if _in_force.get(model) is not spans:
            return prepare(generation_config, model_kwargs, *arguments, **settings)
        given = model_kwargs.get("past_key_values")
        check_generation(generation_config, given)
        answer = prepare(generation_config, model_kwargs, *arguments, **settings)
        if given is None and type(model_kwargs.get("past_key_values")) is DynamicCache:
            bound = inspect.signature(prepare).bind(generation_config, model_kwargs, *arguments, **settings).arguments
            cache = RingCache(spans, capacity=bound.get("max_cache_length"))
            if generation_config.is_assistant:
                cache.activate_past_recording()
            model_kwargs["past_key_values"] = cache
        return answer

    hook = model.register_forward_pre_hook(before, with_kwargs=True)
    shadowed = vars(model).get(PREPARE)
    vars(model)[PREPARE] = prepared
    try:
        yield
    finally:
        hook.remove()
        del vars(model)[PREPARE]
        if shadowed is not None:
            vars(model)[PREPARE] = shadowed
