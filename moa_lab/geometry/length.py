"""How many tokens a model takes: the length of its config, and what RoPE scaling adds to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def max_length(configured: int, rope: Mapping[str, Any] | None, stated: int | None = None) -> int:
    """Tokens that a model takes.

    configured: `max_position_embeddings`. rope: `rope_parameters` (once `rope_scaling`), flat or one per layer type; None for a model
    without rotary positions, which takes what is configured. stated: `max_sequence_length`, which some configs carry beside a scaling
    (vicuna-13b-16k) and which a user may add to a `config.json` that does not tell; it holds before what the scaling says.

    With a rotary embedding per layer type the least scaled one decides: Gemma 3 scales its full layers alone, and its configured
    length is the extended one.
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
    factor = float(rope.get("factor") or 1.0)
    original = int(rope.get("original_max_position_embeddings") or configured)
    # These stretch the configured length, unless the config names a shorter one that it was stretched from.
    if kind in ("linear", "dynamic"):
        return max(configured, int(original * factor))
    # A config that names a longer original length than it configures wants fewer tokens than its scaling allows.
    if kind == "yarn" and configured >= original:
        return max(configured, int(original * factor))
    # Llama 3.2 names a factor of 32 over 8,192 and takes 131,072: the factor counts only where nothing was configured with it.
    if kind in ("llama3", "longrope") and configured == original:
        return max(configured, int(original * factor))
    return configured
