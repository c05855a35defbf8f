"""KV heads dealt out to devices: places in one block table, and how many of them stay empty."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pages_oracle import check_columns
from tiny_plans import constant_plan
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moa_lab.bench.models import stretched_plan
from moa_lab.geometry import ModelGeometry
from moa_lab.plan import Plan, dense_plan
from moa_lab.serving import PageLayout, ServedPlan, bucket_lengths, request_pages
from moa_lab.serving.page_pool import page_shape
from moa_lab.serving.shares import HeadShares, balanced_shares, natural_shares
from moa_lab.serving.vllm.shares import deal_heads, engine_shares

ROOT = Path(__file__).parents[2]
RUNS, DESIGNS = ROOT / "data/runs", ROOT / "moa_lab/serving/DESIGNS.md"
LONGEST, PAGE_TOKENS = 300, 16
LENGTHS = bucket_lengths(LONGEST, PAGE_TOKENS)


def random_plan(seed: int, kv_heads: int) -> Plan:
    rng = np.random.default_rng(seed)
    spans = rng.integers(6, 400, size=(int(rng.integers(1, 5)), kv_heads)).tolist()
    return constant_plan([[None if rng.random() < 0.2 else span for span in row] for row in spans])


@pytest.mark.parametrize(("kv_heads", "devices"), [(1, 2), (2, 2), (2, 4), (3, 3), (4, 2), (4, 8), (6, 3), (8, 2), (8, 4), (8, 8)])
def test_heads_of_a_device_share_no_column_and_all_devices_tell_the_same_numbers(kv_heads: int, devices: int) -> None:
    for seed in range(5):
        plan = random_plan(seed, kv_heads)
        whole = request_pages(plan, LENGTHS, LONGEST, PAGE_TOKENS)
        for shares in (natural_shares(plan.geometry, devices), balanced_shares(plan, devices, LENGTHS, PAGE_TOKENS)):
            parts = shares.pages(plan, LENGTHS, LONGEST, PAGE_TOKENS)
            assert len(parts) == min(kv_heads, devices)
            for bucket, layout in enumerate(whole.layouts):
                told = [[part.layouts[bucket].pages_for(n) for n in range(LONGEST % 7, LONGEST + 1, 7)] for part in parts]
                assert all(each == told[0] for each in told)
                for share, part in enumerate(parts):
                    _check_heads(shares, share, part.layouts[bucket], layout)
                    assert told[0][-1] >= check_columns(part, bucket, LONGEST)
            assert all((part.of_layer(0)[0].steps == parts[0].of_layer(0)[0].steps).all() for part in parts)


@pytest.mark.parametrize("seed", range(6))
def test_heads_that_store_other_bits_are_dealt_too(seed: int) -> None:
    rng, plan = np.random.default_rng(seed), random_plan(seed, 4)
    plan = plan.with_bits(rng.choice([4, 8, 16], size=(plan.geometry.layers, 4, 2)))
    shape = page_shape(plan, PAGE_TOKENS, torch.bfloat16)
    natural, dealt = natural_shares(plan.geometry, 2), balanced_shares(plan, 2, (LONGEST,), PAGE_TOKENS, shape.tokens)
    before, after = (each.density(plan, LONGEST, PAGE_TOKENS, shape) for each in (natural, dealt))
    assert natural_shares(plan.geometry).density(plan, LONGEST, PAGE_TOKENS, shape) <= after + 1e-9
    assert after <= before + 0.02
    for shares in (natural, dealt):
        one, two = shares.pages(plan, LENGTHS, LONGEST, PAGE_TOKENS, shape.tokens)
        for bucket, (mine, other) in enumerate(zip(one.layouts, two.layouts, strict=True)):
            assert [mine.pages_for(n) for n in range(LONGEST + 1)] == [other.pages_for(n) for n in range(LONGEST + 1)]
            for part in (one, two):
                check_columns(part, bucket, LONGEST)


def _check_heads(shares: HeadShares, share: int, part: PageLayout, whole: PageLayout) -> None:
    """The heads of a share have the windows and the pages that they have without others."""
    size = len(shares.order[0]) // shares.count
    for layer, row in enumerate(shares.order):
        for at, head in enumerate(row[share * size : (share + 1) * size]):
            assert len(part.columns(layer, at)) == whole.most_pages[layer, head]
            assert part.layers[layer].windows[at] == whole.layers[layer].windows[head]


@pytest.mark.parametrize(("kv_heads", "devices"), [(2, 2), (3, 3), (4, 2), (8, 4), (8, 8), (2, 4)])
def test_every_head_of_a_layer_is_dealt_once_and_dealing_leaves_no_more_places_empty(kv_heads: int, devices: int) -> None:
    gained = 0.0
    for seed in range(5):
        plan = random_plan(seed, kv_heads)
        natural, dealt = natural_shares(plan.geometry, devices), balanced_shares(plan, devices, (LONGEST,), PAGE_TOKENS)
        assert natural.is_natural
        assert all(sorted(row) == list(range(kv_heads)) for row in dealt.order)
        before, after = (each.density(plan, LONGEST, PAGE_TOKENS) for each in (natural, dealt))
        assert natural_shares(plan.geometry).density(plan, LONGEST, PAGE_TOKENS) <= after + 1e-9
        assert after <= before + 0.02
        gained += before - after
        assert balanced_shares(plan, devices, (LONGEST,), PAGE_TOKENS) == dealt
    assert gained > 0


def test_a_device_alone_holds_what_it_would_without_others() -> None:
    plan = random_plan(0, 4)
    shares = balanced_shares(plan, 1, LENGTHS, PAGE_TOKENS)
    assert shares.is_natural
    (pages,), alone = shares.pages(plan, LENGTHS, LONGEST, PAGE_TOKENS), request_pages(plan, LENGTHS, LONGEST, PAGE_TOKENS)
    assert (pages.of_layer(0)[0].steps == alone.of_layer(0)[0].steps).all()
    assert all((one.ranks == two.ranks).all() for one, two in zip(pages.layouts, alone.layouts, strict=True))


def test_a_dense_plan_leaves_no_place_empty() -> None:
    plan = dense_plan(ModelGeometry(3, 8, 4, 8, 4096))
    assert natural_shares(plan.geometry, 2).density(plan, LONGEST) == 1


@pytest.mark.parametrize(("query_heads", "kv_heads", "devices"), [(9, 3, 2), (12, 6, 4), (12, 3, 2), (4, 1, 3), (4, 2, 8), (4, 2, 0)])
def test_heads_that_cannot_be_dealt_evenly_are_refused(query_heads: int, kv_heads: int, devices: int) -> None:
    geometry = ModelGeometry(2, query_heads, kv_heads, 8, 4096)
    with pytest.raises(ValueError, match=f"{query_heads} query heads / {kv_heads} KV heads cannot be dealt evenly to {devices} devices"):
        natural_shares(geometry, devices)


def test_what_stays_empty_under_recorded_plans_is_what_the_design_says() -> None:
    rows = re.findall(r"^\| (\S+) \| (\d) \| ([\d., ]+)% \| ([\d., ]+)% \|$", DESIGNS.read_text(), re.MULTILINE)
    assert len(rows) == 11
    for name, devices, *said in rows:
        plan = Plan.load(RUNS / ("standard-25" if name == "stretched" else name) / "plan.json")
        plan = stretched_plan(plan, ModelGeometry(32, 32, 8, 128, 131_072), 8192) if name == "stretched" else plan
        both = natural_shares(plan.geometry, int(devices)), balanced_shares(plan, int(devices), bucket_lengths(8192))
        for shares, losses in zip(both, said, strict=True):
            found = [shares.density(plan, n) / natural_shares(plan.geometry).density(plan, n) - 1 for n in (2048, 4096, 8192)]
            assert ", ".join(f"{100 * loss:.1f}" for loss in found) == losses, name


def test_shares_are_told_apart_by_their_order() -> None:
    shares = HeadShares(((1, 0), (0, 1)), 2)
    assert not shares.is_natural
    plan = constant_plan([[16, 64], [64, 16]])
    one, two = shares.pages(plan, (64,), 64, 16)
    assert [one.layouts[0].layers[layer].slots.tolist() for layer in (0, 1)] == [[64], [64]]
    assert [two.layouts[0].layers[layer].slots.tolist() for layer in (0, 1)] == [[16], [16]]
    assert [after - before for before, after in pairwise(two.of_layer(0)[0].steps[0])] == [2, 2, 2, 2]


def engine_config(
    model_type: str = "llama", devices: int = 2, quantization: str | None = None, lora: object = None, load: str = "auto"
) -> Any:
    """What is read of vLLM's config, for a model of two layers of four KV heads."""
    config = CONFIG_MAPPING[model_type](
        num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4, hidden_size=64, head_dim=8, max_position_embeddings=4096
    )
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_config=config, max_model_len=LONGEST, quantization=quantization),
        parallel_config=SimpleNamespace(tensor_parallel_size=devices), cache_config=SimpleNamespace(block_size=PAGE_TOKENS),
        additional_config={"of": "others"}, lora_config=lora, load_config=SimpleNamespace(load_format=load),
    )  # fmt: skip


def test_an_engine_deals_heads_anew_only_where_their_weights_can_be_moved() -> None:
    served = ServedPlan(constant_plan([[None, None, 16, 16], [None, None, 16, 16]]))
    dealt = deal_heads(served, engine_config())
    assert not dealt.is_natural
    assert dealt == deal_heads(served, engine_config(load="dummy"))
    assert dealt.density(served.plan, LONGEST, PAGE_TOKENS) == natural_shares(served.plan.geometry).density(
        served.plan, LONGEST, PAGE_TOKENS
    )
    others: list[dict[str, Any]] = [{"quantization": "awq"}, {"lora": object()}, {"load": "mistral"}, {"model_type": "granite"}]
    assert all(deal_heads(served, engine_config(**other)) == natural_shares(served.plan.geometry, 2) for other in others)
    assert deal_heads(served, engine_config(devices=1)).count == 1


def test_what_was_dealt_is_told_to_all_processes_with_the_config() -> None:
    served = ServedPlan(constant_plan([[None, None, 16, 16], [None, None, 16, 16]]))
    for config in (engine_config(), engine_config(quantization="awq"), engine_config(devices=8)):
        dealt = deal_heads(served, config)
        told = json.loads(json.dumps(config.additional_config))
        # Decided once: what a process finds there counts, and not what it would decide.
        config.additional_config, config.cache_config.block_size = told, 1
        assert engine_shares(config) == dealt
        assert told["of"] == "others"


def test_the_log_says_what_a_plan_takes_on_each_device() -> None:
    served = ServedPlan(constant_plan([[None, None, 16, 16], [None, None, 16, 16]]), LONGEST)
    told = {how: served.told(LONGEST, PAGE_TOKENS, deal_heads(served, engine_config(load=how))) for how in ("auto", "mistral")}
    assert "in 2 shares of the heads, dealt so that devices hold about as many pages, a request takes 52.6% of a dense" in told["auto"]
    assert "in 2 shares of the heads, in the model's order, a request takes 100.0% of a dense cache's bytes" in told["mistral"]
    assert "shares" not in served.told(LONGEST, PAGE_TOKENS, deal_heads(served, engine_config(devices=1)))
