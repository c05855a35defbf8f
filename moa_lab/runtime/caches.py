"""Which caches a model may run over while a plan is applied to it; the others are refused before a pass begins."""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import Cache, EncoderDecoderCache

from moa_lab.runtime.attention import SpanAttention
from moa_lab.runtime.hf_cache import RingCache

RING_NAMES = (None, "dynamic")
"""Names of `cache_implementation` that mean transformers' own choice, which the ring cache takes the place of."""
CURE = "leave it out for the plan's ring cache, or pass past_key_values=DynamicCache() to keep every token and mask"


def check_cache(past: Any, spans: SpanAttention) -> None:
    """Raises ValueError for what is no cache, RuntimeError for a ring cache of another plan or another model."""
    if past is not None and (isinstance(past, EncoderDecoderCache) or not isinstance(past, Cache)):
        raise ValueError(f"past_key_values must be a transformers Cache of one decoder, got {type(past).__name__}: {CURE}")
    if isinstance(past, RingCache):
        past.check_owner(spans)


def check_generation(generation_config: Any, given: Any) -> None:
    """Raises ValueError where `generate` was asked for a cache, or for drafts, that a plan cannot run over. given: the cache passed in."""
    asked = generation_config.cache_implementation
    if getattr(generation_config, "assistant_early_exit", None) is not None:
        # Drafts would leave a cache whose layers hold different tokens, and a model that lost its other layers.
        raise ValueError(
            "assistant_early_exit drafts with the model's first layers alone, which no plan is for: leave it out, or pass "
            "assistant_model= or prompt_lookup_num_tokens="
        )
    if generation_config.use_cache is not False and asked not in RING_NAMES:
        raise ValueError(f"cache_implementation={asked!r} cannot be had while a plan is applied: {CURE}")
    if isinstance(given, Cache) and given.is_compileable:
        # `generate` writes masks of its own for these, and may compile the model.
        raise ValueError(f"generate cannot run over a {type(given).__name__} while a plan is applied: {CURE}")
