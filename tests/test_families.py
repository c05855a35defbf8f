"""Every family of transformers runs under a plan as it should, or is refused in one line before anything is made of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import exit_code
from tiny import VOCABULARY, random_tokens, tiny_tokenizer
from tiny_plans import small_plan
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moa_lab.calibration import calibrate
from moa_lab.interface import attention_sites
from moa_lab.models import geometry_of, load_model
from moa_lab.plan import dense_plan
from moa_lab.runtime import apply_plan

N = 72
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.15, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
HEADS = {"head_dim": 16}
WINDOW = {"sliding_window": 24}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MHA = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
SHORT = {"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 2, "n_head": 4}
GPT = {
    "vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 256, "initializer_range": 0.15, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
HYBRID = ["full_attention", "linear_attention"] * 2
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
GEMMA = {"global_head_dim": 16, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY}

RUN: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "mistral": {**SIZES, **HEADS, **WINDOW},
    "qwen2": SIZES,
    "qwen3": {**SIZES, **HEADS},
    "qwen3_moe": {**SIZES, **HEADS, **EXPERTS},
    "phi3": {**SIZES, **WINDOW},
    "gemma2": {**SIZES, **HEADS, **WINDOW},
    "gemma3_text": {**SIZES, **HEADS, **WINDOW},
    "gemma3n_text": {**SIZES, **HEADS, **WINDOW, **GEMMA, "num_kv_shared_layers": 0, "laurel_rank": 8},
    "gemma4_text": {**SIZES, **HEADS, **WINDOW, **GEMMA},
    "gpt_oss": {**SIZES, **HEADS, **WINDOW, **EXPERTS, **ROPE},
    "granite_swa": {**SIZES, **WINDOW},
    "glm4": {**SIZES, **HEADS},
    "cohere2": {**SIZES, **WINDOW},
    "olmo2": SIZES,
    "olmo3": {**SIZES, **WINDOW},
    "smollm3": SIZES,
    "starcoder2": {**SIZES, **WINDOW},
    "gpt2": GPT,
    "gpt_neox": MHA,
    "opt": {**MHA, "ffn_dim": 96, "word_embed_proj_dim": 64},
}

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "falcon": (SIZES, "does not use transformers' attention interface"),
    "bloom": (SHORT, "BloomConfig has no max_position_embeddings"),
    "mpt": ({"vocab_size": VOCABULARY, "d_model": 64, "n_heads": 4, "n_layers": 2}, "MptConfig has no max_position_embeddings"),
    "gptj": ({**GPT, "rotary_dim": 8}, "does not use transformers' attention interface"),
    "deepseek_v3": ({**SIZES, **LATENT, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}, "qk_head_dim is 24"),
    "llama4_text": ({**SIZES, **HEADS, "num_local_experts": 2}, "'chunked_attention'"),
    "granitemoehybrid": ({**SIZES, "layer_types": HYBRID, "num_local_experts": 2}, "'linear_attention'"),
    "mamba": ({"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2}, "MambaConfig has no num_attention_heads"),
    "bert": (MHA, "does not attend causally"),
    "moshi": ({**SIZES, **HEADS, **WINDOW}, "its config says a window of 24 tokens"),
    "gemma4_unified_text": ({**SIZES, **HEADS, **WINDOW, **GEMMA, "global_head_dim": 32}, r"head_dim differs between layers \(16, 32\)"),
}  # fmt: skip


def made(family: str, settings: dict[str, Any]) -> PreTrainedModel:
    config = CONFIG_MAPPING[family](**settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if name.endswith(".sinks"):
                torch.nn.init.normal_(parameter, mean=1.0)
    # transformers' sdpa leaves soft caps out.
    model.set_attn_implementation("eager")
    return model.eval().requires_grad_(False)


@torch.no_grad()
@pytest.mark.parametrize("family", RUN)
def test_a_family_is_itself_under_a_dense_plan_and_its_ring_equals_its_masks(family: str) -> None:
    model, tokens = made(family, RUN[family]), random_tokens(2, N)
    own = model(tokens, use_cache=False).logits
    with apply_plan(model, dense_plan(geometry_of(model))):
        torch.testing.assert_close(model(tokens, use_cache=False).logits, own, atol=1e-3, rtol=1e-3)
    with apply_plan(model, small_plan(model), n_tokens=N):
        masked = model(tokens, use_cache=False).logits
        first = model(tokens[:, :50], use_cache=True)
        cache, pieces = first.past_key_values, [first.logits]
        for start, stop in ((50, N - 2), (N - 2, N - 1), (N - 1, N)):
            pieces.append(model(tokens[:, start:stop], past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), masked, atol=1e-3, rtol=1e-3)
    assert (masked - own).abs().max() > 1e-2


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_no_plan_can_be_applied_to_is_refused_in_one_line(family: str) -> None:
    settings, message = REFUSED[family]
    model = made(family, settings)
    with pytest.raises(ValueError, match=message) as caught:
        attention_sites(model)
    assert "\n" not in str(caught.value)
    # A model that was made by hand: before a text is looked at.
    with pytest.raises(ValueError, match=re.escape(str(caught.value))):
        calibrate(model, tiny_tokenizer(), [64])


def test_loading_refuses_it_and_so_do_commands_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    made("gptj", REFUSED["gptj"][0]).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    with pytest.raises(ValueError, match="GPTJForCausalLM does not use transformers' attention interface"):
        load_model(str(folder), device="cpu")
    samples = tmp_path / "samples.safetensors"
    for command in (["calibrate", "--out", samples, "--lengths", "64"], ["run", "--out", tmp_path / "run"]):
        assert exit_code(monkeypatch, *command, "--model", folder) == 2
        assert "error: GPTJForCausalLM does not use transformers' attention interface" in " ".join(capsys.readouterr().err.split())
    assert not samples.exists()
    assert not list(tmp_path.glob("run/*"))
