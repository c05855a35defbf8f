"""Windows as unequal as a real plan's, and what counts as useful work."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moa_lab.bench.shapes import (
    DEFAULT_PLANS,
    SHAPES,
    Shape,
    Spans,
    default_plans,
    dense_flops,
    kv_bytes,
    prefill_flops,
    shapes_of,
    stretched_spans,
)
from moa_lab.cache import LayerLayout, RingLayer
from moa_lab.geometry import ModelGeometry
from moa_lab.masks import dense_mask
from moa_lab.plan import uniform_plan

PLANS = default_plans()


@pytest.mark.parametrize("name", DEFAULT_PLANS)
@pytest.mark.parametrize("kv_heads", [4, 8, 32])
@pytest.mark.parametrize("n_tokens", [256, 4096, 16384, 65536])
def test_stretched_spans_are_as_dense_as_their_plan(name: str, kv_heads: int, n_tokens: int) -> None:
    plan = PLANS[name]
    spans = stretched_spans(plan, kv_heads, n_tokens)
    assert len(spans.tokens) == kv_heads
    assert spans.density == pytest.approx(plan.density(4096), abs=0.5 / n_tokens + 1e-9)
    assert min(spans.windows) >= 1
    assert max(spans.tokens) <= n_tokens


@pytest.mark.parametrize("row", ["D1", "D2", "D3", "P1"])
def test_the_longest_span_of_every_shape_is_two_to_six_times_the_mean(row: str) -> None:
    for shape in SHAPES[row]:
        assert 1.99 <= stretched_spans(PLANS[shape.plan], shape.kv_heads, shape.n_tokens).skew <= 6


def test_a_plan_of_equal_heads_has_no_skew() -> None:
    plan = uniform_plan(ModelGeometry(3, 6, 2, 64, 8192), 0.25)
    assert stretched_spans(plan, 8, 4096).tokens == (1024,) * 8


def test_uniform_spans_hold_the_same_number_of_tokens() -> None:
    spans = Spans(100, 4, (5, 90, 33, 7))
    assert spans.uniform().tokens == (34, 34, 34, 33)
    assert spans.uniform().density == spans.density


def test_decode_shapes_keep_at_least_256_megabytes() -> None:
    for shape in SHAPES["D1"]:
        assert kv_bytes(shape, sum(stretched_spans(PLANS[shape.plan], shape.kv_heads, shape.n_tokens).tokens), 2) >= 256e6


def test_useful_bytes_are_those_of_a_full_ring() -> None:
    shape, spans = Shape(4, 2, 32, 3, 128), Spans(128, 8, (20, 128))
    ring = RingLayer(LayerLayout(spans.sink_tokens, spans.windows, None, shape.n_tokens), 3, 32, torch.float16, torch.device("cpu"))
    assert kv_bytes(shape, sum(spans.tokens), 2) == ring.allocated_bytes


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 70), st.integers(0, 9), st.lists(st.integers(1, 70), min_size=1, max_size=3), st.integers(1, 3), st.integers(1, 2))
def test_useful_flops_count_every_visible_pair_twice_for_two_products(
    n_tokens: int, sink: int, windows: list[int], group: int, batch: int
) -> None:
    shape = Shape(group * len(windows), len(windows), 16, batch, n_tokens)
    spans = Spans(n_tokens, sink, tuple(window + sink for window in windows))
    pairs = int(dense_mask(n_tokens, sink, torch.tensor(windows)).sum()) * group * batch
    assert prefill_flops(shape, spans) == pairs * 16 * 2 * 2


def test_dense_flops_are_those_of_heads_that_see_everything() -> None:
    shape = Shape(4, 2, 16, 3, 33)
    assert dense_flops(shape) == prefill_flops(shape, Spans(33, 0, (33, 33)))


def test_every_shape_is_measured_once_whatever_the_plan() -> None:
    for row, shapes in SHAPES.items():
        own = shapes_of(row, False, ["mine"])
        assert {shape.plan for shape in own} == {"mine"}
        assert len(set(own)) == len(own) == len(shapes)


def test_the_spans_of_heads_come_in_no_order() -> None:
    tokens = np.array(stretched_spans(PLANS["standard-50"], 32, 4096).tokens)
    assert (np.diff(tokens) > 0).any()
    assert (np.diff(tokens) < 0).any()
