"""A model that was compiled computes under a plan what it would otherwise, layer by layer, and is itself again afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import random_tokens, tiny_model
from tiny_plans import small_plan
from torch._dynamo.testing import CompileCounter
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

from moa_lab.models import geometry_of
from moa_lab.plan import Plan, SpanRule
from moa_lab.runtime import RingCache, apply_plan, ring_cache

torch.set_num_threads(1)

WAYS: dict[str, Callable[..., Any]] = {"module": torch.compile, "forward": lambda model, **settings: _forward(model, **settings)}
PADDED = torch.ones(2, 60, dtype=torch.long)
PADDED[0, :9] = 0


def _forward(model: PreTrainedModel, **settings: Any) -> PreTrainedModel:
    model.forward = torch.compile(model.forward, **settings)
    return model


def reversed_plan(model: PreTrainedModel) -> Plan:
    """Another plan: the layers of `small_plan` in reverse."""
    plan = small_plan(model)
    return Plan(geometry=plan.geometry, rules=plan.rules[::-1], sink_tokens=4, min_span=5)


def logits(model: Any, tokens: torch.Tensor, mask: torch.Tensor | None = None, **settings: Any) -> torch.Tensor:
    with torch.no_grad():
        found = model(tokens, attention_mask=mask, **settings).logits
    # Nobody reads what padding says.
    return found if mask is None else found[mask.bool()]


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("family", "way", "whole"),
    # The second family has windows of its own in every other layer.
    [("llama", "module", True), ("gemma2", "forward", True), ("llama", "forward", False)],
)
def test_one_compiled_model_serves_plan_after_plan_and_is_dense_in_between(family: str, way: str, whole: bool) -> None:
    settings: dict[str, Any] = {"tie_word_embeddings": False, "attn_implementation": "eager"}
    plain, frames = tiny_model(family, **settings), CompileCounter()
    compiled = WAYS[way](tiny_model(family, **settings), backend=frames, fullgraph=whole)
    cases = [(random_tokens(2, 60), None), (random_tokens(2, 60), PADDED), (random_tokens(2, 47), None)]
    # A cache that the hook makes before the graph begins is a ring.
    settings = {"use_cache": False} if whole and way == "forward" else {}
    dense = [logits(plain, *case) for case in cases[:2]]
    counts = []
    for plan in (small_plan(plain), reversed_plan(plain)):
        torch.testing.assert_close(logits(compiled, *cases[0], **settings), dense[0], atol=1e-5, rtol=1e-5)
        with apply_plan(plain, plan, 60):
            expected = [logits(plain, *case) for case in cases]
        with apply_plan(compiled, plan, 60):
            for case, wanted in zip(cases, expected, strict=True):
                torch.testing.assert_close(logits(compiled, *case, **settings), wanted, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(expected[0], dense[0], atol=1e-2)
        counts.append(frames.frame_count)
    torch.testing.assert_close(logits(compiled, *cases[0], **settings), dense[0], atol=1e-5, rtol=1e-5)
    assert not whole or counts[0] == counts[1], "another plan needs no other graph"


def test_a_model_compiled_within_a_plan_makes_the_ring_and_goes_on_over_it() -> None:
    model = tiny_model("gemma2", tie_word_embeddings=False)
    tokens = random_tokens(2, 70)
    with apply_plan(model, small_plan(model), 70):
        expected = [logits(model, tokens[:, :64]), logits(model, tokens)]
        compiled = torch.compile(model, backend="eager")
        with torch.no_grad():
            first = compiled(tokens[:, :64])
            assert isinstance(first.past_key_values, RingCache)
            second = compiled(tokens[:, 64:], past_key_values=first.past_key_values)
    torch.testing.assert_close(first.logits, expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(second.logits, expected[1][:, 64:], atol=1e-4, rtol=1e-4)


def test_a_compiled_model_generates_what_it_would_uncompiled() -> None:
    model = tiny_model("llama", tie_word_embeddings=False)
    tokens = random_tokens(1, 40)
    settings = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6, "return_dict_in_generate": True}
    with apply_plan(model, small_plan(model)):
        expected = model.generate(tokens, **settings).sequences
        model.compile(backend="eager")
        found = model.generate(tokens, **settings)
        assert isinstance(found.past_key_values, RingCache)
    assert found.sequences.tolist() == expected.tolist()


def test_a_graph_of_one_piece_refuses_a_ring_in_words() -> None:
    model = tiny_model("llama")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with apply_plan(model, small_plan(model)), pytest.raises(RuntimeError, match="compile without fullgraph=True, or use moa_lab"):
        compiled(random_tokens(1, 20), past_key_values=ring_cache(model))


def test_gradients_through_a_compiled_model_are_those_of_the_plan() -> None:
    found = []
    for compiled in (False, True):
        model = tiny_model("llama").requires_grad_(True).train()
        whole = torch.compile(model, backend="aot_eager") if compiled else model
        with apply_plan(model, small_plan(model)):
            whole(random_tokens(1, 40), labels=random_tokens(1, 40)).loss.backward()
        found.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-4)


def test_sink_logits_reach_a_compiled_model_in_broken_graphs_and_in_whole_ones() -> None:
    model = tiny_model("gpt_oss")
    # The other way of running experts asks the host, which no whole graph does.
    model.config._experts_implementation = "batched_mm"
    tokens, plan = random_tokens(2, 60), small_plan(model)
    with apply_plan(model, plan, 60):
        expected, padded = logits(model, tokens), logits(model, tokens, PADDED)
        without = [layer.self_attn.sinks.data.clone() for layer in model.model.layers]
        for layer in model.model.layers:
            layer.self_attn.sinks.data.fill_(-1e4)
        assert not torch.allclose(logits(model, tokens), expected, atol=1e-2)
        for layer, sinks in zip(model.model.layers, without, strict=True):
            layer.self_attn.sinks.data.copy_(sinks)
    for whole in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=whole)
        with apply_plan(compiled, plan, 60):
            torch.testing.assert_close(logits(compiled, tokens), expected, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(logits(compiled, tokens, PADDED), padded, atol=1e-5, rtol=1e-5)


def over(model: Any, cache: Cache, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of a prompt and of a chunk that follows it, over `cache`."""
    return torch.cat([logits(model, part, past_key_values=cache) for part in tokens.split([50, 10], dim=1)], dim=1)


def test_a_static_cache_is_masked_in_compiled_passes_as_in_others() -> None:
    model = tiny_model("gemma2", layers=2)
    tokens, compiled = random_tokens(2, 60), torch.compile(model, backend="eager")
    with apply_plan(model, small_plan(model)):
        expected = over(model, DynamicCache(config=model.config), tokens)
        found = over(compiled, StaticCache(config=model.config, max_cache_len=70), tokens)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_graph_of_one_piece_goes_on_over_a_cache_where_the_length_is_given() -> None:
    model = tiny_model("llama", layers=2)
    tokens, compiled = random_tokens(2, 60), torch.compile(model, backend="eager", fullgraph=True)
    with apply_plan(model, small_plan(model), 60):
        expected = over(model, DynamicCache(config=model.config), tokens)
        torch.testing.assert_close(over(compiled, DynamicCache(config=model.config), tokens), expected, atol=1e-5, rtol=1e-5)
    with apply_plan(model, small_plan(model)), pytest.raises(RuntimeError, match="give apply_plan n_tokens"):
        over(compiled, DynamicCache(config=model.config), tokens)


def test_a_graph_of_one_piece_refuses_a_static_cache_that_holds_tokens_in_words() -> None:
    model = tiny_model("llama", layers=2)
    tokens, compiled = random_tokens(1, 60), torch.compile(model, backend="eager", fullgraph=True)
    cache = StaticCache(config=model.config, max_cache_len=70)
    with apply_plan(model, small_plan(model), 60):
        expected = logits(model, tokens[:, :50])
        torch.testing.assert_close(logits(compiled, tokens[:, :50], past_key_values=cache), expected, atol=1e-5, rtol=1e-5)
        with pytest.raises(RuntimeError, match="compile without fullgraph=True, or use moa_lab"):
            logits(compiled, tokens[:, 50:], past_key_values=cache)


def test_of_nested_plans_a_compiled_model_follows_the_inner_one() -> None:
    model = tiny_model("llama", layers=2, tie_word_embeddings=False)
    tokens, compiled = random_tokens(2, 60), torch.compile(model, backend="eager")
    expected = []
    for plan in (small_plan(model), reversed_plan(model)):
        with apply_plan(model, plan):
            expected.append(logits(model, tokens))
    with apply_plan(compiled, small_plan(model)):
        torch.testing.assert_close(logits(compiled, tokens), expected[0], atol=1e-5, rtol=1e-5)
        outer = ring_cache(compiled)
        with apply_plan(compiled, reversed_plan(model)):
            torch.testing.assert_close(logits(compiled, tokens), expected[1], atol=1e-5, rtol=1e-5)
            with pytest.raises(RuntimeError, match="where its plan is not in force"):
                logits(compiled, tokens, past_key_values=outer)
        torch.testing.assert_close(logits(compiled, tokens), expected[0], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_what_inductor_makes_of_it_is_the_same() -> None:
    model = tiny_model("llama", layers=2, tie_word_embeddings=False)
    tokens, plan = random_tokens(1, 60), small_plan(model)
    elastic = Plan(geometry=geometry_of(model), rules=((SpanRule(0.0, 0.2),) * 2, (SpanRule(0.0, 0.5),) * 2), sink_tokens=4, min_span=5)
    compiled = torch.compile(model, fullgraph=True)
    for applied in (plan, elastic):
        with apply_plan(model, applied), torch.inference_mode():
            expected = model(tokens, use_cache=False).logits
            torch.testing.assert_close(compiled(tokens, use_cache=False).logits, expected, atol=1e-5, rtol=1e-5)
