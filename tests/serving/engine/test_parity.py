from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from served_engine import Start, check_tokens
from tiny import random_tokens, tiny_model
from tiny_plans import mixed_plan, small_plan, stored_plan
from transformers import PreTrainedModel

from moa_lab.plan import Plan, SpanRule
from moa_lab.serving.page_pool import page_shape

RAGGED = (1, 2, 15, 16, 17, 40, 90, 130)


def prompts(lengths: tuple[int, ...] = RAGGED) -> list[list[int]]:
    return [random_tokens(1, length, seed=length)[0].tolist() for length in lengths]


def test_ragged_prompts_and_answers_far_past_the_window_are_those_of_generate(start: Start, llama: PreTrainedModel) -> None:
    plan = mixed_plan(llama)
    engine = start(llama, plan)
    asked = prompts()
    found = engine.tokens(asked, [100 + length % 7 for length in RAGGED])
    assert engine.most_running == len(RAGGED)
    assert engine.usage == 0
    check_tokens(llama, plan, asked, found)


@pytest.mark.parametrize("page_tokens", [16, 32])
def test_prompts_that_come_in_chunks_and_rings_that_wrap_within_them(start: Start, llama: PreTrainedModel, page_tokens: int) -> None:
    plan = small_plan(llama)
    engine = start(llama, plan, max_num_batched_tokens=23, block_size=page_tokens)
    asked = prompts()
    check_tokens(llama, plan, asked, engine.tokens(asked, 40), page_tokens=page_tokens)


def test_requests_that_were_preempted_are_computed_again(start: Start, llama: PreTrainedModel) -> None:
    plan = mixed_plan(llama)
    # A page holds 16 tokens of 16 numbers, K and V, in float32: room for little more than two requests of the greatest length.
    engine = start(llama, plan, kv_cache_memory_bytes=60 * 2 * 16 * 16 * 4)
    asked = prompts((60, 70, 80, 90, 40))
    found = engine.tokens(asked, 120)
    assert engine.most_preemptions > 0
    assert engine.usage == 0
    check_tokens(llama, plan, asked, found)


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gemma3"])
def test_families(start: Start, family: str) -> None:
    model = tiny_model(family)
    plan = mixed_plan(model)
    engine = start(model, plan)
    asked = prompts((3, 50, 120))
    check_tokens(model, plan, asked, engine.tokens(asked, 30))


def growing(model: PreTrainedModel) -> Plan:
    """Heads that keep a third and two thirds of the length."""
    plan = mixed_plan(model)
    rules = tuple(tuple(SpanRule(3.0, (1 + (layer + head) % 2) / 3) for head in range(len(row))) for layer, row in enumerate(plan.rules))
    return replace(plan, rules=rules)


def test_windows_that_grow_are_those_of_each_requests_own_length(start: Start, llama: PreTrainedModel) -> None:
    plan = growing(llama)
    engine = start(llama, plan, max_num_batched_tokens=64)
    asked = prompts((130, 20, 90, 1, 50, 111))
    # Six lengths in one batch, and five buckets.
    found = engine.tokens(asked, [60, 40, 38, 30, 55, 100])
    assert engine.most_running == 6
    check_tokens(llama, plan, asked, found)


def test_stored_bits_are_pages_of_fewer_bytes_that_hold_what_a_packed_ring_does(start: Start, llama: PreTrainedModel) -> None:
    plan = growing(llama).with_bits(8)
    engine = start(llama, plan, max_num_batched_tokens=64, kv_cache_memory_bytes=1 << 20)
    asked = prompts((130, 20, 90, 1, 50))
    check_tokens(llama, plan, asked, engine.tokens(asked, 50))
    # 16 tokens of 16 codes and a grid, K and V.
    assert engine.pages == (1 << 20) // (16 * 2 * (16 + 4))


def test_heads_that_store_other_bits_share_a_pool(start: Start, llama: PreTrainedModel) -> None:
    rules = growing(llama).rules
    plan = replace(stored_plan(llama), rules=rules)
    assert len({pair for row in plan.bits for pair in row}) > 2
    engine = start(llama, plan, max_num_batched_tokens=64, kv_cache_memory_bytes=1 << 20)
    asked = prompts((130, 20, 90, 1, 50))
    check_tokens(llama, plan, asked, engine.tokens(asked, 50))
    assert engine.pages == (1 << 20) // page_shape(plan, 16, torch.float32).nbytes


def test_windows_as_at_another_length_and_the_same_engine_asked_twice(
    start: Start, llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOA_LAB_PLAN_LENGTH", "100")
    plan = growing(llama)
    engine = start(llama, plan)
    asked = prompts((80, 20))
    found = engine.tokens(asked, 60)
    assert engine.tokens(asked, 60) == found
    check_tokens(llama, plan, asked, found, 100)
