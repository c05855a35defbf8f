"""How long a model's texts may be is what its config says, RoPE scaling counted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import random_tokens, tiny_model
from tiny_plans import small_plan
from transformers import Gemma3TextConfig, LlamaConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moa_lab.calibration import calibrate
from moa_lab.geometry import ModelGeometry
from moa_lab.geometry.length import max_length
from moa_lab.models import geometry_of
from moa_lab.plan import Plan, dense_plan
from moa_lab.runtime import apply_plan

YARN = {"rope_type": "yarn", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("configured", "rope", "tokens"),
    [
        pytest.param(512, None, 512, id="no rotary positions"),
        pytest.param(512, {"rope_type": "default", "rope_theta": 1e4}, 512, id="no scaling"),
        pytest.param(4096, {"type": "linear", "factor": 4.0}, 16384, id="vicuna-7b-v1.5-16k"),
        pytest.param(2048, {"type": "dynamic", "factor": 2.5}, 5120, id="dynamic NTK"),
        pytest.param(262144, {"type": "dynamic", "factor": 1.0, "alpha": 1000.0}, 262144, id="Hunyuan"),
        pytest.param(32768, {**YARN, "original_max_position_embeddings": 32768}, 131072, id="Qwen2.5 with its YaRN"),
        pytest.param(40960, {**YARN, "original_max_position_embeddings": 32768}, 131072, id="Qwen3 with its YaRN"),
        pytest.param(131072, {**YARN, "factor": 32.0, "original_max_position_embeddings": 4096}, 131072, id="gpt-oss"),
        pytest.param(256, {**YARN, "factor": 32.0, "original_max_position_embeddings": 4096}, 256, id="less than its YaRN allows"),
        pytest.param(131072, {**LLAMA3, "factor": 8.0, "original_max_position_embeddings": 8192}, 131072, id="Llama 3.1"),
        pytest.param(131072, {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192}, 131072, id="Llama 3.2"),
        pytest.param(8192, {**LLAMA3, "factor": 8.0, "original_max_position_embeddings": 8192}, 65536, id="llama3 scaling put on"),
        pytest.param(131072, {"type": "longrope", "original_max_position_embeddings": 4096}, 131072, id="Phi-3 128k"),
        pytest.param(
            131072, {"full_attention": {"rope_type": "linear", "factor": 8.0}, "sliding_attention": {"rope_type": "default"}}, 131072,
            id="Gemma 3",
        ),
    ],
)  # fmt: skip
def test_the_length_of_every_kind_of_scaling(configured: int, rope: dict[str, Any] | None, tokens: int) -> None:
    assert max_length(configured, rope) == tokens


@pytest.mark.parametrize("factor", [float("inf"), float("nan"), -4.0, "abc", [4.0], True])
@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "default"])
def test_a_scaling_whose_factor_is_no_number_is_refused_in_words(kind: str, factor: Any) -> None:
    with pytest.raises(ValueError, match=r"factor of the RoPE scaling must be a positive number.*config.json"):
        max_length(512, {"rope_type": kind, "factor": factor})


def test_a_length_that_the_config_states_holds_before_its_scaling() -> None:
    assert max_length(16384, {"type": "linear", "factor": 4.0}, 16384) == 16384
    assert max_length(4096, {"type": "default"}, 8192) == 8192
    # Positions that are learned end where they end.
    assert max_length(1024, None, 8192) == 1024


def test_configs_of_transformers_are_read_with_their_scaling() -> None:
    linear = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    assert ModelGeometry.from_config(LlamaConfig(max_position_embeddings=512, rope_parameters=linear)).max_length == 2048
    # As the configs of 2023 wrote it.
    old = LlamaConfig(max_position_embeddings=4096, rope_scaling={"type": "linear", "factor": 4.0})
    assert ModelGeometry.from_config(old).max_length == 16384
    stated = LlamaConfig(max_position_embeddings=512, rope_parameters=linear, max_sequence_length=1024)
    assert ModelGeometry.from_config(stated).max_length == 1024
    gemma = Gemma3TextConfig(rope_scaling={"rope_type": "linear", "factor": 8.0})
    assert ModelGeometry.from_config(gemma).max_length == gemma.max_position_embeddings
    for family in ("gpt_oss", "phi3", "qwen3"):
        config = CONFIG_MAPPING[family]()
        assert ModelGeometry.from_config(config).max_length == config.max_position_embeddings


def test_a_stretched_model_runs_under_a_plan_beyond_its_configured_length() -> None:
    model = tiny_model("llama", max_length=64, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4})
    tokens = random_tokens(1, 200)
    assert geometry_of(model).max_length == 256
    with torch.no_grad():
        own = model(tokens).logits
        with apply_plan(model, dense_plan(geometry_of(model)), n_tokens=200):
            torch.testing.assert_close(model(tokens).logits, own, atol=2e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="256"), apply_plan(model, dense_plan(geometry_of(model)), n_tokens=257):
        pass


def test_a_card_written_with_another_length_is_right_for_the_same_heads() -> None:
    model = tiny_model("llama")
    geometry, plan = geometry_of(model), small_plan(model)
    card = Plan.from_card(replace(plan, geometry=replace(geometry, max_length=64)).card())
    card.check_model(geometry)
    tokens = random_tokens(1, 150)
    short = dense_plan(replace(geometry, max_length=64))
    with torch.no_grad():
        own = model(tokens).logits
        # A dense head keeps everything of this model's length, not of the card's.
        with apply_plan(model, short, n_tokens=10):
            torch.testing.assert_close(model(tokens).logits, own, atol=2e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="another geometry"):
        card.check_model(replace(geometry, head_dim=8))


def test_calibration_knows_the_stretched_length() -> None:
    model = tiny_model("llama", max_length=64, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4})
    with pytest.raises(ValueError, match="length 257 is beyond the model's maximum of 256 tokens"):
        calibrate(model, None, [257])  # type: ignore[arg-type]


@pytest.mark.parametrize("length", [0, -5])
def test_a_length_of_no_tokens_is_not_called_too_long(length: int) -> None:
    with pytest.raises(ValueError, match=f"length {length}: at least 1 token is needed"):
        calibrate(tiny_model("llama"), None, [length])  # type: ignore[arg-type]
