"""A plan as a mask in another harness: it shows what moa_lab's own visibility shows, and answers as `apply_plan` does."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import random_tokens, tiny_model
from transformers import DynamicCache, PreTrainedModel

from moa_lab.kernels.reference import masked_attention
from moa_lab.masks import dense_mask
from moa_lab.models import geometry_of
from moa_lab.plan import Plan, SpanRule
from moa_lab.presses.attention import SpanMask, attending, without_masked_keys
from moa_lab.runtime import apply_plan

N_TOKENS, CONTEXT, ASKED = 200, 170, 22
"""Context, question, and then an answer token by token."""


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_model(request.param)


def plan_for(model: PreTrainedModel) -> Plan:
    """Spans of 24, a quarter and the whole: the last wrap while the question is answered."""
    rules = ((SpanRule(24, 0), SpanRule(0, 0.25)), (SpanRule(0, 1), SpanRule(100, 0.375)))
    return Plan(geometry_of(model), rules, sink_tokens=8, min_span=16)


def in_three_parts(model: PreTrainedModel, tokens: torch.Tensor, mask: SpanMask) -> torch.Tensor:
    """Logits as a harness makes them: the context, then the question in one piece, then token by token."""
    cache = DynamicCache()
    pieces = [tokens[:, :CONTEXT], tokens[:, CONTEXT : CONTEXT + ASKED], *tokens[:, CONTEXT + ASKED :].split(1, dim=1)]
    with torch.inference_mode(), attending(model, mask, "spans"):
        return torch.cat([model(input_ids=piece, past_key_values=cache).logits for piece in pieces], dim=1)


def test_the_mask_of_a_chunk_is_the_last_rows_of_the_whole_mask(model: PreTrainedModel) -> None:
    plan = plan_for(model)
    mask = SpanMask(plan, N_TOKENS)
    for layer, windows in enumerate(plan.windows(N_TOKENS)):
        whole = dense_mask(N_TOKENS, plan.sink_tokens, torch.from_numpy(windows))
        for n_queries in (1, ASKED, N_TOKENS):
            assert torch.equal(mask.shown(layer, n_queries, N_TOKENS, torch.device("cpu")), whole[:, -n_queries:])


def test_answers_in_pieces_are_those_of_apply_plan(model: PreTrainedModel) -> None:
    plan, tokens = plan_for(model), random_tokens(1, N_TOKENS)
    found = in_three_parts(model, tokens, SpanMask(plan, N_TOKENS))
    with torch.inference_mode(), apply_plan(model, plan, N_TOKENS):
        expected = model(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    with torch.inference_mode():
        dense = model(input_ids=tokens).logits
    assert (found - dense)[:, -1].abs().max() > 1e-2


def test_a_context_that_is_read_densely_is_the_dense_models_and_what_follows_is_not(model: PreTrainedModel) -> None:
    plan, tokens = plan_for(model), random_tokens(1, N_TOKENS, seed=1)
    found = in_three_parts(model, tokens, SpanMask(plan, N_TOKENS, reads_densely=True))
    in_spans = in_three_parts(model, tokens, SpanMask(plan, N_TOKENS))
    with torch.inference_mode():
        dense = model(input_ids=tokens).logits
    torch.testing.assert_close(found[:, :CONTEXT], dense[:, :CONTEXT], atol=1e-4, rtol=1e-4)
    for other in (dense, in_spans):
        assert (found - other)[:, CONTEXT:].abs().amax(dim=-1).min() > 1e-4


def test_what_is_held_is_what_the_plan_keeps(model: PreTrainedModel) -> None:
    plan = plan_for(model)
    mask = SpanMask(plan, N_TOKENS)
    in_three_parts(model, random_tokens(1, N_TOKENS), mask)
    assert [int(mask.held[layer]) for layer in range(2)] == plan.spans(N_TOKENS).sum(axis=1).tolist()
    assert sum(map(int, mask.held.values())) / (4 * N_TOKENS) == pytest.approx(plan.density(N_TOKENS))


def test_the_model_is_as_before_also_after_an_exception(model: PreTrainedModel) -> None:
    tokens = random_tokens(1, 60)
    before = model(input_ids=tokens).logits
    with pytest.raises(RuntimeError, match="inside"), attending(model, SpanMask(plan_for(model), 60), "spans"):
        raise RuntimeError("inside")
    np.testing.assert_array_equal(model(input_ids=tokens).logits.numpy(), before.numpy())


@pytest.mark.parametrize("n_queries", [1, 5])
def test_masked_keys_are_hidden_from_all_queries_and_no_others_are(n_queries: int) -> None:
    n_keys, kv_heads, group = 12, 2, 3
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, kv_heads * group, n_queries, 8, generator=generator)
    key, value = torch.randn(2, 1, kv_heads, n_keys, 8, generator=generator)
    heads, keys = torch.tensor([0, 0, 1]), torch.tensor([1, 4, 6])
    # What is hidden would be seen by all.
    key[0, heads, keys] = 100 * query[0, group * heads, 0]
    value[0, heads, keys] = 1e4
    module = SimpleNamespace(masked_key_indices=(torch.zeros(3, dtype=torch.long), heads, keys), num_key_value_groups=group)
    found, _ = without_masked_keys(module, query, key, value, None, scaling=0.25)
    shown = torch.ones(kv_heads, n_queries, n_keys, dtype=torch.bool).tril(n_keys - n_queries)
    for head, hidden in zip(heads.tolist(), keys.tolist(), strict=True):
        shown[head, :, hidden] = False
    expected = masked_attention(query, key, value, shown.repeat_interleave(group, dim=0)[None], 0.25)
    torch.testing.assert_close(found.transpose(1, 2), expected, atol=1e-5, rtol=1e-5)


def test_a_new_context_forgets_what_was_masked_in_the_last() -> None:
    query, key, value = torch.randn(3, 1, 2, 6, 8, generator=torch.Generator().manual_seed(0))
    stale = tuple(torch.zeros(3, dtype=torch.long) for _ in range(3))
    module = SimpleNamespace(masked_key_indices=stale, num_key_value_groups=1, is_causal=True)
    found, _ = without_masked_keys(module, query, key, value, None, scaling=0.25)
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    torch.testing.assert_close(found.transpose(1, 2), masked_attention(query, key, value, causal[None, None], 0.25))
    assert module.masked_key_indices is None
