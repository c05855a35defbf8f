"""The geometry of a loaded model: read from its config, checked against its attention modules."""

from __future__ import annotations

from typing import Any

from moa_lab.geometry import ModelGeometry
from moa_lab.geometry.wrappers import plain_model


def geometry_of(model: Any) -> ModelGeometry:
    """Read the geometry from the config of a `PreTrainedModel` and check it against its attention modules.

    model: the model, or what wraps one (`plain_model`).
    Raises ValueError that names the missing config attribute, or the module and attribute that contradict the config
    (heads that differ between layers, keys and values of different widths, layers that share their KV cache).
    """
    model = plain_model(model)
    geometry = ModelGeometry.from_config(model.config)
    expected = {
        "head_dim": geometry.head_dim, "qk_head_dim": geometry.head_dim, "v_head_dim": geometry.head_dim,
        "num_key_value_groups": geometry.group_size, "is_kv_shared_layer": False,
    }  # fmt: skip
    for path, module in _decoder(model).named_modules():
        # transformers numbers every module that writes to the KV cache.
        if not hasattr(module, "layer_idx"):
            continue
        for attribute, value in expected.items():
            found = getattr(module, attribute, value)
            if found != value:
                raise ValueError(
                    f"{type(model).__name__}: {path}.{attribute} is {found}, its config says {value}; "
                    "layers whose KV heads differ from the config's are not supported"
                )
    return geometry


def _decoder(model: Any) -> Any:
    """The text decoder of a model that may be multimodal: vision and audio towers have heads of their own."""
    get_decoder = getattr(model, "get_decoder", None)
    return (get_decoder() if get_decoder else None) or model
