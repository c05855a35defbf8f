"""A config is read attribute by attribute, and what it will not say is named in one line."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moa_lab.geometry import ModelGeometry

SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64, "max_position_embeddings": 256}
NAMES = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings", "layer_types")


class Guarded(SimpleNamespace):
    """A config that answers one attribute with an error of its own."""

    guarded: str
    error: Exception

    def __getattribute__(self, name: str) -> Any:
        if name == object.__getattribute__(self, "__dict__").get("guarded"):
            raise object.__getattribute__(self, "error")
        return object.__getattribute__(self, name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("error", [RuntimeError("ask\nthe layers"), KeyError("x"), NotImplementedError()])
def test_an_attribute_that_is_answered_with_an_error_is_named_in_one_line(name: str, error: Exception) -> None:
    with pytest.raises(ValueError, match=rf"Guarded \(model type unknown\) does not say its {name} \({type(error).__name__}") as caught:
        ModelGeometry.from_config(Guarded(**SIZES, guarded=name, error=error))
    assert "\n" not in str(caught.value)


def gemma4(**settings: Any) -> Any:
    kinds = ["sliding_attention", "full_attention"]
    return CONFIG_MAPPING["gemma4_text"](**{**SIZES, "head_dim": 16, "layer_types": kinds, "sliding_window": 24, **settings})


def test_gemma_4_is_read_layer_by_layer() -> None:
    geometry = ModelGeometry.from_config(gemma4(global_head_dim=16))
    assert (geometry.head_dim, geometry.kv_heads, geometry.layer_windows) == (16, 2, (24, None))


def test_heads_that_differ_between_layers_are_refused_with_their_values() -> None:
    with pytest.raises(ValueError, match=r"Gemma4TextConfig \(model type gemma4_text\): head_dim differs between layers \(16, 32\)"):
        ModelGeometry.from_config(gemma4(global_head_dim=32))
    with pytest.raises(ValueError, match=r"num_key_value_heads differs between layers \(2, 1\)"):
        ModelGeometry.from_config(gemma4(global_head_dim=16, num_global_key_value_heads=1, attention_k_eq_v=True))


def test_layer_types_of_another_number_are_refused() -> None:
    config = SimpleNamespace(**SIZES, layer_types=["full_attention"])
    with pytest.raises(ValueError, match="layer_types has 1 entries for 2 layers"):
        ModelGeometry.from_config(config)
