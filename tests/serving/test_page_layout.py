from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pages_oracle import check_columns
from tiny_plans import constant_plan

from moa_lab.cache import LayerLayout
from moa_lab.geometry import ModelGeometry
from moa_lab.plan import Plan, SpanRule, dense_plan
from moa_lab.serving import PageLayout, RequestPages, page_layout, request_pages
from moa_lab.serving.page_layout import BUCKETS, bucket_lengths, layout_of
from moa_lab.serving.page_pool import page_bytes, shape_of

ROOT = Path(__file__).parents[2]


HARD = constant_plan([[33, None], [128, 7], [64, 65]])


@pytest.mark.parametrize("page_tokens", [16, 32, 64, 128])
@pytest.mark.parametrize("n_tokens", [1, 15, 16, 17, 63, 64, 65, 128, 129, 1000, 1024])
def test_a_request_holds_of_every_head_the_pages_of_its_span_and_no_more(page_tokens: int, n_tokens: int) -> None:
    layout = page_layout(HARD, 1024, 1024, page_tokens)
    expected = sum(-(-min(n_tokens, span) // page_tokens) for span in (33, 1024, 128, 7, 64, 65))
    assert layout.pages_for(n_tokens) == expected


@pytest.mark.parametrize("page_tokens", [1, 16, 64])
def test_the_table_is_written_from_front_to_back_and_every_column_belongs_to_one_page_of_one_head(page_tokens: int) -> None:
    layout = page_layout(HARD, 700, 700, page_tokens)
    columns = [layout.columns(layer, head) for layer in range(3) for head in range(2)]
    assert sorted(np.concatenate(columns).tolist()) == list(range(layout.pages_for(700)))
    # A head's page j lies where no request has columns before its token j * page_tokens came.
    for column in columns:
        for page, at in enumerate(column):
            assert layout.pages_for(page * page_tokens) <= at < layout.pages_for(page * page_tokens + 1)


def test_under_a_dense_plan_a_request_holds_what_a_dense_cache_would() -> None:
    layout = page_layout(dense_plan(ModelGeometry(3, 4, 2, 8, 4096)), 4096, 4096, 64)
    assert [layout.pages_for(n) for n in (1, 64, 65, 4096)] == [6, 6, 12, 384]


def test_a_layer_with_a_window_of_its_own_takes_no_page_beyond_it() -> None:
    geometry = ModelGeometry(2, 4, 2, 8, 4096, layer_windows=(None, 48))
    layout = page_layout(dense_plan(geometry), 1024, 1024, 16)
    assert layout.most_pages.tolist() == [[64, 64], [3, 3]]


@pytest.mark.parametrize(("name", "tokens"), [("standard-25", 4096), ("standard-25", 8192), ("standard-50", 4096), ("standard-50", 8192)])
def test_as_many_requests_fit_as_the_density_of_a_recorded_plan_says(name: str, tokens: int) -> None:
    plan = Plan.load(ROOT / f"data/runs/{name}/plan.json")
    dense, kept = (page_layout(each, tokens, tokens).pages_for(tokens) for each in (dense_plan(plan.geometry), plan))
    assert dense / kept == pytest.approx(1 / plan.density(tokens), rel=0.02)


def test_a_page_has_a_token_at_least() -> None:
    with pytest.raises(ValueError, match="at least 1 token per page"):
        PageLayout(page_layout(HARD, 64, 64).layers, 0)


@pytest.mark.parametrize("longest", [1, 63, 64, 65, 256, 2048, 4096, 4097, 131072])
@pytest.mark.parametrize("page_tokens", [16, 64])
def test_lengths_are_whole_pages_apart_and_reach_the_longest_request(longest: int, page_tokens: int) -> None:
    lengths = bucket_lengths(longest, page_tokens)
    assert len(lengths) <= BUCKETS
    assert lengths[-1] == longest
    steps = np.diff([0, *lengths])
    assert set(steps[:-1]) <= {lengths[0]}
    assert 0 < steps[-1] <= lengths[0]
    assert len(lengths) == 1 or lengths[0] % page_tokens == 0


def test_a_request_takes_the_windows_of_the_next_length_that_holds_it() -> None:
    geometry = ModelGeometry(1, 2, 1, 8, 4096)
    plan = Plan(geometry=geometry, rules=((SpanRule(0.0, 0.5),),), sink_tokens=4, min_span=8)
    pages = request_pages(plan, (64, 128, 192, 250), 250, 16)
    assert [pages.bucket(n) for n in (1, 64, 65, 128, 200, 250, 999)] == [0, 0, 1, 1, 3, 3, 3]
    # Half of the length: 32, 64, 96, 125 tokens.
    assert [layout.pages_for(250) for layout in pages.layouts] == [2, 4, 6, 8]
    assert pages.most_pages(250) == 8
    assert pages.of_layer(0)[0].steps.tolist()[0][-1] == 2


def test_lengths_that_do_not_rise_are_refused() -> None:
    layout = page_layout(HARD, 64, 64)
    with pytest.raises(ValueError, match="rising lengths"):
        RequestPages((64, 64), (layout, layout))


KINDS = {(16, 16): 64, (8, 8): 128, (8, 4): 160}


@pytest.mark.parametrize("seed", range(20))
def test_kinds_of_heads_share_a_table_in_the_order_in_which_tokens_need_their_pages(seed: int) -> None:
    rng = np.random.default_rng(seed)
    layers = tuple(
        LayerLayout(int(rng.integers(0, 9)), tuple(rng.integers(1, 900, size=4).tolist()), rng.choice([None, 300]), 700) for _ in range(3)
    )
    bits = [[list(KINDS)[kind] for kind in row] for row in rng.integers(0, 3, size=(3, 4))]
    pages = RequestPages((700,), (layout_of(layers, bits, KINDS),))
    assert check_columns(pages, 0, 700) == pages.most_pages(700) == pages.layouts[0].pages_for(700)
    for layer, row in enumerate(bits):
        for part in pages.of_layer(layer):
            assert {row[head] for head in part.heads} == {part.bits}
            assert part.page_tokens == KINDS[part.bits]


@pytest.mark.parametrize("counts", [(1, 1, 0, 0), (1, 99, 0, 0), (99, 1, 0, 0), (10, 10, 10, 10), (0, 1, 1, 0)])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize(("page_tokens", "filled"), [(16, 0.75), (64, 0.9), (128, 0.9)])
def test_pages_of_all_kinds_are_filled_but_for_a_tenth(counts: tuple[int, ...], head_dim: int, page_tokens: int, filled: float) -> None:
    stored = {bits: count for bits, count in zip([(16, 16), (8, 8), (8, 4), (4, 4)], counts, strict=True) if count}
    shape = shape_of(stored, page_tokens, head_dim, torch.bfloat16)
    least = page_tokens * max(page_bytes(1, head_dim, torch.bfloat16, bits) for bits in stored)
    assert least <= shape.nbytes <= 1.26 * least
    assert shape.nbytes % (2 * page_tokens) == 0
    used = {bits: count * page_bytes(1, head_dim, torch.bfloat16, bits) / shape.nbytes for bits, count in shape.tokens.items()}
    assert all(share <= 1 for share in used.values())
    assert sum(stored[bits] * share for bits, share in used.items()) > filled * sum(stored.values())
    assert all(count >= page_tokens and count % 16 == 0 for count in shape.tokens.values())


def test_where_all_heads_store_alike_a_page_has_the_tokens_that_were_asked_for() -> None:
    shape = shape_of({(8, 4): 90}, 64, 128, torch.bfloat16)
    assert shape.tokens == {(8, 4): 64}
    assert shape.nbytes == 64 * (128 + 4 + 64 + 4)
