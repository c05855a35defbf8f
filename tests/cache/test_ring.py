"""The ring keeps the sink and the newest window of every head, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ring_oracle import Sequences, random_layout

from moa_lab.cache import LayerLayout, allocated_kv_bytes
from moa_lab.geometry import ModelGeometry
from moa_lab.plan import Plan, SpanRule


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_every_slot_holds_the_token_that_its_position_names_and_all_that_will_be_seen_is_there(seed: int) -> None:
    rng = np.random.default_rng(seed)
    layout = random_layout(rng)
    rows = Sequences(layout, 2)
    written: list[list[torch.Tensor]] = [[], []]
    while int(rows.lengths.max()) < layout.capacity:
        counts = [int(n) for n in rng.integers(1, min(20, layout.capacity - int(rows.lengths.max()) + 1), size=2)]
        chunk = rows.chunk(counts)
        rows.ring.write(chunk.key, chunk.value, chunk.lengths, chunk.padding)
        for row, count in enumerate(counts):
            written[row].append(chunk.key[row, :, max(counts) - count :])
        positions = rows.ring.positions(chunk.lengths)
        for row in range(2):
            history = torch.cat(written[row], dim=1)
            for head, window in enumerate(layout.windows):
                part = slice(layout.starts[head], layout.starts[head + 1])
                held = positions[row, part]
                real = held >= 0
                torch.testing.assert_close(rows.ring.keys[row, part][real], history[head, held[real].long()])
                newest = history.shape[1] - 1
                seen = {p for p in range(newest + 1) if p < layout.sink_tokens or newest - p < window}
                seen = {p for p in seen if newest - p < (layout.reach or newest + 1)}
                assert seen <= set(held[real].tolist())
                assert len(set(held[real].tolist())) == int(real.sum())


def test_a_ring_keeps_its_sink_and_newest_window_after_wrapping_twice() -> None:
    layout = LayerLayout(3, (4,), None, capacity=100)
    rows = Sequences(layout, 1)
    for _ in range(14):
        chunk = rows.chunk([1])
        rows.ring.write(chunk.key, chunk.value, chunk.lengths, chunk.padding)
    assert rows.ring.positions(rows.lengths)[0].tolist() == [0, 1, 2, 11, 12, 13, 10]


def test_slots_are_the_spans_and_heads_that_need_less_room_get_no_more() -> None:
    layout = LayerLayout(64, (64, 136, 10_000), None, capacity=1000)
    assert layout.slots.tolist() == [128, 200, 1000]
    assert layout.starts.tolist() == [0, 128, 328, 1328]


@pytest.mark.parametrize(("reach", "slots", "sink"), [(128, 128, 0), (150, 150, 0), (164, 164, 64), (400, 164, 64)])
def test_a_layers_own_window_caps_the_slots(reach: int, slots: int, sink: int) -> None:
    layout = LayerLayout(64, (100,), reach, capacity=1000)
    assert (layout.slots.tolist(), layout.sinks.tolist()) == ([slots], [sink])


def test_growing_moves_no_token() -> None:
    layout = LayerLayout(2, (3, 1000), None, capacity=10)
    rows = Sequences(layout, 2)
    chunk = rows.chunk([10, 7])
    rows.ring.write(chunk.key, chunk.value, chunk.lengths, chunk.padding)
    before = {head: rows.ring.keys[:, layout.starts[head] : layout.starts[head] + layout.slots[head]].clone() for head in (0, 1)}
    rows.ring.grow(25)
    grown = rows.ring.layout
    assert grown.slots.tolist() == [5, 25]
    for head, kept in before.items():
        now = rows.ring.keys[:, grown.starts[head] : grown.starts[head] + layout.slots[head]]
        torch.testing.assert_close(now, kept, equal_nan=True)
    assert rows.ring.positions(rows.lengths)[1, 5:].tolist() == [*range(7), *[-1] * 18]


@pytest.mark.parametrize("wrong", [{"windows": ()}, {"windows": (0,)}, {"capacity": 0}, {"sink_tokens": -1}])
def test_layouts_that_hold_nothing_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="layout"):
        LayerLayout(**{"sink_tokens": 4, "windows": (8,), "reach": None, "capacity": 10, **wrong})


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_what_is_allocated_is_what_the_spans_predict(seed: int) -> None:
    rng = np.random.default_rng(seed)
    geometry = ModelGeometry(2, 4, 2, 16, 4096, layer_windows=(None, int(rng.integers(1, 900))))
    rules = tuple(tuple(SpanRule(float(rng.integers(-200, 600)), float(rng.random())) for _ in range(2)) for _ in range(2))
    plan = Plan(geometry=geometry, rules=rules)
    n_tokens = int(rng.integers(1, 3000))
    assert allocated_kv_bytes(plan, n_tokens) == plan.kv_bytes(n_tokens)
