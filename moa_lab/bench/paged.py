"""Decode over pages of single heads, as a server's step reads them: bytes per second against a pure read (D4; in stored bits B4)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from moa_lab.bench.decode import GIGA, DecodeInputs, decode_inputs
from moa_lab.bench.lab import READ, Lab, timing_detail
from moa_lab.bench.record import GOALS, BenchRow, errors, judged
from moa_lab.bench.shapes import Shape, described, kv_bytes
from moa_lab.bench.timing import copies_past_cache, time_calls
from moa_lab.cache.storage import as_stored
from moa_lab.plan import WHOLE_BITS
from moa_lab.serving import PAGE_TOKENS, PageLayout, RequestPages
from moa_lab.serving.page_pool import PagePool, page_bytes

if TYPE_CHECKING:
    from moa_lab.kernels.paged import Pass, PooledPages
    from moa_lab.serving.paged_kernels import PagedKernels


@dataclass(frozen=True)
class PagedInputs:
    """What a full ring of every row holds, in pages that lie in no order. query: (batch, query_heads, head_dim)."""

    layer: PagedKernels
    pool: PooledPages
    query: torch.Tensor
    step: Pass
    scale: float

    def attend(self) -> torch.Tensor:
        """Our kernel: as `query`."""
        # Imported here: Triton may be missing.
        from moa_lab.kernels.paged import paged_decode

        output = torch.empty_like(self.query)
        paged_decode(self.layer.heads, self.pool, self.query, output, self.step, self.scale)
        return output


def paged_row(row: str, shape: Shape, lab: Lab) -> BenchRow:
    """D4 or B4: useful bytes/s, as GB/s, codes and grids as they lie, against what a sum over bfloat16 reads."""
    spans = lab.spans(shape)
    nbytes = kv_bytes(shape, sum(spans.tokens), lab.dtype.itemsize)
    ring = _numbers(shape, lab)
    inputs = _in_pages(ring, shape, 0)
    for bits, held in zip(shape.bits, (ring.ring.keys, ring.ring.values), strict=True):
        held.copy_(as_stored(held, bits))
    expected = ring.expected()[:, :, 0]
    del ring
    found = errors(inputs.attend(), expected)
    lab.release()
    more = [_in_pages(_numbers(shape, lab, 3 * copy), shape, copy) for copy in range(1, copies_past_cache(nbytes, lab.device))]
    timing = time_calls([each.attend for each in (inputs, *more)], lab.device)
    rates = timing.rate(nbytes / GIGA), lab.read_bytes / GIGA
    detail = {**timing_detail(timing), **found, "useful_bytes": nbytes, "page_tokens": PAGE_TOKENS}
    return judged(row, GOALS[row], described(shape, spans), *rates, READ, "GB/s", lab.trusts(found), detail)


def _numbers(shape: Shape, lab: Lab, seed: int = 0) -> DecodeInputs:
    """A step over a ring that is not yet stored in the shape's bits."""
    return decode_inputs(replace(shape, bits=WHOLE_BITS), lab.spans(shape), lab, seed)


def _in_pages(given: DecodeInputs, shape: Shape, seed: int) -> PagedInputs:
    """The same step, over pages in the shape's bits."""
    from moa_lab.kernels.paged import Pass
    from moa_lab.serving.paged_kernels import PagedKernels, pooled

    ring, device = given.ring, given.query.device
    tokens, slots = ring.layout.capacity, [np.arange(count) for count in ring.layout.slots]
    layout = PageLayout((ring.layout,), PAGE_TOKENS, shape.bits)
    pages = RequestPages((tokens,), (layout,))
    columns = pages.most_pages(tokens)
    order = torch.randperm(shape.batch * columns, generator=torch.Generator().manual_seed(seed)).to(device, torch.int32)
    # Page 0 belongs to nobody.
    table = 1 + order.view(shape.batch, columns)
    size = page_bytes(PAGE_TOKENS, shape.head_dim, given.query.dtype, shape.bits)
    raw = torch.zeros(1 + shape.batch * columns, size, dtype=torch.int8, device=device)
    pool = PagePool(raw, PAGE_TOKENS, shape.head_dim, given.query.dtype, shape.bits)
    at = torch.from_numpy(np.concatenate([layout.columns(0, head)[these // PAGE_TOKENS] for head, these in enumerate(slots)])).to(device)
    within = torch.from_numpy(np.concatenate(slots) % PAGE_TOKENS).to(device)
    for row in range(shape.batch):
        for part, held in enumerate((ring.keys, ring.values)):
            pool.write(part, table[row, at].long(), within, held[row])
    rows = torch.arange(shape.batch + 1, dtype=torch.int32, device=device)
    step = Pass(table, given.lengths, rows, rows[:-1], torch.zeros_like(given.lengths))
    return PagedInputs(PagedKernels(pages.of_layer(0)[0], device), pooled(pool), given.query[:, :, 0].contiguous(), step, given.scale)
