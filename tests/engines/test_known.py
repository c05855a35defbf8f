"""What is said of this library's own engines, and of transformers' caches, is what they allocate."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_model
from transformers import DynamicCache

from moa_lab.cache.allocation import allocated_kv_bytes
from moa_lab.engines import ENGINES, held
from moa_lab.geometry import ModelGeometry
from moa_lab.models import geometry_of
from moa_lab.plan import DENSE, Plan, SpanRule
from moa_lab.serving import PAGE_TOKENS, page_layout
from moa_lab.serving.page_pool import page_shape

OWN = ModelGeometry(3, 4, 2, 16, 4096, (600, None, 600))
PLANS = {
    "searched": Plan.load(Path(__file__).parents[2] / "data/runs/standard-25/plan.json"),
    "own windows": Plan(OWN, ((SpanRule(200.0, 0.0), DENSE), (SpanRule(0.0, 0.25), DENSE), (SpanRule(500.0, 0.1), SpanRule(128.0, 0.0)))),
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("n_tokens", [100, 700, 1000, 2048, 4000])
def test_the_ring_cache_and_the_pages_of_the_plugin_take_what_is_said(plan: Plan, n_tokens: int) -> None:
    assert held(plan, ENGINES["moa-lab"], n_tokens).kv_bytes == allocated_kv_bytes(plan, n_tokens)
    pages = page_layout(plan, n_tokens, n_tokens).pages_for(n_tokens)
    token_bytes = plan.geometry.kv_bytes_per_token()
    assert ENGINES["moa-lab-vllm"].block_tokens == PAGE_TOKENS
    assert held(plan, ENGINES["moa-lab-vllm"], n_tokens).kv_bytes == pages * PAGE_TOKENS * token_bytes


def test_stored_bits_take_what_the_packed_ring_takes() -> None:
    plan = PLANS["own windows"].with_bits(8)
    assert held(plan, ENGINES["moa-lab"], 1000).kv_bytes == allocated_kv_bytes(plan, 1000)


@pytest.mark.parametrize("n_tokens", [1000, 4000, 16000])
def test_pages_of_stored_bits_take_what_is_said_or_up_to_a_tenth_more_where_heads_differ(n_tokens: int) -> None:
    plan, told = PLANS["searched"], ENGINES["moa-lab-vllm"]
    alike = plan.with_bits(8)
    pages = page_layout(alike, n_tokens, n_tokens).pages_for(n_tokens)
    assert held(alike, told, n_tokens).kv_bytes == pages * page_shape(alike, PAGE_TOKENS, torch.bfloat16).nbytes
    heads = np.arange(plan.geometry.layers * plan.geometry.kv_heads).reshape(plan.geometry.layers, -1, 1)
    mixed = plan.with_bits(np.where(heads % 2, [8, 4], [16, 16]))
    shape = page_shape(mixed, PAGE_TOKENS, torch.bfloat16)
    taken = page_layout(mixed, n_tokens, n_tokens, tokens=shape.tokens).pages_for(n_tokens) * shape.nbytes
    assert 1 <= taken / held(mixed, told, n_tokens).kv_bytes < 1.1


def test_transformers_cuts_layers_to_one_window_and_keeps_it_less_one_token() -> None:
    model = tiny_model("gemma3")
    geometry, config = geometry_of(model), model.config.get_text_config()
    windows = {window for window in geometry.layer_windows if window is not None}
    assert windows == {config.sliding_window}
    cache, n = DynamicCache(config=config), 4 * config.sliding_window
    with torch.no_grad():
        model(input_ids=torch.arange(5, 5 + n)[None] % 90, past_key_values=cache)
    kept = [layer.keys.shape[-2] for layer in cache.layers]
    rules = tuple((DENSE,) * geometry.kv_heads for _ in range(geometry.layers))
    found = held(Plan(geometry, rules, sink_tokens=0, min_span=1), ENGINES["transformers"], n)
    assert found.exact
    # The last token of a window is the one that the next query brings itself.
    assert [int(slots) for slots in found.slots[:, 0]] == [tokens + (tokens < n) for tokens in kept]
