"""ModelGeometry: the few integers of a decoder that a plan depends on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import numpy as np

from moa_lab.geometry.config import read_geometry

MAX_TOKENS = 2**31 - 1
"""Kernels count positions in 32 bits."""
MAX_COUNT = 2**16
"""Limit of layers, heads and head_dim: far beyond any model, and small enough that their products do not overflow."""


@dataclass(frozen=True)
class ModelGeometry:
    """Layers, heads and lengths of a decoder-only model.

    `layer_windows[layer]` is the model's own sliding window in tokens, or None where the layer attends to everything.
    Query head h reads KV head `h // group_size`. `max_length`: tokens that the model takes, with RoPE scaling (see
    `moa_lab.geometry.length`).
    """

    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    max_length: int
    layer_windows: tuple[int | None, ...] = ()

    def __post_init__(self) -> None:
        for name in ("layers", "query_heads", "kv_heads", "head_dim"):
            check_whole(name, getattr(self, name), 1, MAX_COUNT)
        check_whole("max_length", self.max_length, 1, MAX_TOKENS)
        if self.query_heads % self.kv_heads:
            raise ValueError(f"query_heads ({self.query_heads}) must be a multiple of kv_heads ({self.kv_heads})")
        if not self.layer_windows:
            object.__setattr__(self, "layer_windows", (None,) * self.layers)
        if len(self.layer_windows) != self.layers:
            raise ValueError(f"layer_windows has {len(self.layer_windows)} entries for {self.layers} layers")
        for layer, window in enumerate(self.layer_windows):
            if window is not None:
                check_whole(f"layer_windows[{layer}], where it is not None,", window, 1, MAX_TOKENS)

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.query_heads // self.kv_heads

    def dense_span_tokens(self, layer: int, n_tokens: int) -> int:
        """Tokens that the dense model keeps for one head of `layer` at length `n_tokens`: N, or the layer's own window."""
        window = self.layer_windows[layer]
        return n_tokens if window is None else min(n_tokens, window)

    def whole_heads(self, spans: np.ndarray, n_tokens: int) -> int:
        """How many heads with these spans, (layers, kv_heads), keep all of `n_tokens` that their layer sees."""
        return int((spans >= [[self.dense_span_tokens(layer, n_tokens)] for layer in range(self.layers)]).sum())

    def check_length(self, n_tokens: int) -> None:
        """Raises ValueError for a number of tokens that the model does not take."""
        if n_tokens < 1:
            raise ValueError(f"length {n_tokens}: at least 1 token is needed")
        if n_tokens > self.max_length:
            raise ValueError(f"length {n_tokens} is beyond the model's maximum of {self.max_length} tokens")

    def kv_bytes_per_token(self, dtype_bytes: int = 2) -> int:
        """Bytes of K and V of one token in one KV head."""
        return 2 * self.head_dim * dtype_bytes

    def fits(self, other: ModelGeometry) -> bool:
        """Whether a plan or record for one geometry holds for the other: all fields but `max_length` are equal.

        The maximum length does not concern the heads; it is read from the model in use.
        """
        return replace(other, max_length=self.max_length) == self

    def __str__(self) -> str:
        own = sum(window is not None for window in self.layer_windows)
        windows = f", {own} layers with their own window" if own else ""
        return (
            f"{self.layers} layers x {self.query_heads} query heads / {self.kv_heads} KV heads, "
            f"head_dim {self.head_dim}, max length {self.max_length}{windows}"
        )

    @classmethod
    def from_config(cls, config: Any) -> ModelGeometry:
        """Read the geometry from any Hugging Face decoder config (nested text configs included).

        Raises ValueError naming the attribute that is missing, that the config answers with an error of its own, or that
        differs between layers; or the layer type that keeps no plain KV cache.
        """
        return cls(**read_geometry(config))


def check_whole(name: str, value: object, low: int, high: int = MAX_TOKENS) -> None:
    """Raise a ValueError that names `name` unless `value` is a whole number from `low` to `high`."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    if int(value) < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")
    if int(value) > high:
        raise ValueError(f"{name} must be at most {high}, got {value}")
