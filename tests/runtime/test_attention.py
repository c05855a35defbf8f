"""Attention under a plan, call by call: each head sees its sink and its window, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from moa_lab.geometry import ModelGeometry
from moa_lab.interface import AttentionCall
from moa_lab.kernels.reference import masked_attention
from moa_lab.masks import KeyMask, dense_mask, visible
from moa_lab.plan import Plan, SpanRule
from moa_lab.runtime.attention import SpanAttention

torch.set_num_threads(1)

SINK = 4


def plan_of(spans: list[SpanRule], query_heads: int) -> Plan:
    """One layer with a rule per KV head, a sink of 4 and hardly a floor."""
    geometry = ModelGeometry(layers=1, query_heads=query_heads, kv_heads=len(spans), head_dim=8, max_length=4096)
    return Plan(geometry=geometry, rules=(tuple(spans),), sink_tokens=SINK, min_span=SINK + 1)


def constant(*spans: int) -> list[SpanRule]:
    return [SpanRule(float(span), 0.0) for span in spans]


def random_call(plan: Plan, n_queries: int, n_keys: int, *, batch: int = 2, softcap: float | None = None) -> AttentionCall:
    generator = torch.Generator().manual_seed(n_keys)
    shapes = [(plan.geometry.query_heads, n_queries), (plan.geometry.kv_heads, n_keys), (plan.geometry.kv_heads, n_keys)]
    query, key, value = (torch.randn(batch, heads, n, 8, generator=generator) for heads, n in shapes)
    mask = KeyMask(batch, n_queries, n_keys, query.device)
    return AttentionCall(query, key, value, mask=mask, scale=0.5, softcap=softcap)


def attend(plan: Plan, call: AttentionCall, n_tokens: int | None = None) -> torch.Tensor:
    return SpanAttention(plan, n_tokens).handler(0)(call)


@pytest.mark.parametrize("softcap", [None, 1.0])
@pytest.mark.parametrize("query_heads", [4, 8])
@pytest.mark.parametrize("n", [60, 300])
def test_a_prefill_equals_dense_masks(n: int, query_heads: int, softcap: float | None) -> None:
    plan = plan_of([*constant(128, 200, 1000), SpanRule(0.0, 0.25)], query_heads)
    call = random_call(plan, n, n, softcap=softcap)
    windows = torch.from_numpy(plan.windows(n)[0]).repeat_interleave(query_heads // 4)
    shown = dense_mask(n, SINK, windows)[None]
    expected = masked_attention(call.query, call.key, call.value, shown, 0.5, softcap)
    torch.testing.assert_close(attend(plan, call), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [1, 2, 16])
def test_the_window_ends_between_distance_w_minus_1_and_w(window: int) -> None:
    plan = plan_of(constant(SINK + window), 1)
    n = 40
    call = random_call(plan, 1, n, batch=1)
    before = attend(plan, call, n)
    for distance, seen in [(window - 1, True), (window, False), (window + 1, False)]:
        value = call.value.clone()
        value[:, :, n - 1 - distance] += 1
        after = attend(plan, AttentionCall(call.query, call.key, value, call.mask, 0.5, None), n)
        assert torch.equal(after, before) != seen, f"distance {distance}"


def test_the_sink_ends_between_positions_s_minus_1_and_s() -> None:
    plan = plan_of(constant(SINK + 5), 1)
    call = random_call(plan, 1, 40, batch=1)
    before = attend(plan, call, 40)
    for position, seen in [(0, True), (SINK - 1, True), (SINK, False)]:
        value = call.value.clone()
        value[:, :, position] += 1
        after = attend(plan, AttentionCall(call.query, call.key, value, call.mask, 0.5, None), 40)
        assert torch.equal(after, before) != seen, f"position {position}"


@pytest.mark.parametrize("softcap", [None, 1.0])
def test_poison_outside_every_span_changes_nothing(softcap: float | None) -> None:
    plan = plan_of(constant(10, 25), 4)
    n_keys, n_queries = 60, 3
    call = random_call(plan, n_queries, n_keys, softcap=softcap)
    before = attend(plan, call, n_keys)
    key, value = call.key.clone(), call.value.clone()
    for head, window in enumerate(plan.windows(n_keys)[0]):
        # Beyond the window of the oldest query, and so of all.
        key[:, head, SINK : n_keys - n_queries - window + 1] = 1e18
        value[:, head, SINK : n_keys - n_queries - window + 1] = -1e30
    assert (value < -1e29).sum() > 0
    after = attend(plan, AttentionCall(call.query, key, value, call.mask, 0.5, softcap), n_keys)
    torch.testing.assert_close(after, before, atol=0, rtol=0)


def test_query_heads_of_a_group_share_the_window_of_their_kv_head() -> None:
    plan = plan_of(constant(6, 50), 6)
    call = random_call(plan, 1, 40, batch=1)
    before = attend(plan, call, 40)
    value = call.value.clone()
    value[:, :, 20] += 1
    after = attend(plan, AttentionCall(call.query, call.key, value, call.mask, 0.5, None), 40)
    changed = (after != before).any(dim=-1)[0, :, 0].tolist()
    assert changed == [False, False, False, True, True, True]


def test_what_the_model_hides_stays_hidden() -> None:
    plan = plan_of(constant(30), 1)
    call = random_call(plan, 40, 40, batch=1)
    own = visible(torch.arange(40)[:, None], torch.arange(40)[None], 0, 8)
    positions = torch.where(own, torch.arange(40), -1).int()[None, None]
    found = attend(plan, AttentionCall(call.query, call.key, call.value, replace(call.mask, explicit=positions), 0.5, None))
    torch.testing.assert_close(found, masked_attention(call.query, call.key, call.value, own, 0.5), atol=1e-5, rtol=1e-5)


def test_rows_are_placed_by_their_own_positions() -> None:
    plan = plan_of(constant(12, 20), 2)
    n, short = 50, 33
    call = random_call(plan, n, n)
    position = torch.arange(n, dtype=torch.int32) - torch.tensor([[0], [n - short]], dtype=torch.int32)
    seen = (position[:, None, :] <= position[:, :, None]) & (position[:, None, :] >= 0)
    positions = torch.where(seen, position[:, None, :], -1)
    positions = torch.where(positions.amax(dim=-1, keepdim=True) < 0, 0, positions)[:, None]
    found = attend(plan, AttentionCall(call.query, call.key, call.value, replace(call.mask, explicit=positions), 0.5, None), n)
    for row, length in enumerate([n, short]):
        alone = AttentionCall(
            call.query[row : row + 1, :, -length:], call.key[row : row + 1, :, -length:], call.value[row : row + 1, :, -length:],
            KeyMask(1, length, length, call.query.device), 0.5, None,
        )  # fmt: skip
        torch.testing.assert_close(found[row : row + 1, :, -length:], attend(plan, alone, n), atol=1e-5, rtol=1e-5)


def test_without_a_length_the_prompts_own_decides_until_the_next_prompt() -> None:
    plan = plan_of([SpanRule(0.0, 0.5)], 1)
    spans = SpanAttention(plan)
    attended = spans.handler(0)

    def seen_by_last(n_queries: int, n_keys: int) -> int:
        call = random_call(plan, n_queries, n_keys, batch=1)
        value = call.value.clone().requires_grad_(True)
        output = attended(AttentionCall(call.query, call.key, value, call.mask, 0.5, None))
        (gradient,) = torch.autograd.grad(output[:, :, -1].sum(), value)
        return int((gradient.abs().sum(dim=-1) > 0).sum())

    assert seen_by_last(80, 80) == 40
    assert [seen_by_last(1, n) for n in (81, 82, 120)] == [40, 40, 40]
    assert seen_by_last(200, 200) == 100
    assert seen_by_last(1, 201) == 100


def test_a_given_length_decides_for_prompts_of_any_length() -> None:
    plan = plan_of([SpanRule(0.0, 0.5)], 1)
    call = random_call(plan, 80, 80)
    wide = plan_of(constant(60), 1)
    torch.testing.assert_close(attend(plan, call, 120), attend(wide, call, 120))
    assert not torch.allclose(attend(plan, call), attend(wide, call, 120))
    assert np.array_equal(plan.windows(120), wide.windows(120))
