"""Rows of stored bits on tiny shapes: what is read, what it is compared with, and that only right results meet a goal."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from moa_lab.bench import GOALS, BenchRecord, stored, table
from moa_lab.bench.decode import decode_inputs, measure
from moa_lab.bench.filling import fill_ring
from moa_lab.bench.lab import Lab
from moa_lab.bench.record import errors, is_right
from moa_lab.bench.shapes import STORED, Shape, Spans, default_plans, described, kv_bytes, stretched_spans
from moa_lab.bench.stored import MIXES, stored_rows
from moa_lab.bench.timing import read_rate
from moa_lab.cache import LayerLayout, PackedRing, ring_layer
from moa_lab.plan import WIDTHS
from tests.bench.labs import plain_lab, trusting_lab

CPU = torch.device("cpu")
SHAPE = Shape(4, 2, 32, 2, 128)
SPANS = Spans(128, 4, (100, 30))
LAYOUT = LayerLayout(4, (300, 100), None, 400)


@pytest.fixture
def trusting(monkeypatch: pytest.MonkeyPatch) -> Lab:
    # Goals so far away that any kernel is fast.
    for row in ("B2", "B3", "B3 8+4"):
        monkeypatch.setitem(GOALS, row, replace(GOALS[row], ratio=1e9))
    return trusting_lab()


def test_right_kernels_meet_and_every_row_tells_both_sides(trusting: Lab) -> None:
    rows = stored_rows(SHAPE, trusting, tuple(MIXES))
    assert [(row.id, row.shape["bits"]) for row in rows] == [("B1", "8"), ("B2", "8"), ("B3", "4"), ("B3", "8+4")]
    assert all(row.meets for row in rows)
    read, *times = rows
    assert read.peer_name == "read, not copy"
    assert read.ours == pytest.approx(read.detail["useful_bytes"] / read.detail["ms"] / 1e6)
    assert read.ratio == pytest.approx(read.detail["read"]["ms_for_useful_bytes"] / read.detail["ms"])
    # K and V of a token, 32 numbers each: 128 bytes; in 8 bits 64, in 4 bits 32, with 4 for every grid.
    assert [row.detail["useful_bytes"] / row.detail["16 bits"]["useful_bytes"] for row in times] == [72 / 128, 40 / 128, 56 / 128]
    assert all(row.peer == row.detail["16 bits"]["ms"] for row in times)


@pytest.mark.parametrize("wrong", [torch.zeros_like, lambda x: x * 1.1, lambda x: x * float("nan")])
def test_a_wrong_kernel_over_codes_never_meets(monkeypatch: pytest.MonkeyPatch, trusting: Lab, wrong: Any) -> None:
    from moa_lab.kernels import decode

    right = decode.decode_attention

    def over_codes(query: torch.Tensor, ring: Any, *others: Any) -> torch.Tensor:
        found = right(query, ring, *others)
        return wrong(found) if isinstance(ring, PackedRing) else found

    monkeypatch.setattr(decode, "decode_attention", over_codes)
    rows = stored_rows(SHAPE, trusting, ["B1", "B2"])
    assert all(row.ratio is not None and not row.meets for row in rows)


def test_a_mix_is_measured_once_for_all_rows(monkeypatch: pytest.MonkeyPatch, trusting: Lab) -> None:
    seen = []

    def counted(shape: Shape, *others: Any) -> Any:
        seen.append(shape.bits)
        return measure(shape, *others)

    monkeypatch.setattr(stored, "measure", counted)
    stored_rows(SHAPE, trusting, ["B1", "B2"])
    assert seen == [(8, 8), (16, 16)]


def test_a_goal_that_nobody_asks_for_stands_in_brackets(trusting: Lab) -> None:
    lines = table(BenchRecord(tuple(stored_rows(SHAPE, trusting, ["B3"])))).splitlines()
    assert "4 bits)" in lines[1]
    assert "(<= " not in lines[1]
    assert "8+4 bits)" in lines[2]
    assert "(<= " in lines[2]


def test_the_bits_of_a_shape_are_told_where_there_are_any() -> None:
    assert "bits" not in described(SHAPE, SPANS)
    assert described(replace(SHAPE, bits=(8, 4)), SPANS)["bits"] == "8+4"


@pytest.mark.parametrize("bits", [(16, 16), (8, 8), (8, 4), (4, 4)])
def test_useful_bytes_are_those_of_a_full_ring(bits: tuple[int, int]) -> None:
    shape = replace(SHAPE, bits=bits, head_dim=20)
    inputs = decode_inputs(shape, SPANS, plain_lab())
    assert inputs.ring.allocated_bytes == kv_bytes(shape, sum(SPANS.tokens), 2)
    assert is_right(errors(inputs.attend(), inputs.expected()))


def test_shapes_of_stored_bits_read_at_least_128_megabytes_in_8_bits_and_256_in_16() -> None:
    assert {(shape.kv_heads, shape.head_dim) for shape in STORED} == {(32, 128), (32, 64), (8, 128), (8, 64)}
    for shape in STORED:
        slots = sum(stretched_spans(default_plans()[shape.plan], shape.kv_heads, shape.n_tokens).tokens)
        assert kv_bytes(replace(shape, bits=(8, 8)), slots, 2) >= 128e6
        assert kv_bytes(shape, slots, 2) >= 256e6


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_filled_ring_holds_numbers_as_large_as_normal_ones_in_every_slot(bits: int) -> None:
    ring = ring_layer(LAYOUT, 2, 32, torch.float32, CPU, [(bits, 16), (16, bits)])
    fill_ring(ring, torch.Generator().manual_seed(0))
    for held in (*ring.held(0), *ring.held(1)):
        assert 0.9 < float(held.std()) < 1.2
        assert abs(float(held.mean())) < 0.05
        assert (held.amax(dim=-1) > held.amin(dim=-1)).all()


def test_the_same_seed_fills_alike() -> None:
    rings = [ring_layer(LAYOUT, 1, 32, torch.float32, CPU, [(8, 4)] * 2) for _ in range(2)]
    for ring in rings:
        fill_ring(ring, torch.Generator().manual_seed(3))
    assert all(torch.equal(one, other) for one, other in zip(rings[0].held(1), rings[1].held(1), strict=True))


def test_a_pure_read_has_a_rate() -> None:
    assert read_rate(CPU, 2**12) > 0
