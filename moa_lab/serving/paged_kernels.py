"""Attention over pages by kernels, for devices that run them: what one layer needs, and a pass in the order that rings ask for."""

from __future__ import annotations

import copy
from functools import lru_cache

import numpy as np
import torch

from moa_lab.cache import LayerLayout, RingLayer
from moa_lab.kernels.dispatch import prompt_by_kernel
from moa_lab.kernels.paged import PagedHeads, Pass, paged_decode, paged_write
from moa_lab.kernels.prefill import chunk_attention
from moa_lab.serving.page_layout import RequestPages
from moa_lab.serving.step import Scoring, Step


class PagedKernels:
    """The heads of one layer, as kernels want them told."""

    def __init__(self, pages: RequestPages, layer: int, device: torch.device) -> None:
        self._layouts = [each.layers[layer] for each in pages.layouts]
        table = [
            np.stack([*layout.table().T[1:], layout.slots, each.ranks[layer]], axis=1)
            for layout, each in zip(self._layouts, pages.layouts, strict=True)
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
        self, pool: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, step: Step, scoring: Scoring
    ) -> torch.Tensor:
        """As `moa_lab.serving.paged.paged_attention`, over the numbers of a pool."""
        output = torch.empty_like(query)
        found = Pass(step.table, *step.narrow)
        # Before they are written: in a full ring they take the place of tokens that the first of them still see.
        for row in step.several:
            part = slice(*step.told[0][row : row + 2])
            output[part] = self._chunk(pool, query[part], key[part], value[part], step, row, scoring)
        paged_write(self.heads, pool, key, value, found)
        if len(step.several) < len(step.told[1]):
            paged_decode(self.heads, pool, query, output, found, scoring.scale, scoring.softcap, scoring.sink_logits)
        return output

    def _chunk(
        self, pool: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, step: Step, row: int, scoring: Scoring
    ) -> torch.Tensor:
        """Of one row's new tokens, which are not yet written: over a ring into which what the row holds is copied, if it holds anything."""
        table, length, bucket = step.table[row], step.told[1][row], step.told_buckets[row]
        past = length - len(query)
        asked, new_key, new_value = (x.transpose(0, 1)[None] for x in (query, key, value))
        if not past:
            layout = self._layouts[bucket]
            found = prompt_by_kernel(
                asked,
                new_key,
                new_value,
                layout.windows,
                layout.sink_tokens,
                scoring.scale,
                layout.reach,
                scoring.softcap,
                scoring.sink_logits,
            )
            return found[0].transpose(0, 1)
        ring, starts = self._held(bucket, max(16, 1 << (past - 1).bit_length()))
        columns, within = self.places(bucket, starts, ring.layout.total)
        ring, vectors, page = copy.copy(ring), pool.view(-1, pool.shape[-1]), 2 * self.heads.page_tokens
        # Places that the row does not hold yet are page 0, and are not read.
        places = table[columns.clamp(max=len(table) - 1)].long() * page + within
        ring.keys, ring.values = (vectors.index_select(0, places + part)[None] for part in (0, self.heads.page_tokens))
        lengths = torch.full((1,), length, dtype=torch.int32, device=self._device)
        found = chunk_attention(
            asked, new_key, new_value, ring, lengths, torch.zeros_like(lengths), scoring.scale, scoring.softcap, scoring.sink_logits
        )
        return found[0].transpose(0, 1)

    def _held_by(self, bucket: int, capacity: int) -> tuple[RingLayer, torch.Tensor]:
        """For sequences of up to `capacity` tokens: a ring of no row, and the first slot of every head."""
        whole = self._layouts[bucket]
        layout = LayerLayout(whole.sink_tokens, whole.windows, whole.reach, min(capacity, whole.capacity))
        ring = RingLayer(layout, 0, 1, torch.float32, self._device)
        return ring, torch.from_numpy(layout.starts).to(self._device)

    def places(self, bucket: int, starts: torch.Tensor, total: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the slots of all heads: the column of the block table, and the place in the page. Not kept: long sequences have many."""
        heads = torch.arange(len(starts) - 1, device=self._device).repeat_interleave(starts.diff(), output_size=total)
        slots = torch.arange(total, device=self._device) - starts[heads]
        columns = self.heads.steps[bucket, slots // self.heads.page_tokens] + self.heads.heads[bucket, heads, 4]
        return columns, slots % self.heads.page_tokens
