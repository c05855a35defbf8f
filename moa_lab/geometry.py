"""ModelGeometry: the few integers of a decoder that a plan depends on."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import Any

MAX_TOKENS = 2**31 - 1
"""Kernels count positions in 32 bits."""
MAX_COUNT = 2**16
"""Of layers, of heads, of numbers in a head: far beyond any model, and small enough to count with."""


@dataclass(frozen=True)
class ModelGeometry:
    """Layers, heads and lengths of a decoder-only model.

    `layer_windows[layer]` is the model's own sliding window in tokens, or None where the layer attends to everything.
    Query head h reads KV head `h // group_size`.
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

    def kv_bytes_per_token(self, dtype_bytes: int = 2) -> int:
        """Bytes of K and V of one token in one KV head."""
        return 2 * self.head_dim * dtype_bytes

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

        Raises ValueError naming the attribute that is missing, or the layer type that keeps no plain KV cache.
        """
        config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
        if getattr(config, "is_encoder_decoder", False):
            raise ValueError(f"{type(config).__name__}: encoder-decoder models are not supported; use a decoder-only model")
        layers = _required(config, "num_hidden_layers")
        query_heads = _required(config, "num_attention_heads")
        return cls(
            layers=layers,
            query_heads=query_heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or query_heads,
            head_dim=getattr(config, "head_dim", None) or _required(config, "hidden_size") // query_heads,
            max_length=_required(config, "max_position_embeddings"),
            layer_windows=_layer_windows(config, layers),
        )


def check_whole(name: str, value: object, low: int, high: int = MAX_TOKENS) -> None:
    """Raise ValueError that names `name` where `value` is no whole number from `low` to `high`."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    if int(value) < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")
    if int(value) > high:
        raise ValueError(f"{name} must be at most {high}, got {value}")


def _required(config: Any, name: str) -> int:
    value = getattr(config, name, None)
    if value is None:
        raise ValueError(f"{type(config).__name__} has no {name}: its attention geometry cannot be read")
    return int(value)


def _layer_windows(config: Any, layers: int) -> tuple[int | None, ...]:
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        # Mistral and Phi-3 slide in every layer; Qwen2 carries a window that `use_sliding_window` switches off.
        uses = getattr(config, "use_sliding_window", True)
        return ((int(window) if window and uses else None),) * layers
    windows: list[int | None] = []
    for layer, kind in enumerate(kinds):
        if kind == "full_attention":
            windows.append(None)
        elif kind == "sliding_attention" and window:
            windows.append(int(window))
        else:
            raise ValueError(f"layer {layer} is of type {kind!r}, which keeps no plain KV cache per position; not supported")
    return tuple(windows)
