"""Kernels over a ring that stores 8 and 4 bits: written as by the reference to the last bit, and attended to as it is stored."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ring_attends import DEVICE, Attend, by_reference, by_triton, check
from ring_oracle import Sequences, random_layout

from moa_lab.cache import LayerLayout, PackedRing
from moa_lab.kernels.read import ring_read
from moa_lab.kernels.write import ring_write
from moa_lab.plan import WIDTHS, Bits

WAYS = pytest.mark.parametrize("attend", [by_reference, by_triton])
MIXED: list[Bits] = [(8, 4), (16, 8), (4, 16)]
"""Heads of one layer, K and V apart."""


def packed(layout: LayerLayout, head_dim: int, dtype: torch.dtype, bits: list[Bits] = MIXED) -> PackedRing:
    return PackedRing(layout, 2, head_dim, dtype, torch.device(DEVICE), bits)


def same(ring: PackedRing, other: PackedRing) -> None:
    """Equal in every byte."""
    for kind, held in ring.buffers.items():
        assert torch.equal(held.view(torch.uint8), other.buffers[kind].view(torch.uint8)), kind


@pytest.mark.parametrize("scale", [1e-7, 1e-3, 1.0, 300.0, 1e5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [5, 64, 80])
def test_what_is_written_equals_the_reference_to_the_last_bit(head_dim: int, dtype: torch.dtype, scale: float) -> None:
    layout = LayerLayout(2, (5, 1000, 3), None, capacity=30)
    by_kernel, by_hand = (packed(layout, head_dim, dtype) for _ in range(2))
    given = scale * torch.randn(2, 2, 12, 3, head_dim, generator=torch.Generator().manual_seed(0))
    # Zeros, equal values, nearly equal values, and halves of a step.
    given[:, :, 3] = 0.0
    given[:, :, 4] = scale
    given[:, :, 5] = scale + 1e-3 * given[:, :, 6]
    given[:, :, 11] = torch.arange(head_dim) % 31 / 2
    key, value = given.clamp(-6e4, 6e4).to(DEVICE, dtype).transpose(2, 3)
    lengths, padding = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in ([12, 7], [0, 5]))
    by_hand.write(key, value, lengths, padding)
    ring_write(key, value, by_kernel, lengths, padding)
    same(by_kernel, by_hand)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("head_dim", [5, 80])
def test_a_ring_read_whole_is_what_its_heads_hold(head_dim: int, dtype: torch.dtype) -> None:
    rows = Sequences(LayerLayout(2, (5, 1000, 3), None, capacity=30), 2, head_dim=head_dim, dtype=dtype, device=DEVICE, bits=MIXED)
    chunk = rows.chunk([25, 25])
    rows.ring.write(chunk.key, chunk.value, chunk.lengths, chunk.padding)
    assert isinstance(rows.ring, PackedRing)
    found = ring_read(rows.ring)
    for part in range(2):
        assert torch.equal(found[part], torch.cat([rows.ring.held(head)[part] for head in range(3)], dim=1))


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_any_layout_bits_and_chunks_equal_attention_over_all_that_was_seen(seed: int) -> None:
    rng = np.random.default_rng(seed)
    layout = random_layout(rng)
    bits = [(int(k), int(v)) for k, v in rng.choice(WIDTHS, size=(len(layout.windows), 2))]
    head_dim, group = int(rng.integers(1, 40)), int(rng.integers(1, 4))
    rows = Sequences(layout, 2, group=group, head_dim=head_dim, seed=seed % 1000, device=DEVICE, bits=bits)
    for _ in range(5):
        longest = min(20, layout.capacity - int(rows.lengths.max()))
        if longest < 1:
            break
        single = rng.random() < 0.6 and int(rows.lengths.min()) > 0
        check(by_triton, rows, [1, 1] if single else [int(n) for n in rng.integers(1, longest + 1, size=2)])


@pytest.mark.parametrize("pair", [(k, v) for k in WIDTHS for v in WIDTHS])
def test_every_pair_of_widths_alone_in_its_layer(pair: Bits) -> None:
    rows = Sequences(LayerLayout(4, (12, 1000), None, capacity=80), 2, dtype=torch.float16, device=DEVICE, bits=[pair, pair])
    check(by_triton, rows, [40, 23])
    check(by_triton, rows, [1, 1])


@WAYS
@pytest.mark.parametrize("prompt", [14, 16, 17, 40])
def test_one_token_after_another_past_the_windows_edge(attend: Attend, prompt: int) -> None:
    rows = Sequences(LayerLayout(4, (12, 5, 1000), None, capacity=80), 2, device=DEVICE, bits=MIXED)
    check(attend, rows, [prompt, prompt - 9])
    for _ in range(3):
        check(attend, rows, [1, 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
def test_every_head_dimension(head_dim: int, dtype: torch.dtype) -> None:
    rows = Sequences(LayerLayout(4, (20, 9, 90), None, capacity=60), 1, group=1, head_dim=head_dim, dtype=dtype, device=DEVICE, bits=MIXED)
    check(by_triton, rows, [50])
    check(by_triton, rows, [1])


@pytest.mark.parametrize("group", [1, 3, 8, 17])
def test_every_number_of_query_heads_to_a_kv_head(group: int) -> None:
    rows = Sequences(LayerLayout(4, (20, 90), None, capacity=60), 2, group=group, device=DEVICE, bits=[(4, 4), (8, 8)])
    check(by_triton, rows, [50, 33])
    check(by_triton, rows, [1, 1])


@WAYS
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("reach", [None, 30])
def test_capped_scores_sink_logits_and_a_layers_own_window(attend: Attend, softcap: float | None, reach: int | None) -> None:
    layout = LayerLayout(8, (9, 25, 90), reach, capacity=80)
    rows = Sequences(layout, 2, softcap=softcap, sinks=True, device=DEVICE, bits=MIXED)
    check(attend, rows, [60, 21])
    check(attend, rows, [1, 1])
    check(attend, rows, [1, 1])


def test_bfloat16_queries_over_codes() -> None:
    rows = Sequences(LayerLayout(4, (20, 90), None, capacity=60), 2, dtype=torch.bfloat16, device=DEVICE, bits=[(4, 8), (8, 4)])
    chunk = rows.chunk([50, 33])
    # Not by the prefill kernel: a product of bfloat16 is wrong in the interpreter.
    rows.ring.write(chunk.key, chunk.value, chunk.lengths, chunk.padding)
    check(by_triton, rows, [1, 1])


@pytest.mark.parametrize("scale", [0.0, 1e-4, 3e3])
def test_vectors_of_any_size_and_without_a_step(scale: float) -> None:
    rows = Sequences(LayerLayout(4, (20, 90), None, capacity=60), 1, device=DEVICE, bits=[(4, 8), (8, 4)])
    chunk = rows.chunk([30])
    chunk.key[:, :, 5:] *= scale
    chunk.value[:, :, 5:] *= scale
    # Vectors of equal numbers.
    chunk.value[:, :, 7:9] = 2.0
    ring_write(chunk.key, chunk.value, rows.ring, chunk.lengths, chunk.padding)
    last = rows.chunk([1])
    expected = by_reference(rows, last)
    torch.testing.assert_close(by_triton(rows, last), expected, atol=2e-5 * max(scale, 1.0), rtol=2e-5)


def test_rows_moved_and_a_cache_that_grew_go_on_as_they_were() -> None:
    rows = Sequences(LayerLayout(4, (12, 5, 1000), None, capacity=20), 3, device=DEVICE, bits=MIXED)
    check(by_triton, rows, [19, 7, 18])
    rows.ring.grow(60)
    check(by_triton, rows, [1, 1, 1])
    rows.reorder([2, 0, 0, 1])
    check(by_triton, rows, [9, 4, 1, 9])
    check(by_triton, rows, [1, 1, 1, 1])
