"""Requests that take pages as a server gives them, held against a cache that keeps everything."""

from __future__ import annotations

import numpy as np
import torch
from ring_attends import DEVICE
from ring_oracle import HEAD_DIM, Chunk, Sequences

from moa_lab.cache import LayerLayout
from moa_lab.serving import PageLayout
from moa_lab.serving.paged import PagedLayer, paged_attention
from moa_lab.serving.step import Scoring, Step

CAPACITY = 400


class Pages:
    """A pool, and the pages that rows took from it; pages that nobody has hold NaN."""

    def __init__(self, layout: LayerLayout, page_tokens: int, rows: int, seed: int = 0, sample: torch.Tensor | None = None) -> None:
        # A second layer, whose pages lie between.
        self.layout = PageLayout((LayerLayout(2, (9, 500), None, CAPACITY), layout), page_tokens)
        self.layer = PagedLayer(self.layout, 1, torch.device(DEVICE))
        columns = self.layout.pages_for(CAPACITY)
        self.free = (1 + torch.randperm(rows * columns, generator=torch.Generator().manual_seed(seed))).tolist()
        head_dim, dtype = (HEAD_DIM, torch.float32) if sample is None else (sample.shape[-1], sample.dtype)
        self.pool = torch.full((1 + rows * columns, 2, page_tokens, head_dim), float("nan"), dtype=dtype, device=DEVICE)
        self.pool[0] = 0
        self.table = torch.zeros(rows, columns, dtype=torch.int32, device=DEVICE)
        self.taken = [0] * rows

    def grow(self, lengths: list[int]) -> None:
        for row, length in enumerate(lengths):
            wanted = self.layout.pages_for(length)
            for column in range(self.taken[row], wanted):
                self.table[row, column] = self.free.pop()
            self.taken[row] = max(self.taken[row], wanted)


def by_pages(rows: Sequences, pages: Pages, chunk: Chunk) -> torch.Tensor:
    """What the new tokens of all rows get, padded as `chunk` is; rows may have none."""
    counts = (chunk.key.shape[2] - chunk.padding).tolist()
    pages.grow(chunk.lengths.tolist())
    has = [row for row, count in enumerate(counts) if count]
    flat = [torch.cat([x[row, :, -counts[row] :].transpose(0, 1) for row in has]) for x in (chunk.query, chunk.key, chunk.value)]
    firsts = torch.tensor([0, *np.cumsum([counts[row] for row in has])], device=DEVICE)
    step = Step(pages.table[has], chunk.lengths[has].long(), firsts)
    found = paged_attention(pages.layer, pages.pool, *flat, step, Scoring(rows.scale, rows.softcap, rows.sink_logits))
    output = torch.zeros_like(chunk.query)
    for at, row in enumerate(has):
        output[row, :, -counts[row] :] = found[firsts[at] : firsts[at + 1]].transpose(0, 1)
    return output


def check(layout: LayerLayout, page_tokens: int, steps: list[list[int]], **settings: object) -> None:
    rows = Sequences(layout, len(steps[0]), device=DEVICE, **settings)  # type: ignore[arg-type]
    pages = Pages(layout, page_tokens, len(steps[0]), sample=rows.ring.sample)
    close = 2e-5 if pages.pool.dtype == torch.float32 else 5e-3
    for counts in steps:
        chunk = rows.chunk(counts)
        torch.testing.assert_close(by_pages(rows, pages, chunk), rows.expected(chunk).to(pages.pool), atol=close, rtol=close)
    assert pages.pool[0].eq(0).all()
