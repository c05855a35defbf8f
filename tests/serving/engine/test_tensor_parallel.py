"""vLLM on two devices, which are two processes here, each with some of the KV heads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from served_engine import SETTINGS, Engine, Start, check_tokens
from tiny import random_tokens, tiny_model
from transformers import PreTrainedModel

from moa_lab.models import geometry_of
from moa_lab.plan import Plan, SpanRule
from moa_lab.serving import bucket_lengths
from moa_lab.serving.shares import balanced_shares, natural_shares

RAGGED = (1, 2, 15, 16, 17, 40, 90, 130)
LONGEST, PAGE_TOKENS = SETTINGS["max_model_len"], SETTINGS["block_size"]


@pytest.fixture
def two(start: Start, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """As `start`, on two devices."""
    cores = sorted(os.sched_getaffinity(0))
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{cores[0]}|{cores[-1]}")
    # They wait for a signal, which comes after so long.
    monkeypatch.setenv("VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS", "1")
    made: list[Engine] = []

    def make(model: PreTrainedModel, plan: Plan | None, **settings: Any) -> Engine:
        made.append(start(model, plan, tensor_parallel_size=2, distributed_executor_backend="mp", **settings))
        return made[-1]

    yield make
    for engine in made:
        engine.llm.llm_engine.engine_core.shutdown()


def plan_of(model: PreTrainedModel) -> Plan:
    """In each layer a whole head, which comes first, and windows of one, two and three pages, of which every other one grows."""
    geometry = geometry_of(model)
    windows = [
        [SpanRule(9.0 + 12 * head, (layer + head) % 2 / 4) for head in range(1, geometry.kv_heads)] for layer in range(geometry.layers)
    ]
    rules = tuple((SpanRule(0.0, 1.0), *row) for row in windows)
    return Plan(geometry=geometry, rules=rules, sink_tokens=4, min_span=5)


def check_ragged(engine: Engine, model: PreTrainedModel, plan: Plan, lengths: tuple[int, ...] = RAGGED) -> None:
    """Prompts in chunks, all at once, and answers of many times the windows."""
    asked = [random_tokens(1, length, seed=length)[0].tolist() for length in lengths]
    found = engine.tokens(asked, [100 + length % 7 for length in lengths])
    assert engine.most_running == len(lengths)
    assert engine.usage == 0
    check_tokens(model, plan, asked, found)


def test_heads_that_are_dealt_anew_answer_as_generate_does_and_as_many_requests_fit_as_was_told(two: Start) -> None:
    """All whole heads come first in their layers: in the model's order the first device would hold all of them."""
    model = tiny_model("llama", layers=4, max_length=1024, num_attention_heads=8, num_key_value_heads=4)
    plan = plan_of(model)
    shares = balanced_shares(plan, 2, bucket_lengths(LONGEST, PAGE_TOKENS), PAGE_TOKENS)
    least, dealt, natural = (
        each.density(plan, LONGEST, PAGE_TOKENS) for each in (natural_shares(plan.geometry), shares, natural_shares(plan.geometry, 2))
    )
    assert dealt < 1.1 * least < 1.3 * least < natural
    pages = shares.pages(plan, bucket_lengths(LONGEST, PAGE_TOKENS), LONGEST, PAGE_TOKENS)[0].most_pages(LONGEST)
    # Of one head, K and V of 16 numbers each, in float32; one page belongs to nobody.
    page_bytes = PAGE_TOKENS * 2 * 16 * 4
    engine = two(model, plan, max_num_batched_tokens=40, kv_cache_memory_bytes=(9 * pages + 1) * page_bytes)
    assert engine.pages == 9 * pages + 1
    assert engine.concurrency == pytest.approx(9, rel=0.02)
    check_ragged(engine, model, plan)
    prompts = [random_tokens(1, LONGEST - 56, seed=seed)[0].tolist() for seed in range(9)]
    engine.tokens(prompts, 56)
    assert engine.most_running == 9
    assert engine.most_preemptions == 0


def test_devices_that_hold_different_numbers_of_pages_go_by_one_block_table(two: Start) -> None:
    """One whole head, which one of the devices must have: the heads stay in their order, and places stay empty on the other device."""
    model = tiny_model("qwen3", layers=2, num_attention_heads=8, num_key_value_heads=4)
    short = SpanRule(9.0, 0.0)
    plan = Plan(geometry=geometry_of(model), rules=((SpanRule(0.0, 1.0), *[short] * 3), (short,) * 4), sink_tokens=4, min_span=5)
    shares = balanced_shares(plan, 2, bucket_lengths(LONGEST, PAGE_TOKENS), PAGE_TOKENS)
    assert shares.is_natural
    assert shares.density(plan, LONGEST, PAGE_TOKENS) > 1.2 * natural_shares(plan.geometry).density(plan, LONGEST, PAGE_TOKENS)
    # What heads store differs too, and with it the tokens of their pages.
    stored = plan.with_bits(np.array([[[16, 16], [8, 8], [8, 4], [4, 4]], [[8, 4], [16, 8], [8, 8], [16, 16]]]))
    check_ragged(two(model, stored, max_num_batched_tokens=64), model, stored, (3, 50, 130))


def test_more_devices_than_kv_heads_hold_the_same_ones(two: Start) -> None:
    model = tiny_model("mqa")
    plan = Plan(geometry=geometry_of(model), rules=((SpanRule(9.0, 0.0),), (SpanRule(0.0, 0.5),)), sink_tokens=4, min_span=5)
    check_ragged(two(model, plan, max_num_batched_tokens=64), model, plan, (3, 50, 130))


def test_heads_that_cannot_be_dealt_are_refused_before_the_processes_start(two: Start) -> None:
    model = tiny_model("llama", num_attention_heads=6, num_key_value_heads=3, hidden_size=96)
    with pytest.raises(ValueError, match="6 query heads / 3 KV heads cannot be dealt evenly to 2 devices"):
        two(model, plan_of(model))
