"""A geometry is read from any decoder config, or refused by the name of what is missing."""

from types import SimpleNamespace

import numpy as np
import pytest
from tiny import DESIGNS, FAMILIES, WINDOW_TOKENS, tiny_model
from transformers import Gemma3Config, LlamaConfig, MambaConfig, Qwen2Config, T5Config

from moa_lab.geometry import ModelGeometry


def test_a_head_is_whole_that_keeps_what_a_window_of_its_layers_own_lets_it_see() -> None:
    geometry = ModelGeometry(layers=2, query_heads=2, kv_heads=2, head_dim=8, max_length=512, layer_windows=(48, None))
    spans = np.array([[48, 40], [512, 48]])
    assert geometry.whole_heads(spans, 512) == 2
    assert geometry.whole_heads(spans, 40) == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_geometry_is_read_from_every_family(family: str) -> None:
    geometry = ModelGeometry.from_config(tiny_model(family, layers=3, max_length=300).config)
    _, query_heads, kv_heads, head_dim = DESIGNS[family]
    assert (geometry.layers, geometry.max_length) == (3, 300)
    assert (geometry.query_heads, geometry.kv_heads, geometry.head_dim) == (query_heads, kv_heads, head_dim)


@pytest.mark.parametrize(
    ("family", "windows"),
    [
        ("llama", (None, None, None)),
        ("qwen2", (None, None, None)),
        ("mistral", (WINDOW_TOKENS,) * 3),
        ("gemma2", (WINDOW_TOKENS, None, WINDOW_TOKENS)),
        ("gemma3", (WINDOW_TOKENS, None, WINDOW_TOKENS)),
    ],
)
def test_own_windows_are_read_per_layer(family: str, windows: tuple[int | None, ...]) -> None:
    assert ModelGeometry.from_config(tiny_model(family, layers=3).config).layer_windows == windows


def test_a_window_that_is_switched_off_does_not_count() -> None:
    config = Qwen2Config(num_hidden_layers=2, sliding_window=64, use_sliding_window=True, max_window_layers=1)
    assert ModelGeometry.from_config(config).layer_windows == (None, 64)
    config = Qwen2Config(num_hidden_layers=2, sliding_window=64, use_sliding_window=False)
    assert ModelGeometry.from_config(config).layer_windows == (None, None)


def test_head_dim_falls_back_to_hidden_over_heads() -> None:
    config = SimpleNamespace(num_hidden_layers=1, num_attention_heads=4, hidden_size=64, max_position_embeddings=128)
    geometry = ModelGeometry.from_config(config)
    assert (geometry.head_dim, geometry.kv_heads, geometry.group_size) == (16, 4, 1)


def test_the_text_part_of_a_nested_config_is_read() -> None:
    text = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "max_position_embeddings": 99}
    geometry = ModelGeometry.from_config(Gemma3Config(text_config=text))
    assert (geometry.layers, geometry.query_heads, geometry.head_dim, geometry.max_length) == (4, 8, 32, 99)


def test_what_has_no_attention_geometry_is_refused_by_the_missing_name() -> None:
    with pytest.raises(ValueError, match="MambaConfig has no num_attention_heads"):
        ModelGeometry.from_config(MambaConfig())
    with pytest.raises(ValueError, match="T5Config: encoder-decoder"):
        ModelGeometry.from_config(T5Config())


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="num_hidden_layers is 0"):
        ModelGeometry.from_config(LlamaConfig(num_hidden_layers=0))


def test_a_layer_without_a_plain_kv_cache_is_refused_by_its_type() -> None:
    config = LlamaConfig(num_hidden_layers=2)
    config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ValueError, match="layer 1 is of type 'linear_attention'"):
        ModelGeometry.from_config(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 0}, "layers must be at least 1"),
        ({"kv_heads": 3}, "must be a multiple of kv_heads"),
        ({"layer_windows": (None, None, 64)}, "3 entries for 2 layers"),
    ],
)
def test_impossible_geometries_are_refused(change: dict[str, int], message: str) -> None:
    fields = {"layers": 2, "query_heads": 4, "kv_heads": 2, "head_dim": 16, "max_length": 512}
    with pytest.raises(ValueError, match=message):
        ModelGeometry(**{**fields, **change})


def test_own_window_caps_what_the_dense_model_keeps(geometry: ModelGeometry) -> None:
    assert [geometry.dense_span_tokens(layer, 2048) for layer in range(2)] == [2048, 512]
    assert geometry.dense_span_tokens(1, 100) == 100


def test_kv_bytes_per_token_counts_keys_and_values(geometry: ModelGeometry) -> None:
    assert geometry.kv_bytes_per_token() == 2 * 16 * 2
    assert geometry.kv_bytes_per_token(dtype_bytes=4) == 2 * 16 * 4


def test_the_words_of_a_geometry_name_every_number(geometry: ModelGeometry) -> None:
    expected = "2 layers x 4 query heads / 2 KV heads, head_dim 16, max length 8192, 1 layers with their own window"
    assert str(geometry) == expected
