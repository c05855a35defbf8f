"""A ring that stores some heads in fewer bits holds the same tokens as one that does not, each as it comes back from its bits."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ring_oracle import random_layout

from moa_lab.cache import LayerLayout, PackedRing, RingLayer, allocated_kv_bytes, ring_layer
from moa_lab.cache.storage import heads_as_stored
from moa_lab.geometry import ModelGeometry
from moa_lab.plan import WIDTHS, Bits, Plan, SpanRule, dense_plan
from moa_lab.plan.bits import vector_bytes

CPU = torch.device("cpu")


def both(layout: LayerLayout, bits: list[Bits], head_dim: int = 16) -> tuple[RingLayer, PackedRing]:
    """A plain ring and one with bits."""
    plain, packed = (ring_layer(layout, 2, head_dim, torch.float32, CPU, some) for some in (None, bits))
    assert isinstance(packed, PackedRing)
    return plain, packed


def same(plain: RingLayer, packed: PackedRing, lengths: torch.Tensor) -> None:
    """Every slot that holds a token holds it as stored."""
    positions = plain.positions(lengths)
    assert torch.equal(positions, packed.positions(lengths))
    for head in range(len(packed.bits)):
        part = slice(int(plain.layout.starts[head]), int(plain.layout.starts[head + 1]))
        real = positions[:, part] >= 0
        alike = [held[:, None, part].expand(-1, len(packed.bits), -1, -1) for held in (plain.keys, plain.values)]
        expected = heads_as_stored(*alike, packed.bits)
        for found, wanted in zip(packed.held(head), expected, strict=True):
            assert torch.equal(found[real], wanted[:, head][real])


def test_a_ring_in_float32_holds_what_codes_stand_for_without_rounding_it() -> None:
    ring = PackedRing(LayerLayout(2, (9,), None, 11), 2, 16, torch.bfloat16, CPU, [(8, 16)])
    key, value = torch.randn(2, 2, 1, 11, 16, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16)
    ring.write(key, value, torch.tensor([11, 11]), torch.tensor([0, 0]))
    exact = ring.in_float32()
    for found, rounded in zip(exact.held(0), ring.held(0), strict=True):
        assert found.dtype == torch.float32
        assert torch.equal(found.bfloat16(), rounded)
    assert (exact.held(0)[0] != ring.held(0)[0]).any()
    assert torch.equal(exact.held(0)[1], value[:, 0].float())
    assert ring.held(0)[0].dtype == torch.bfloat16


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_any_layout_and_bits_hold_what_a_plain_ring_holds(seed: int) -> None:
    rng = np.random.default_rng(seed)
    layout = random_layout(rng)
    bits = [(int(k), int(v)) for k, v in rng.choice(WIDTHS, size=(len(layout.windows), 2))]
    plain, packed = both(layout, bits, head_dim=int(rng.integers(1, 20)))
    lengths = torch.zeros(2, dtype=torch.int32)
    for _ in range(5):
        counts = rng.integers(1, 20, size=2)
        tokens = int(counts.max())
        padding = torch.tensor(tokens - counts, dtype=torch.int32)
        lengths = lengths + torch.tensor(counts, dtype=torch.int32)
        if int(lengths.max()) > layout.capacity:
            break
        shape = (2, len(bits), tokens, packed.held(0)[0].shape[-1])
        key, value = torch.from_numpy(rng.standard_normal((2, *shape)).astype(np.float32))
        for ring in (plain, packed):
            ring.write(key, value, lengths, padding)
        same(plain, packed, lengths)


def test_rows_are_reordered_and_room_is_made_without_a_change() -> None:
    layout = LayerLayout(2, (3, 1000), None, capacity=10)
    plain, packed = both(layout, [(8, 4), (4, 16)])
    lengths, padding = torch.tensor([10, 7], dtype=torch.int32), torch.tensor([0, 3], dtype=torch.int32)
    key, value = torch.randn(2, 2, 2, 10, 16, generator=torch.Generator().manual_seed(0))
    for ring in (plain, packed):
        ring.write(key, value, lengths, padding)
        ring.grow(25)
        ring.select(torch.tensor([1, 1, 0]))
    assert packed.layout.slots.tolist() == [5, 25]
    same(plain, packed, lengths[[1, 1, 0]])


def test_allocated_bytes_are_those_of_the_plan_to_the_last_one() -> None:
    geometry = ModelGeometry(layers=2, query_heads=4, kv_heads=2, head_dim=5, max_length=4096, layer_windows=(None, 100))
    rules = ((SpanRule(128.0, 0.0), SpanRule(0.0, 1.0)), (SpanRule(200.0, 0.0), SpanRule(0.0, 0.5)))
    plan = Plan(geometry=geometry, rules=rules).with_bits(np.array([[[4, 8], [16, 16]], [[8, 8], [4, 4]]]))
    for n in (150, 1000):
        assert plan.kv_bytes(n) == allocated_kv_bytes(plan, n)
        assert plan.kv_bytes(n, 4) == allocated_kv_bytes(plan, n, torch.float32)
    eighths = dense_plan(geometry).with_bits(8)
    assert eighths.density(1000) == 2 * vector_bytes(5, 8) / 20
    assert eighths.kv_bytes(1000) == allocated_kv_bytes(eighths, 1000)
