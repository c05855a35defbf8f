"""Requests that take pages as a server gives them, held against a cache that keeps everything."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import torch
from ring_attends import DEVICE
from ring_oracle import HEAD_DIM, Chunk, Sequences

from moa_lab.cache import LayerLayout
from moa_lab.plan import WHOLE_BITS, Bits
from moa_lab.serving import RequestPages
from moa_lab.serving.page_layout import layout_of
from moa_lab.serving.page_pool import shape_of
from moa_lab.serving.paged import LayerHeads, layer_attention
from moa_lab.serving.step import Scoring, Step

CAPACITY = 400


class Pages:
    """A pool, and the pages that rows took from it; pages that nobody has hold NaN. others: layouts of requests of other lengths, which
    have lower buckets. at_least: of `PageLayout`."""

    def __init__(
        self, layout: LayerLayout, page_tokens: int, rows: int, seed: int = 0, sample: torch.Tensor | None = None,
        bits: list[Bits] | None = None, others: tuple[LayerLayout, ...] = (), at_least: tuple[int, ...] = (),
    ) -> None:  # fmt: skip
        head_dim, dtype = (HEAD_DIM, torch.float32) if sample is None else (sample.shape[-1], sample.dtype)
        stored = bits or [WHOLE_BITS] * len(layout.windows)
        shape = shape_of(Counter(stored), page_tokens, head_dim, dtype)
        # A second layer, whose pages lie between, and whose heads store alike the other way round.
        between = LayerLayout(2, (9, 500, 60, 31)[: len(layout.windows)], None, CAPACITY)
        layouts = tuple(layout_of((between, each), (stored[::-1], stored), shape.tokens) for each in (*others, layout))
        if at_least:
            layouts = tuple(replace(each, at_least=at_least) for each in layouts)
        self.pages = RequestPages(tuple(range(CAPACITY - len(others), CAPACITY + 1)), layouts)
        self.kinds = [LayerHeads(alike, torch.device(DEVICE)) for alike in self.pages.of_layer(1)]
        self.buckets = [len(others)] * rows
        columns = self.pages.most_pages(CAPACITY)
        self.free = (1 + torch.randperm(rows * columns, generator=torch.Generator().manual_seed(seed))).tolist()
        self.dtype = dtype
        # All bits set is NaN, as a number and as a grid.
        self.raw = torch.full((1 + rows * columns, shape.nbytes), -1, dtype=torch.int8, device=DEVICE)
        self.raw[0] = 0
        self.table = torch.zeros(rows, columns, dtype=torch.int32, device=DEVICE)
        self.taken = [0] * rows

    def leave(self, row: int) -> None:
        """A row ends, NaN in all that it had."""
        self.free += self.table[row, : self.taken[row]].tolist()
        self.raw[self.table[row, : self.taken[row]].long()] = -1
        self.taken[row] = 0

    def grow(self, lengths: list[int]) -> None:
        for row, length in enumerate(lengths):
            wanted = self.pages.layouts[self.buckets[row]].pages_for(length)
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
    step = Step(pages.table[has], torch.tensor(pages.buckets, device=DEVICE)[has], chunk.lengths[has].long(), firsts)
    found = layer_attention(pages.kinds, pages.raw, *flat, step, Scoring(rows.scale, rows.softcap, rows.sink_logits))
    output = torch.zeros_like(chunk.query)
    for at, row in enumerate(has):
        output[row, :, -counts[row] :] = found[firsts[at] : firsts[at + 1]].transpose(0, 1)
    return output


def check(layout: LayerLayout, page_tokens: int, steps: list[list[int]], at_least: tuple[int, ...] = (), **settings: object) -> None:
    rows = Sequences(layout, len(steps[0]), device=DEVICE, **settings)  # type: ignore[arg-type]
    pages = Pages(
        layout,
        page_tokens,
        len(steps[0]),
        sample=rows.ring.sample,
        bits=settings.get("bits"),
        at_least=at_least,  # type: ignore[arg-type]
    )
    close = 2e-5 if pages.dtype == torch.float32 else 5e-3
    for counts in steps:
        chunk = rows.chunk(counts)
        torch.testing.assert_close(by_pages(rows, pages, chunk), rows.expected(chunk).to(pages.dtype), atol=close, rtol=close)
    assert pages.raw[0].eq(0).all()


def check_columns(pages: RequestPages, bucket: int, longest: int) -> int:
    """Each page of each head has a column of its own, which a request has once it has the page's first token; their number."""
    columns, layout = [], pages.layouts[bucket]
    taken = [layout.pages_for(n) for n in range(longest + 1)]
    for layer in range(pages.layers):
        parts = pages.of_layer(layer)
        heads = sorted(head for part in parts for head in part.heads)
        assert heads == list(range(len(heads)))
        for part in parts:
            for slots, rank in zip(part.layouts[bucket].slots, part.ranks[bucket], strict=True):
                for page in range(-(-slots // part.page_tokens)):
                    columns.append(part.steps[bucket, page] + rank)
                    assert taken[page * part.page_tokens] <= columns[-1] < taken[page * part.page_tokens + 1]
    assert len(set(columns)) == len(columns)
    return len(columns)
