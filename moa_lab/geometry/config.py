"""Read the attention geometry from a Hugging Face config; an attribute that cannot be read is named in the error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moa_lab.geometry.length import max_length


def read_geometry(config: Any) -> dict[str, Any]:
    """The fields of a `ModelGeometry` from any decoder config, nested text configs included.

    Raises ValueError naming the attribute that is missing, that the config answers with an error, or that differs between
    layers; or the layer type that keeps no plain KV cache.
    """
    nested = attribute(config, "get_text_config")
    config = nested(decoder=True) if nested else config
    if attribute(config, "is_encoder_decoder"):
        raise ValueError(f"{type(config).__name__}: encoder-decoder models are not supported; use a decoder-only model")
    layers = int(_required(config, "num_hidden_layers"))
    if layers < 1:
        raise ValueError(f"{type(config).__name__}: num_hidden_layers is {layers}; a model without attention layers takes no plan")
    each = _layer_configs(config, layers)
    query_heads = int(_same([_required(layer, "num_attention_heads") for layer in each], "num_attention_heads", config))
    kv_heads = _same([attribute(layer, "num_key_value_heads") or query_heads for layer in each], "num_key_value_heads", config)
    widths = [attribute(layer, "head_dim") or int(_required(layer, "hidden_size")) // query_heads for layer in each]
    return {
        "layers": layers,
        "query_heads": query_heads,
        "kv_heads": int(kv_heads),
        "head_dim": int(_same(widths, "head_dim", config)),
        "max_length": max_length(
            int(_required(config, "max_position_embeddings")),
            attribute(config, "rope_parameters") or attribute(config, "rope_scaling"),
            attribute(config, "max_sequence_length"),
        ),
        "layer_windows": _layer_windows(config, each),
    }


def attribute(config: Any, name: str) -> Any:
    """`config.name`, or None if it is missing.

    Raises ValueError where the config raises an error of its own, as transformers' configs do for an attribute that differs
    between layers.
    """
    try:
        return getattr(config, name, None)
    except Exception as error:  # configs raise classes of their own
        reason = " ".join(str(error).split())
        raise ValueError(f"{_named(config)} does not say its {name} ({type(error).__name__}: {reason:.160}); not supported") from error


def _named(config: Any) -> str:
    return f"{type(config).__name__} (model type {getattr(type(config), 'model_type', '') or 'unknown'})"


def _required(config: Any, name: str) -> Any:
    value = attribute(config, name)
    if value is None:
        raise ValueError(f"{type(config).__name__} has no {name}: its attention geometry cannot be read")
    return value


def _layer_configs(config: Any, layers: int) -> list[Any]:
    """One config per layer: Gemma 4 and others have attributes that only the layer's own config has."""
    if attribute(config, "is_heterogeneous"):
        return [config.per_layer_config[layer] for layer in range(layers)]
    return [config] * layers


def _same(values: Sequence[Any], name: str, config: Any) -> Any:
    """The one value that all layers share: a plan assumes equal KV heads."""
    if len(set(values)) > 1:
        found = ", ".join(str(value) for value in dict.fromkeys(values))
        raise ValueError(f"{_named(config)}: {name} differs between layers ({found}); layers whose KV heads differ are not supported")
    return values[0]


def _layer_windows(config: Any, each: Sequence[Any]) -> tuple[int | None, ...]:
    kinds = attribute(config, "layer_types")
    windows = [attribute(layer, "sliding_window") for layer in each]
    if kinds is None:
        # Mistral and Phi-3 use the window in every layer; Qwen2 configures one that `use_sliding_window` switches off.
        uses = attribute(config, "use_sliding_window")
        return tuple(int(window) if window and uses is not False else None for window in windows)
    if len(kinds) != len(each):
        raise ValueError(f"{type(config).__name__}: layer_types has {len(kinds)} entries for {len(each)} layers")
    named = type(config).__name__
    return tuple(_window(f"{named}: layer {layer}", kind, window) for layer, (kind, window) in enumerate(zip(kinds, windows, strict=True)))


def _window(layer: str, kind: str, window: int | None) -> int | None:
    if kind == "full_attention":
        return None
    if kind == "sliding_attention" and window:
        return int(window)
    raise ValueError(f"{layer} is of type {kind!r}, which keeps no plain KV cache per position; not supported")
