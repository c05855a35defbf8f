"""Whole models under a plan: in one pass, in chunks, padded, generating; and as they were afterwards."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import FAMILIES, VOCABULARY, WINDOW_TOKENS, random_tokens, tiny_model
from tiny_plans import small_plan
from transformers import DynamicCache, PreTrainedModel

from moa_lab.interface import AttentionCall, route_attention
from moa_lab.kernels.reference import masked_attention
from moa_lab.masks import dense_mask
from moa_lab.models import geometry_of, weights_fingerprint
from moa_lab.plan import Plan, SpanRule, dense_plan, uniform_plan
from moa_lab.provenance import Provenance
from moa_lab.runtime import apply_plan

torch.set_num_threads(1)

SPANS = (SpanRule(128.0, 0.0), SpanRule(200.0, 0.0), SpanRule(1000.0, 0.0), SpanRule(0.0, 0.5))


def mixed_plan(model: PreTrainedModel, sink_tokens: int = 64, **fields: Any) -> Plan:
    """Spans of 128, 200, 1000 and half the length, dealt out over all KV heads."""
    geometry = geometry_of(model)
    rules = tuple(tuple(SPANS[(layer + head) % 4] for head in range(geometry.kv_heads)) for layer in range(geometry.layers))
    return Plan(geometry=geometry, rules=rules, sink_tokens=sink_tokens, **fields)


@torch.no_grad()
def logits_of(model: PreTrainedModel, tokens: torch.Tensor, **inputs: Any) -> torch.Tensor:
    return model(input_ids=tokens, **inputs).logits


def under_dense_masks(model: PreTrainedModel, plan: Plan, tokens: torch.Tensor, n_tokens: int | None = None) -> torch.Tensor:
    """Logits of one uncached pass in which every head has its mask of all (query, key) pairs."""
    n = tokens.shape[1]
    windows = torch.from_numpy(plan.windows(n_tokens or n)).repeat_interleave(plan.geometry.group_size, dim=1)

    def masked(layer: int) -> Callable[[AttentionCall], torch.Tensor]:
        shown = dense_mask(n, plan.sink_tokens, windows[layer])

        def handler(call: AttentionCall) -> torch.Tensor:
            return masked_attention(
                call.query, call.key, call.value, shown & (call.positions >= 0), call.scale, call.softcap, call.sink_logits
            )

        return handler

    with route_attention(model, masked):
        return logits_of(model, tokens, use_cache=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_under_a_plan_equals_dense_masks(family: str) -> None:
    model = tiny_model(family)
    # Their sdpa drops soft-capping.
    model.set_attn_implementation("eager")
    plan = mixed_plan(model)
    tokens = random_tokens(2, 320)
    own = logits_of(model, tokens)
    with apply_plan(model, plan) as planned:
        found = logits_of(planned, tokens)
    torch.testing.assert_close(found, under_dense_masks(model, plan, tokens), atol=2e-4, rtol=1e-4)
    # Within the smallest span nothing is masked; beyond it all change but the model whose own windows are smaller still.
    torch.testing.assert_close(found[:, :128], own[:, :128], atol=2e-4, rtol=1e-4)
    assert torch.allclose(found[:, -50:], own[:, -50:], atol=1e-3) == (family == "mistral")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dense_plan_changes_nothing(family: str) -> None:
    model = tiny_model(family)
    model.set_attn_implementation("eager")
    tokens = random_tokens(1, 150)
    own = logits_of(model, tokens)
    with apply_plan(model, dense_plan(geometry_of(model))):
        torch.testing.assert_close(logits_of(model, tokens), own, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("span", [WINDOW_TOKENS, WINDOW_TOKENS + 15])
def test_a_span_of_all_that_a_layers_own_window_shows_changes_nothing(span: int) -> None:
    model = tiny_model("mistral")
    plan = Plan(geometry_of(model), ((SpanRule(float(span), 0.0),) * 2,) * 2, sink_tokens=16, min_span=17)
    assert plan.density(150) == 1
    tokens = random_tokens(1, 150)
    own = logits_of(model, tokens)
    with apply_plan(model, plan):
        torch.testing.assert_close(logits_of(model, tokens), own, atol=2e-4, rtol=1e-4)
        steps = [model(tokens[:, :100])]
        steps += [model(tokens[:, at : at + 1], past_key_values=steps[0].past_key_values) for at in range(100, 150)]
    torch.testing.assert_close(torch.cat([step.logits for step in steps], dim=1), own, atol=2e-4, rtol=1e-4)


def test_the_last_query_loses_exactly_what_lies_beyond_its_window() -> None:
    model = tiny_model("llama", layers=1)
    geometry = geometry_of(model)
    window, n = 10, 40
    plan = Plan(geometry=geometry, rules=((SpanRule(4.0 + window, 0.0),) * 2,), sink_tokens=4, min_span=5)
    tokens = random_tokens(1, n)
    with apply_plan(model, plan):
        before = logits_of(model, tokens)[0, -1]
        for position in (0, 3, 4, 20, n - 1 - window - 1, n - 1 - window, n - 1 - window + 1, n - 1):
            changed = tokens.clone()
            changed[0, position] = (changed[0, position] + 7) % VOCABULARY
            seen = position < 4 or n - 1 - position < window
            assert torch.equal(logits_of(model, changed)[0, -1], before) != seen, f"position {position}"


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral", "gpt_neox"])
def test_rows_of_a_left_padded_batch_equal_their_unpadded_runs(family: str) -> None:
    model = tiny_model(family)
    plan = small_plan(model)
    lengths = [90, 61, 7]
    mask = (torch.arange(90)[None] >= 90 - torch.tensor(lengths)[:, None]).long()
    tokens = random_tokens(3, 90) * mask
    with apply_plan(model, plan, n_tokens=90):
        batch = logits_of(model, tokens, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
        for row, n_tokens in enumerate(lengths):
            alone = logits_of(model, tokens[row : row + 1, -n_tokens:])
            torch.testing.assert_close(batch[row, -n_tokens:], alone[0], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral", "phi3"])
def test_turns_over_a_cache_equal_one_pass(family: str) -> None:
    model = tiny_model(family)
    plan = small_plan(model)
    tokens = random_tokens(2, 130)
    expected = under_dense_masks(model, plan, tokens)
    cache = DynamicCache(config=model.config)
    pieces = []
    # A prompt, an answer token by token, a second prompt, a second answer.
    turns = [(0, 50), *((i, i + 1) for i in range(50, 70)), (70, 120), *((i, i + 1) for i in range(120, 130))]
    with apply_plan(model, plan, n_tokens=130):
        for start, stop in turns:
            pieces.append(logits_of(model, tokens[:, start:stop], past_key_values=cache, use_cache=True))
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral", "gpt_neox"])
def test_greedy_generation_equals_recomputing_every_token_from_scratch(family: str) -> None:
    # Tied to its embeddings, a random model says the last token over and over.
    model = tiny_model(family, tie_word_embeddings=False)
    plan = small_plan(model)
    prompt, new = random_tokens(1, 60), 15
    with apply_plan(model, plan, n_tokens=75):
        generated = model.generate(prompt, do_sample=False, max_new_tokens=new, min_new_tokens=new, attention_mask=torch.ones_like(prompt))
    tokens = prompt
    for _ in range(new):
        logits = under_dense_masks(model, plan, tokens, n_tokens=75)[:, -1]
        logits[:, model.generation_config.eos_token_id] = float("-inf")
        tokens = torch.cat([tokens, logits.argmax(dim=-1, keepdim=True)], dim=1)
    assert generated.tolist() == tokens.tolist()
    own = model.generate(prompt, do_sample=False, max_new_tokens=new, min_new_tokens=new, attention_mask=torch.ones_like(prompt))
    assert generated.tolist() != own.tolist()


def test_a_left_padded_batch_generates_what_its_rows_do() -> None:
    model = tiny_model("llama")
    lengths, new = [60, 41], 10
    mask = (torch.arange(60)[None] >= 60 - torch.tensor(lengths)[:, None]).long()
    tokens = random_tokens(2, 60) * mask
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new}
    with apply_plan(model, small_plan(model), n_tokens=70):
        batch = model.generate(tokens, attention_mask=mask, **settings)
        for row, n_tokens in enumerate(lengths):
            prompt = tokens[row : row + 1, -n_tokens:]
            alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
            assert batch[row, 60:].tolist() == alone[0, n_tokens:].tolist()


def test_elastic_spans_keep_the_prompts_length_while_tokens_are_generated() -> None:
    model = tiny_model("llama")
    plan = uniform_plan(geometry_of(model), 0.5, sink_tokens=4, min_span=5)
    prompt = random_tokens(1, 60)
    settings: dict[str, Any] = {
        "do_sample": False, "max_new_tokens": 15, "min_new_tokens": 15, "attention_mask": torch.ones_like(prompt),
    }  # fmt: skip
    with apply_plan(model, plan):
        found = model.generate(prompt, **settings).tolist()
        again = model.generate(prompt, **settings).tolist()
        longer = logits_of(model, random_tokens(1, 90))
    with apply_plan(model, plan, n_tokens=60):
        assert found == again == model.generate(prompt, **settings).tolist()
    torch.testing.assert_close(longer, under_dense_masks(model, plan, random_tokens(1, 90)), atol=2e-4, rtol=1e-4)


def test_a_plan_of_another_geometry_is_refused_naming_both() -> None:
    model = tiny_model("llama")
    other = geometry_of(tiny_model("olmo2"))
    with pytest.raises(ValueError, match=r"4 query heads / 4 KV heads.*4 query heads / 2 KV heads"), apply_plan(model, dense_plan(other)):
        pass


@pytest.mark.parametrize("n_tokens", [0, -1, 513])
def test_a_length_outside_the_model_is_refused(n_tokens: int) -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=r"n_tokens must lie in 1\.\.512"), apply_plan(model, mixed_plan(model), n_tokens):
        pass


@pytest.mark.parametrize("n_tokens", [20.0, True, "20"])
def test_a_length_that_is_no_whole_number_is_refused(n_tokens: Any) -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="n_tokens must be a whole number"), apply_plan(model, mixed_plan(model), n_tokens):
        pass


@pytest.mark.parametrize("plan", [None, {}, 0.5])
def test_what_is_neither_a_plan_nor_a_path_is_refused(plan: Any) -> None:
    with pytest.raises(ValueError, match="must be a Plan or the path of a config card"), apply_plan(tiny_model("llama"), plan):
        pass


def test_a_plan_made_on_other_weights_warns_and_still_runs(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llama")
    own = mixed_plan(model, provenance=Provenance(weights=weights_fingerprint(model)))
    foreign = mixed_plan(model, provenance=Provenance(weights="0123456789abcdef"), name="foreign")
    with caplog.at_level(logging.WARNING):
        with apply_plan(model, own):
            pass
        assert not caplog.records
        with apply_plan(model, foreign):
            logits_of(model, random_tokens(1, 10))
    assert "'foreign' was made on weights 0123456789abcdef" in caplog.text


def test_the_model_is_as_before_on_exit_and_after_an_exception() -> None:
    model = tiny_model("llama")
    tokens = random_tokens(1, 60)
    before, own = model.config._attn_implementation, logits_of(model, tokens)

    def interrupted() -> None:
        with apply_plan(model, small_plan(model)):
            assert not torch.allclose(logits_of(model, tokens), own, atol=1e-3)
            raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        interrupted()
    assert model.config._attn_implementation == before
    torch.testing.assert_close(logits_of(model, tokens), own, atol=0, rtol=0)


def test_leaving_an_inner_plan_restores_the_outer_one() -> None:
    model = tiny_model("llama")
    tokens = random_tokens(1, 60)
    with apply_plan(model, small_plan(model)):
        outer = logits_of(model, tokens)
        with apply_plan(model, dense_plan(geometry_of(model))):
            assert not torch.allclose(logits_of(model, tokens), outer, atol=1e-3)
        torch.testing.assert_close(logits_of(model, tokens), outer, atol=0, rtol=0)
