"""The kernels at sizes of use on a GPU: long sequences, NaN wherever no span reaches, more elements than 32 bits can count.

On a CPU the same runs at small sizes, which shows that what is expected is right.
"""

from __future__ import annotations

import copy

import pytest
import torch

from moa_lab.cache import LayerLayout, PackedRing, RingLayer
from moa_lab.kernels.decode import decode_attention, tile_slots
from moa_lab.kernels.dispatch import new_schedule
from moa_lab.kernels.prefill import chunk_attention, prefill_attention
from moa_lab.kernels.reference import masked_attention
from moa_lab.kernels.ring_reference import newest_attention
from moa_lab.kernels.schedule import decode_schedule
from moa_lab.masks import visible

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float16
SINK = 64
TILE = 128
"""Tokens beyond a span's edge that a tile of queries and one of keys may still load."""

TOLERANCE = 3e-2 if ON_GPU else 4e-3
SCALE = 0.1


def size(gpu: int, cpu: int) -> int:
    return gpu if ON_GPU else cpu


def random(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=DEVICE, dtype=DTYPE)


def expected(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int) -> torch.Tensor:
    """One head's attention, float32: query (1, 1, queries, head_dim), the last of the keys (1, 1, keys, head_dim)."""
    n, queries = key.shape[2], query.shape[2]
    near = max(n - queries - window, SINK)
    kept = torch.cat([torch.arange(min(SINK, n), device=DEVICE), torch.arange(near, n, device=DEVICE)])
    asked = torch.arange(n - queries, n, device=DEVICE)
    shown = visible(asked[:, None], kept[None, :], SINK, window)
    return masked_attention(query.float(), key[:, :, kept].float(), value[:, :, kept].float(), shown[None, None], SCALE)


def near(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found.float(), wanted, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("n_keys", [size(131072, 700), size(32768, 500)])
def test_a_prefill_reads_nothing_that_no_span_reaches(n_keys: int) -> None:
    queries, head_dim = size(1024, 70), size(128, 16)
    windows = [size(4096, 30), size(100, 1), size(9000, 200), n_keys]
    query, key, value = (random(1, n, m, head_dim, seed=seed) for seed, (n, m) in enumerate([(8, queries), (4, n_keys), (4, n_keys)]))
    for head, window in enumerate(windows):
        unseen = slice(SINK, max(n_keys - queries - window - TILE, SINK))
        key[:, head, unseen] = value[:, head, unseen] = float("nan")
    found = prefill_attention(query, key, value, torch.tensor(windows, dtype=torch.int32, device=DEVICE), SINK, SCALE)
    for head in range(8):
        part = slice(head // 2, head // 2 + 1)
        near(found[:, head : head + 1], expected(query[:, head : head + 1], key[:, part], value[:, part], windows[head // 2]))


def test_a_prefill_over_more_elements_than_32_bits_count() -> None:
    heads, head_dim, n_keys = 32 if ON_GPU else 2, size(128, 16), size(600_000, 400)
    query, key, value = random(1, heads, 64, head_dim, seed=0), *(random(1, heads, n_keys, head_dim, seed=seed) for seed in (1, 2))
    assert not ON_GPU or key.numel() > 2**31
    found = prefill_attention(query, key, value, torch.full((heads,), 150, dtype=torch.int32, device=DEVICE), SINK, SCALE)
    for head in (0, heads - 1):
        part = slice(head, head + 1)
        near(found[:, part], expected(query[:, part], key[:, part], value[:, part], 150))


def full_ring(batch: int, windows: tuple[int, ...], n_tokens: int, head_dim: int) -> tuple[RingLayer, torch.Tensor]:
    """Random keys and values in rings that have turned more than once, and the lengths of the rows."""
    ring = RingLayer(LayerLayout(SINK, windows, None, n_tokens), batch, head_dim, DTYPE, DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(0)
    ring.keys.normal_(generator=generator)
    ring.values.normal_(generator=generator)
    return ring, torch.full((batch,), n_tokens, dtype=torch.int32, device=DEVICE)


def row_of(ring: RingLayer, row: int) -> RingLayer:
    """That row alone."""
    one = copy.copy(ring)
    one.keys, one.values = (x[row : row + 1].float() for x in (ring.keys, ring.values))
    return one


@pytest.mark.parametrize(
    ("batch", "window"), [(64, size(262_144, 300)), (1, size(131_072, 500))], ids=["beyond 32 bits", "one row of 128k tokens"]
)
def test_decoding_over_large_rings_equals_the_reference(batch: int, window: int) -> None:
    head_dim, batch = size(128, 16), batch if ON_GPU else min(batch, 3)
    ring, lengths = full_ring(batch, (window, 100), 2 * window + 77, head_dim)
    assert not ON_GPU or batch == 1 or ring.keys.numel() > 2**31
    query = random(batch, 4, 1, head_dim, seed=5)
    schedule = new_schedule(ring, batch) or decode_schedule(ring.layout.slots, batch, tile_slots(ring), 5, DEVICE)
    found = decode_attention(query, ring, lengths, schedule, SCALE)
    for row in {0, batch - 1}:
        part = slice(row, row + 1)
        near(found[part], newest_attention(query[part].float(), row_of(ring, row), lengths[part], SCALE))


@pytest.mark.parametrize(("batch", "window"), [(64, size(262_144, 300)), (1, size(131_072, 500))], ids=["large", "one row of 128k tokens"])
def test_decoding_over_large_packed_rings_equals_the_reference(batch: int, window: int) -> None:
    head_dim, batch = size(128, 16), batch if ON_GPU else min(batch, 3)
    layout = LayerLayout(SINK, (window, 100, 300), None, 2 * window + 77)
    ring = PackedRing(layout, batch, head_dim, DTYPE, DEVICE, [(8, 4), (16, 8), (4, 16)])
    generator = torch.Generator(DEVICE).manual_seed(0)
    ring.buffers["plain"].normal_(generator=generator)
    # Any word is a word of codes; grids from -1 with steps up to 1/16.
    ring.buffers["codes"].random_(-(2**31), 2**31, generator=generator)
    steps = torch.randint(0x2000, 0x2C00, ring.buffers["grids"].shape, generator=generator, device=DEVICE, dtype=torch.int32)
    ring.buffers["grids"].copy_(steps << 16 | 0xBC00)
    lengths = torch.full((batch,), layout.capacity, dtype=torch.int32, device=DEVICE)
    query = random(batch, 6, 1, head_dim, seed=5)
    schedule = new_schedule(ring, batch) or decode_schedule(layout.slots, batch, tile_slots(ring), 5, DEVICE)
    found = decode_attention(query, ring, lengths, schedule, SCALE)
    for row in {0, batch - 1}:
        one = copy.copy(ring)
        one.buffers = {kind: held[row : row + 1] for kind, held in ring.buffers.items()}
        near(found[row : row + 1], newest_attention(query[row : row + 1], one, lengths[:1], SCALE).float())


def test_a_chunk_onto_a_large_ring_equals_one_token_after_another() -> None:
    head_dim, tokens, window = size(128, 16), size(96, 9), size(65_536, 200)
    ring, before = full_ring(2, (window, 100), 2 * window + 77, head_dim)
    query, key, value = (random(2, heads, tokens, head_dim, seed=heads + index) for index, heads in enumerate((4, 2, 2)))
    padding = torch.zeros_like(before)
    found = chunk_attention(query, key, value, ring, before + tokens, padding, SCALE)
    for token in range(tokens):
        part = slice(token, token + 1)
        ring.write(key[:, :, part], value[:, :, part], before + token + 1, padding)
        exact = copy.copy(ring)
        exact.keys, exact.values = ring.keys.float(), ring.values.float()
        near(found[:, :, part], newest_attention(query[:, :, part].float(), exact, before + token + 1, SCALE))
