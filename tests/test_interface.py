"""The route through transformers: it changes nothing by itself, leaves nothing behind, and refuses what it cannot carry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import FAMILIES, random_tokens, tiny_model
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, T5Config, T5ForConditionalGeneration
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moa_lab.interface import ATTENTION_NAME, AttentionCall, attention_sites, route_attention
from moa_lab.kernels.reference import masked_attention

torch.set_num_threads(1)


def plain(layer: int) -> Callable[[AttentionCall], torch.Tensor]:
    """Handlers that compute what the model itself would."""
    return lambda call: masked_attention(call.query, call.key, call.value, call.positions >= 0, call.scale, call.softcap, call.sink_logits)


def zeros(layer: int) -> Callable[[AttentionCall], torch.Tensor]:
    """Handlers under which no layer attends to anything."""
    return lambda call: torch.zeros_like(call.query)


def eager_model(family: str, **settings: Any) -> PreTrainedModel:
    """A tiny model that attends the way its family defines it: transformers' sdpa drops soft-capping."""
    model = tiny_model(family, **settings)
    model.set_attn_implementation("eager")
    return model


def left_padded(lengths: list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random rows of `lengths` tokens, padded on the left to the longest, and their attention mask."""
    tokens = random_tokens(len(lengths), max(lengths), seed)
    mask = torch.arange(max(lengths))[None] >= max(lengths) - torch.tensor(lengths)[:, None]
    return tokens * mask, mask.long()


@torch.no_grad()
def logits_of(model: PreTrainedModel, tokens: torch.Tensor, **inputs: Any) -> torch.Tensor:
    return model(input_ids=tokens, **inputs).logits


# --- what goes through comes out as the model's own


@pytest.mark.parametrize("family", FAMILIES)
def test_routed_logits_equal_the_models_own(family: str) -> None:
    model = eager_model(family)
    tokens = random_tokens(2, 130)
    own = logits_of(model, tokens)
    with route_attention(model, plain):
        torch.testing.assert_close(logits_of(model, tokens), own, atol=2e-4, rtol=1e-4)
    with route_attention(model, zeros):
        assert not torch.allclose(logits_of(model, tokens), own, atol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_a_left_padded_batch_equal_their_unpadded_runs(family: str) -> None:
    model = eager_model(family)
    lengths = [90, 61, 7]
    tokens, mask = left_padded(lengths)
    with route_attention(model, plain):
        batch = logits_of(model, tokens, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    for row, n_tokens in enumerate(lengths):
        alone = logits_of(model, tokens[row : row + 1, -n_tokens:])
        torch.testing.assert_close(batch[row, -n_tokens:], alone[0], atol=2e-4, rtol=1e-4)
    assert not batch.isnan().any()


@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_and_single_tokens_over_a_cache_equal_one_pass(family: str) -> None:
    model = eager_model(family)
    tokens = random_tokens(2, 100)
    own = logits_of(model, tokens)
    cache = DynamicCache(config=model.config)
    pieces = []
    with route_attention(model, plain):
        for start, stop in [(0, 37), (37, 96), *((i, i + 1) for i in range(96, 100))]:
            pieces.append(logits_of(model, tokens[:, start:stop], past_key_values=cache, use_cache=True))
    torch.testing.assert_close(torch.cat(pieces, dim=1), own, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_left_padded_batch_decodes_over_a_cache_as_its_rows_do(family: str) -> None:
    model = eager_model(family)
    lengths = [70, 52]
    tokens, mask = left_padded(lengths)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    with route_attention(model, plain):
        logits_of(model, tokens[:, :66], attention_mask=mask[:, :66], position_ids=positions[:, :66], past_key_values=cache, use_cache=True)
        for at in range(66, 70):
            last = logits_of(
                model, tokens[:, at : at + 1], attention_mask=mask[:, : at + 1], position_ids=positions[:, at : at + 1],
                past_key_values=cache, use_cache=True,
            )  # fmt: skip
    for row, n_tokens in enumerate(lengths):
        alone = logits_of(model, tokens[row : row + 1, -n_tokens:])
        torch.testing.assert_close(last[row, -1], alone[0, -1], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("additive", [False, True])
def test_a_mask_of_the_users_own_is_respected(additive: bool) -> None:
    model = tiny_model("llama")
    tokens = random_tokens(1, 20)
    shown = torch.ones(20, 20, dtype=torch.bool).tril()
    shown[12:, 3:9] = False
    mask = shown[None, None]
    if additive:
        mask = torch.zeros(1, 1, 20, 20).masked_fill(~mask, torch.finfo(torch.float32).min)
    own = logits_of(model, tokens, attention_mask=mask)
    assert not torch.allclose(own, logits_of(model, tokens), atol=1e-3)
    with route_attention(model, plain):
        torch.testing.assert_close(logits_of(model, tokens, attention_mask=mask), own, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_a_cap_that_sdpa_drops_is_kept_by_the_route_and_told(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("gemma2")
    tokens = random_tokens(1, 40)
    model.set_attn_implementation("eager")
    own = logits_of(model, tokens)
    model.set_attn_implementation(name)
    assert torch.allclose(logits_of(model, tokens), own, atol=1e-3) == (name == "eager")
    with route_attention(model, plain):
        torch.testing.assert_close(logits_of(model, tokens), own, atol=2e-4, rtol=1e-4)
    assert ("set_attn_implementation('eager')" in caplog.text) == (name == "sdpa")


# --- positions


def calls_of(model: PreTrainedModel, **inputs: Any) -> list[AttentionCall]:
    calls: list[AttentionCall] = []

    def keeping(layer: int) -> Callable[[AttentionCall], torch.Tensor]:
        def handler(call: AttentionCall) -> torch.Tensor:
            calls.append(call)
            return plain(layer)(call)

        return handler

    with torch.no_grad(), route_attention(model, keeping):
        model(**inputs)
    return calls


def test_positions_count_from_each_rows_first_token() -> None:
    model = tiny_model("llama")
    lengths = [12, 5]
    tokens, mask = left_padded(lengths)
    call = calls_of(model, input_ids=tokens, attention_mask=mask)[0]
    assert call.positions.dtype == torch.int32
    for row, n_tokens in enumerate(lengths):
        real = call.positions.expand(2, 1, 12, 12)[row, 0, -n_tokens:]
        expected = torch.arange(n_tokens).expand(n_tokens, n_tokens).masked_fill(~torch.ones(n_tokens, n_tokens).bool().tril(), -1)
        torch.testing.assert_close(real[:, -n_tokens:].long(), expected)
        assert (real[:, :-n_tokens] == -1).all()
        torch.testing.assert_close(call.query_positions.expand(2, 1, 12, 1)[row, 0, -n_tokens:, 0].long(), torch.arange(n_tokens))


def test_positions_hide_what_lies_beyond_a_layers_own_window() -> None:
    model = tiny_model("gemma2", sliding_window=6)
    sliding, full = calls_of(model, input_ids=random_tokens(1, 20))
    assert (full.positions >= 0).sum() == 20 * 21 // 2
    shown = sliding.positions[0, 0] >= 0
    assert shown.sum(dim=-1).tolist() == [min(i + 1, 6) for i in range(20)]
    assert sliding.softcap == full.softcap == 2.0


def test_a_call_is_a_prefill_only_where_no_key_lies_before_the_first_query() -> None:
    model = tiny_model("llama")
    cache = DynamicCache(config=model.config)
    tokens = random_tokens(1, 12)
    first = calls_of(model, input_ids=tokens[:, :8], past_key_values=cache, use_cache=True)
    second = calls_of(model, input_ids=tokens[:, 8:11], past_key_values=cache, use_cache=True)
    assert [call.is_prefill for call in first + second] == [True, True, False, False]
    assert second[0].query_positions.flatten().tolist() == [8, 9, 10]


# --- scope


def test_the_model_is_as_before_on_exit() -> None:
    model = tiny_model("llama")
    tokens = random_tokens(1, 20)
    before, own = model.config._attn_implementation, logits_of(model, tokens)
    with route_attention(model, zeros):
        assert model.config._attn_implementation == ATTENTION_NAME
        assert not torch.allclose(logits_of(model, tokens), own, atol=1e-2)
    assert model.config._attn_implementation == before
    torch.testing.assert_close(logits_of(model, tokens), own, atol=0, rtol=0)


def test_the_model_is_as_before_after_an_exception() -> None:
    model = tiny_model("llama")
    tokens = random_tokens(1, 20)
    before, own = model.config._attn_implementation, logits_of(model, tokens)

    def failing(layer: int) -> Callable[[AttentionCall], torch.Tensor]:
        def handler(call: AttentionCall) -> torch.Tensor:
            raise RuntimeError("in the middle of a layer")

        return handler

    with pytest.raises(RuntimeError, match="in the middle of a layer"), route_attention(model, failing):
        logits_of(model, tokens)
    assert model.config._attn_implementation == before
    torch.testing.assert_close(logits_of(model, tokens), own, atol=0, rtol=0)


def test_leaving_an_inner_route_restores_the_outer_one() -> None:
    model = tiny_model("llama")
    tokens = random_tokens(1, 20)
    own = logits_of(model, tokens)
    with route_attention(model, zeros):
        outer = logits_of(model, tokens)
        with route_attention(model, plain):
            torch.testing.assert_close(logits_of(model, tokens), own, atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(logits_of(model, tokens), outer, atol=0, rtol=0)
    torch.testing.assert_close(logits_of(model, tokens), own, atol=0, rtol=0)


def test_two_models_are_routed_apart() -> None:
    one, other = tiny_model("llama"), tiny_model("llama", seed=1)
    tokens = random_tokens(1, 20)
    own = logits_of(other, tokens)
    with route_attention(one, zeros):
        torch.testing.assert_close(logits_of(other, tokens), own, atol=0, rtol=0)
        with route_attention(other, plain):
            torch.testing.assert_close(logits_of(other, tokens), own, atol=2e-4, rtol=1e-4)
            assert not torch.allclose(logits_of(one, tokens), own, atol=1e-2)


def test_sites_name_every_layer_once_and_are_found_once() -> None:
    model = tiny_model("qwen3", layers=3)
    sites = attention_sites(model)
    assert [(site.layer, site.query_heads, site.kv_heads, site.head_dim) for site in sites] == [(layer, 4, 2, 24) for layer in range(3)]
    assert attention_sites(model) is sites


def without_window(model: PreTrainedModel, forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` that makes its masks as if the config had no window."""

    def run(*arguments: Any, **settings: Any) -> Any:
        window, model.config.sliding_window = model.config.sliding_window, None
        try:
            return forward(*arguments, **settings)
        finally:
            model.config.sliding_window = window

    return run


# --- what cannot be routed is refused by name


def refused(model: PreTrainedModel) -> str:
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=type(model.config).__name__[:4]) as caught, route_attention(model, plain):
        pass
    assert model.config._attn_implementation == before
    return str(caught.value)


def test_sink_logits_that_are_not_one_to_a_query_head_are_refused_by_name() -> None:
    model = tiny_model("gpt_oss")
    attention = model.model.layers[1].self_attn
    attention.sinks = torch.nn.Parameter(torch.ones(4, 2))
    # The model's own attention cannot read them either: it only has to run.
    model.config._attn_implementation = "sdpa"
    message = refused(model)
    assert "GptOssAttention" in message
    assert "s_aux of shape (4, 2)" in message


def test_a_window_that_the_model_does_not_keep_to_is_refused_by_name() -> None:
    model = tiny_model("mistral")
    # Stands for a family (Moshi) whose config names a window that its attention does not know.
    model.model.forward = without_window(model, model.model.forward)
    message = refused(model)
    assert "MistralForCausalLM attends to all tokens before a query, its config says a window of 48 tokens" in message


def test_attention_that_is_not_causal_is_refused_by_name() -> None:
    config = CONFIG_MAPPING["bert"](vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    message = refused(AutoModelForCausalLM.from_config(config).eval())
    assert "BertLMHeadModel does not attend causally" in message


def test_a_model_that_does_not_run_is_refused_with_what_it_says() -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.register_forward_hook(lambda *_: 1 / 0)
    message = refused(model)
    assert "LlamaForCausalLM does not run on tokens alone: division by zero" in message


def test_a_model_in_training_is_looked_at_without_dropout_and_left_in_training() -> None:
    model = tiny_model("llama", attention_dropout=0.5).train()
    model.model.layers[1].eval()
    before = [module.training for module in model.modules()]
    assert len(attention_sites(model)) == 2
    assert [module.training for module in model.modules()] == before


def test_a_model_outside_the_attention_interface_is_refused_by_name() -> None:
    config = CONFIG_MAPPING["gptj"](vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4)
    message = refused(AutoModelForCausalLM.from_config(config).eval())
    assert "GPTJForCausalLM" in message
    assert "attention interface" in message


def test_heads_that_contradict_the_config_are_refused_by_name() -> None:
    model = tiny_model("gpt_neox")
    model.config.num_attention_heads = 8
    message = refused(model)
    assert "GPTNeoX" in message
    assert "4 query heads" in message
    assert "8 query heads" in message


def test_attention_that_is_no_masked_softmax_is_refused_by_name() -> None:
    model = tiny_model("llama")
    attention = model.model.layers[1].self_attn
    # Stands for whatever a family may do beside the interface, only when it computes attention itself.
    attention.o_proj.register_forward_hook(
        lambda module, inputs, output: output if model.config._attn_implementation == ATTENTION_NAME else 3 * output
    )
    message = refused(model)
    assert "LlamaForCausalLM" in message
    assert "softmax" in message


def test_a_layer_that_attends_twice_is_refused_by_name() -> None:
    model = tiny_model("llama")
    model.model.layers[1].self_attn = model.model.layers[0].self_attn
    assert "LlamaForCausalLM" in refused(model)


def test_encoder_decoders_are_refused_by_name() -> None:
    config = T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1
    )
    assert "T5Config" in refused(T5ForConditionalGeneration(config).eval())
