"""How many tokens a model takes: the length of its config, and what RoPE scaling adds to it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def max_length(configured: int, rope: Mapping[str, Any] | None, stated: int | None = None) -> int:
    """Tokens that a model takes.

    configured: `max_position_embeddings`. rope: `rope_parameters` (formerly `rope_scaling`), flat or one per layer type; None for a
    model without rotary positions, which takes what is configured. stated: `max_sequence_length`, which some configs have beside a
    scaling (vicuna-13b-16k) and which a user may add to `config.json`; it overrides the scaling.

    With a rotary embedding per layer type the least scaled one decides: Gemma 3 scales only its full-attention layers, and its
    configured length is the extended one. Raises ValueError where the scaling's numbers are none.
    """
    if not rope:
        return configured
    if stated:
        return int(stated)
    kinds = [kind for kind in rope.values() if isinstance(kind, Mapping)] or [rope]
    return min(_reached(configured, kind) for kind in kinds)


def _reached(configured: int, rope: Mapping[str, Any]) -> int:
    """Tokens under one kind of scaling, as transformers' modeling_rope_utils defines them."""
    kind = rope.get("rope_type") or rope.get("type")
    factor = _number(rope, "factor", 1.0)
    original = int(_number(rope, "original_max_position_embeddings", configured))
    # These scale the original length, which is the configured one unless the config names another.
    if kind in ("linear", "dynamic"):
        return max(configured, int(original * factor))
    # A configured length below the original one is a limit on purpose: no scaling is added.
    if kind == "yarn" and configured >= original:
        return max(configured, int(original * factor))
    # Llama 3.2 has a factor of 32 over 8,192 but configures 131,072: the factor counts only where the original length is configured.
    if kind in ("llama3", "longrope") and configured == original:
        return max(configured, int(original * factor))
    return configured


def _number(rope: Mapping[str, Any], name: str, default: float) -> float:
    """A number of a rope config, `default` where it has none (or 0). Raises ValueError for what is no positive number."""
    value = rope.get(name) or default
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"{name} of the RoPE scaling must be a positive number, got {value!r}: correct rope_parameters in config.json")
    return value
