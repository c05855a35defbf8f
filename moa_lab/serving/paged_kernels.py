"""Attention over pages by kernels, for devices that run them: what one layer needs, and a pass in the order that rings ask for."""

from __future__ import annotations

import copy
from functools import lru_cache

import numpy as np
import torch

from moa_lab.cache import LayerLayout, RingLayer
from moa_lab.cache.storage import heads_as_stored
from moa_lab.kernels.dispatch import prompt_by_kernel
from moa_lab.kernels.paged import PagedHeads, Pass, PooledPages, paged_decode, paged_read, paged_write
from moa_lab.kernels.prefill import chunk_attention
from moa_lab.serving.page_layout import LayerPages
from moa_lab.serving.page_pool import PagePool
from moa_lab.serving.step import Scoring, Step


class PagedKernels:
    """Heads of one layer, as kernels want them told."""

    def __init__(self, pages: LayerPages, device: torch.device) -> None:
        self._layouts = pages.layouts
        table = [
            np.stack([*layout.table().T[1:], layout.slots, ranks], axis=1) for layout, ranks in zip(self._layouts, pages.ranks, strict=True)
        ]
        self.heads = PagedHeads(
            torch.from_numpy(np.stack(table).astype(np.int32)).to(device), torch.from_numpy(pages.steps.astype(np.int32)).to(device),
            max(int(layout.slots.max()) for layout in self._layouts), self._layouts[0].sink_tokens, self._layouts[0].reach or 0,
            pages.page_tokens,
        )  # fmt: skip
        self._device = device
        # Kept by this layer: what is made for a bucket and a capacity is made once.
        self._held = lru_cache(maxsize=None)(self._held_by)

    def attend(
        self, pool: PagePool, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, step: Step, scoring: Scoring
    ) -> torch.Tensor:
        """As `moa_lab.serving.paged.paged_attention`."""
        output = torch.empty_like(query)
        found, held = Pass(step.table, *step.narrow), pooled(pool)
        # Before they are written: in a full ring they take the place of tokens that the first of them still see.
        for row in step.several:
            part = slice(*step.told[0][row : row + 2])
            asked, new_key, new_value = (x[part].transpose(0, 1)[None] for x in (query, key, value))
            seen = heads_as_stored(new_key, new_value, None if pool.is_untouched else [pool.bits] * key.shape[1])
            output[part] = self._chunk(held, asked, *seen, step, row, scoring)[0].transpose(0, 1)
        paged_write(self.heads, held, key, value, found)
        if len(step.several) < len(step.told[1]):
            paged_decode(self.heads, held, query, output, found, scoring.scale, scoring.softcap, scoring.sink_logits)
        return output

    def _chunk(
        self, pool: PooledPages, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, step: Step, row: int, scoring: Scoring
    ) -> torch.Tensor:
        """Of one row's new tokens, (1, heads, tokens, head_dim), which are not yet written: over a ring into which what the row holds is
        copied, if it holds anything."""
        length, bucket = step.told[1][row], step.told_buckets[row]
        past = length - query.shape[2]
        if not past:
            layout = self._layouts[bucket]
            return prompt_by_kernel(
                query, key, value, layout.windows, layout.sink_tokens, scoring.scale, layout.reach, scoring.softcap, scoring.sink_logits
            )
        ring, starts = self._held(bucket, max(16, 1 << (past - 1).bit_length()))
        ring = copy.copy(ring)
        ring.keys, ring.values = (key.new_empty(1, ring.layout.total, key.shape[-1]) for _ in range(2))
        paged_read(self.heads, pool, step.table[row], bucket, past, starts, ring.keys[0], ring.values[0])
        lengths = torch.full((1,), length, dtype=torch.int32, device=self._device)
        return chunk_attention(
            query, key, value, ring, lengths, torch.zeros_like(lengths), scoring.scale, scoring.softcap, scoring.sink_logits
        )

    def _held_by(self, bucket: int, capacity: int) -> tuple[RingLayer, torch.Tensor]:
        """For sequences of up to `capacity` tokens: a ring of no row, and the first slot of every head."""
        whole = self._layouts[bucket]
        layout = LayerLayout(whole.sink_tokens, whole.windows, whole.reach, min(capacity, whole.capacity))
        ring = RingLayer(layout, 0, 1, torch.float32, self._device)
        return ring, torch.from_numpy(layout.starts).to(self._device)


def pooled(pool: PagePool) -> PooledPages:
    """A pool as kernels want it told."""
    numbers, words = (pool.raw.view(len(pool.raw), -1).view(dtype) for dtype in (pool.dtype, torch.int32))
    return PooledPages(numbers, words, pool.raw.nbytes // len(pool.raw), *pool.parts)
