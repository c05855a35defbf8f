"""Caches that are passed in keep everything and are masked; kinds that cannot be had under a plan are refused before a pass begins."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import random_tokens, tiny_model
from tiny_plans import small_plan
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.generation.configuration_utils import ALL_CACHE_IMPLEMENTATIONS

from moa_lab.models import geometry_of
from moa_lab.plan import Plan, uniform_plan
from moa_lab.runtime import RingCache, apply_plan

torch.set_num_threads(1)

FOUR_FAMILIES = ["llama", "gemma2", "mistral", "gpt_neox"]


def model_of(family: str = "llama") -> PreTrainedModel:
    # Tied to its embeddings, a random model says the last token over and over.
    return tiny_model(family, tie_word_embeddings=False)


def elastic(model: PreTrainedModel) -> Plan:
    return uniform_plan(geometry_of(model), 0.5, sink_tokens=4, min_span=5)


def static(model: PreTrainedModel, capacity: int = 200) -> StaticCache:
    return StaticCache(config=model.config, max_cache_len=capacity)


@torch.no_grad()
def turns(model: PreTrainedModel, cache: Any, steps: list[int], padding: int = 0, mask_columns: int = 0) -> torch.Tensor:
    """Logits of chunk after chunk over `cache`, two rows, the second of which begins `padding` columns later."""
    total = sum(steps)
    mask = torch.ones(2, total, dtype=torch.long)
    mask[1, :padding] = 0
    tokens, positions = random_tokens(2, total) * mask, (mask.cumsum(1) - 1).clamp(min=0)
    room = torch.nn.functional.pad(mask, (0, max(mask_columns - total, 0)))
    found, at = [], 0
    for step in steps:
        end = at + step
        seen = room if mask_columns else mask[:, :end]
        settings = {"attention_mask": seen} if padding or mask_columns else {}
        logits = model(tokens[:, at:end], position_ids=positions[:, at:end], past_key_values=cache, **settings).logits
        found.append(logits * mask[:, at:end, None])
        at = end
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("plan_of", [small_plan, elastic])
@pytest.mark.parametrize("padding", [0, 13])
@pytest.mark.parametrize("family", FOUR_FAMILIES)
@pytest.mark.parametrize("n_tokens", [None, 150])
def test_a_static_cache_is_masked_as_a_dynamic_one_is(family: str, padding: int, plan_of: Any, n_tokens: int | None) -> None:
    model = model_of(family)
    # A prompt, an answer, a prompt in chunks, an answer: past every layer's own window.
    steps = [40, 1, 1, 20, 30, 1, 1]
    with apply_plan(model, plan_of(model), n_tokens=n_tokens):
        found = turns(model, static(model), steps, padding)
        expected = turns(model, DynamicCache(config=model.config), steps, padding)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("mask_columns", [0, 200])
def test_elastic_spans_over_a_static_cache_are_those_of_the_prompt(mask_columns: int) -> None:
    model = model_of()
    with apply_plan(model, elastic(model), n_tokens=60):
        expected = turns(model, DynamicCache(), [60, 1, 9])
    with apply_plan(model, elastic(model)):
        found = turns(model, static(model), [60, 1, 9], mask_columns=mask_columns)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


def test_every_cache_keeps_the_length_of_its_own_prompt() -> None:
    model = model_of()
    tokens, more = random_tokens(1, 60), random_tokens(1, 10, 1)
    with apply_plan(model, elastic(model), n_tokens=60), torch.no_grad():
        expected = model(torch.cat([tokens, more], dim=1), use_cache=False).logits[:, 60:]
    with torch.no_grad():
        filled = model(tokens).past_key_values
    with apply_plan(model, elastic(model)), torch.no_grad():
        for cache in (DynamicCache(), static(model)):
            model(tokens, past_key_values=cache)
            model(random_tokens(1, 150, 2), past_key_values=DynamicCache())
            torch.testing.assert_close(model(more, past_key_values=cache).logits, expected, atol=2e-4, rtol=1e-4)
        # What came before the plan counts: N is what the cache holds with the tokens of the first pass.
        model(more, past_key_values=filled)
        assert filled._moa_lab_n_tokens == 70


def test_a_static_cache_that_was_reset_takes_the_next_prompts_length() -> None:
    model = model_of()
    with apply_plan(model, elastic(model)):
        cache = static(model)
        turns(model, cache, [120, 1])
        cache.reset()
        found = turns(model, cache, [60, 1, 9])
        torch.testing.assert_close(found, turns(model, DynamicCache(), [60, 1, 9]), atol=2e-4, rtol=1e-4)


# --- generate


class Passed(Exception):
    """A forward pass began."""


def generate(model: PreTrainedModel, **settings: Any) -> Any:
    tokens = random_tokens(2, 30)
    mask = torch.ones_like(tokens)
    mask[1, :7] = 0
    return model.generate(tokens, attention_mask=mask, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, **settings)


@pytest.mark.parametrize("name", sorted({*ALL_CACHE_IMPLEMENTATIONS, "paged"} - {"dynamic", "hybrid"}))
@pytest.mark.parametrize("set_on", ["call", "model"])
def test_another_kind_of_cache_is_refused_by_name_before_a_pass(name: str, set_on: str) -> None:
    model = model_of()

    def passed(*_: Any) -> None:
        raise Passed

    settings: dict[str, Any] = {"cache_implementation": name} if set_on == "call" else {}
    if set_on == "model":
        model.generation_config.cache_implementation = name
    with apply_plan(model, small_plan(model), n_tokens=60):
        model.register_forward_pre_hook(passed)
        with pytest.raises(ValueError, match=r"cache_implementation|continuous batching|is not supported"):
            generate(model, **settings)


@pytest.mark.parametrize("name", [None, "dynamic", "hybrid"])
def test_the_default_cache_under_any_of_its_names_is_the_ring(name: str | None) -> None:
    model = model_of()
    with apply_plan(model, small_plan(model), n_tokens=60):
        found = generate(model, cache_implementation=name)
        assert isinstance(found.past_key_values, RingCache)
        assert found.sequences.tolist() == generate(model, past_key_values=DynamicCache()).sequences.tolist()


def test_generate_over_a_static_cache_is_refused_before_a_pass() -> None:
    model = model_of()
    with apply_plan(model, small_plan(model), n_tokens=60):
        cache = static(model)
        with pytest.raises(ValueError, match="StaticCache"):
            generate(model, past_key_values=cache)
        assert not cache.get_seq_length()
    # Without a plan it is the model's own affair.
    assert type(generate(model, cache_implementation="static").past_key_values) is StaticCache


def test_without_a_cache_none_is_refused() -> None:
    model = model_of()
    with apply_plan(model, small_plan(model), n_tokens=60):
        found = generate(model, use_cache=False)
        assert found.sequences.tolist() == generate(model).sequences.tolist()


def test_drafts_of_the_models_first_layers_are_refused_before_a_pass() -> None:
    model, tokens = model_of(), random_tokens(1, 30)

    def passed(*_: Any) -> None:
        raise Passed

    with apply_plan(model, small_plan(model), n_tokens=60):
        model.register_forward_pre_hook(passed)
        for settings in ({}, {"past_key_values": DynamicCache()}):
            with pytest.raises(ValueError, match=r"assistant_early_exit.*leave it out"):
                model.generate(tokens, assistant_early_exit=1, max_new_tokens=4, **settings)
    assert model.config.num_hidden_layers == 2
