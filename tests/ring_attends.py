"""The ways to attend over a ring, and how each is held against a cache that keeps everything."""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import patch

import torch
from ring_oracle import Chunk, Sequences

from moa_lab.cache.storage import heads_as_stored
from moa_lab.kernels import prefill
from moa_lab.kernels.decode import decode_attention
from moa_lab.kernels.ring_reference import chunk_attention, newest_attention
from moa_lab.kernels.schedule import decode_schedule
from moa_lab.kernels.write import ring_write

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}

Attend = Callable[[Sequences, Chunk], torch.Tensor]


def by_reference(rows: Sequences, chunk: Chunk) -> torch.Tensor:
    new = (chunk.lengths, chunk.padding)
    if chunk.query.shape[2] > 1:
        seen = heads_as_stored(chunk.key, chunk.value, rows.ring.stored_bits)
        found = chunk_attention(chunk.query, *seen, rows.ring, *new, rows.scale, rows.softcap, rows.sink_logits)
        rows.ring.write(chunk.key, chunk.value, *new)
        return found
    rows.ring.write(chunk.key, chunk.value, *new)
    return newest_attention(chunk.query, rows.ring, chunk.lengths, rows.scale, rows.softcap, rows.sink_logits)


def by_triton(rows: Sequences, chunk: Chunk, tile: int = 16, programs: int = 5) -> torch.Tensor:
    """With NaN in the slots that hold nothing."""
    new = (chunk.lengths, chunk.padding)
    if chunk.query.shape[2] > 1:
        rows.poison(chunk)
        seen = heads_as_stored(chunk.key, chunk.value, rows.ring.stored_bits)
        found = prefill.chunk_attention(chunk.query, *seen, rows.ring, *new, rows.scale, rows.softcap, rows.sink_logits)
        ring_write(chunk.key, chunk.value, rows.ring, *new)
        return found
    ring_write(chunk.key, chunk.value, rows.ring, *new)
    rows.poison()
    schedule = decode_schedule(rows.ring.layout.slots, len(chunk.query), tile, programs, chunk.query.device)
    return decode_attention(chunk.query, rows.ring, chunk.lengths, schedule, rows.scale, rows.softcap, rows.sink_logits)


def by_unrolled(rows: Sequences, chunk: Chunk) -> torch.Tensor:
    """As `by_triton`, chunks of any size as those of many tokens are."""
    with patch.object(prefill, "MANY", 2):
        return by_triton(rows, chunk)


def check(attend: Attend, rows: Sequences, counts: list[int]) -> None:
    chunk = rows.chunk(counts)
    found = attend(rows, chunk).float()
    assert found.shape == chunk.query.shape
    real = torch.arange(max(counts), device=found.device) >= chunk.padding[:, None]
    found = torch.where(real[:, None, :, None], found, 0.0)
    tolerance = TOLERANCE[chunk.query.dtype]
    torch.testing.assert_close(found, rows.expected(chunk), atol=tolerance, rtol=tolerance)
