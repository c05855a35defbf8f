"""Attention over pages by kernels, for devices that run them: what one layer needs, and a pass in the order that rings ask for."""

from __future__ import annotations

import copy
from functools import lru_cache

import numpy as np
import torch

from moa_lab.cache import LayerLayout, RingLayer
from moa_lab.kernels.paged import PagedHeads, Pass, paged_decode, paged_write
from moa_lab.kernels.prefill import chunk_attention
from moa_lab.serving.page_layout import PageLayout
from moa_lab.serving.step import Scoring, Step


class PagedKernels:
    """The heads of one layer, as kernels want them told."""

    def __init__(self, pages: PageLayout, layer: int, device: torch.device) -> None:
        layout, ranks = pages.layers[layer], pages.ranks[layer]
        table = np.stack([*layout.table().T[1:], layout.slots, ranks], axis=1).astype(np.int32)
        self._heads = PagedHeads(
            torch.from_numpy(table).to(device), torch.from_numpy(pages.steps.astype(np.int32)).to(device),
            int(layout.slots.max()), layout.sink_tokens, layout.reach or 0, pages.page_tokens,
        )  # fmt: skip
        self._layout, self._ranks, self._device = layout, ranks, device
        # Kept by this layer: what is made for a capacity is made once.
        self._held = lru_cache(maxsize=None)(self._held_by)

    def attend(
        self, pool: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, step: Step, scoring: Scoring
    ) -> torch.Tensor:
        """As `moa_lab.serving.paged.paged_attention`."""
        output = torch.empty_like(query)
        found = Pass(step.table, *step.narrow)
        firsts, lengths = step.told
        # Before they are written: in a full ring they take the place of tokens that the first of them still see.
        for row in step.several:
            part = slice(firsts[row], firsts[row + 1])
            output[part] = self._chunk(pool, query[part], key[part], value[part], step.table[row], lengths[row], scoring)
        paged_write(self._heads, pool, key, value, found)
        if len(step.several) < len(lengths):
            paged_decode(self._heads, pool, query, output, found, scoring.scale, scoring.softcap, scoring.sink_logits)
        return output

    def _chunk(
        self, pool: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        table: torch.Tensor, length: int, scoring: Scoring,
    ) -> torch.Tensor:  # fmt: skip
        """Of one row's new tokens, which are not yet written: over a ring into which what the row holds is copied."""
        past = length - len(query)
        ring, columns, within = self._held(max(16, 1 << max(past - 1, 0).bit_length()))
        ring, vectors, page = copy.copy(ring), pool.view(-1, pool.shape[-1]), 2 * self._heads.page_tokens
        # Places that the row does not hold yet are page 0, and are not read.
        places = table[columns.clamp(max=len(table) - 1)].long() * page + within
        ring.keys, ring.values = (vectors.index_select(0, places + part)[None] for part in (0, self._heads.page_tokens))
        lengths = torch.full((1,), length, dtype=torch.int32, device=self._device)
        asked, new_key, new_value = (x.transpose(0, 1)[None] for x in (query, key, value))
        found = chunk_attention(
            asked, new_key, new_value, ring, lengths, torch.zeros_like(lengths), scoring.scale, scoring.softcap, scoring.sink_logits
        )
        return found[0].transpose(0, 1)

    def _held_by(self, capacity: int) -> tuple[RingLayer, torch.Tensor, torch.Tensor]:
        """For sequences of up to `capacity` tokens: a ring of no row, and of its slots column of the block table and place in the page."""
        whole = self._layout
        layout = LayerLayout(whole.sink_tokens, whole.windows, whole.reach, min(capacity, whole.capacity))
        ring = RingLayer(layout, 0, 1, torch.float32, self._device)
        slots = torch.from_numpy(np.concatenate([np.arange(count) for count in layout.slots])).to(self._device)
        ranks = torch.from_numpy(np.repeat(self._ranks, layout.slots)).to(self._device)
        return ring, self._heads.steps[slots // self._heads.page_tokens] + ranks, slots % self._heads.page_tokens
