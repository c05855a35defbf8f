"""Decode over pages of single heads, as a server's step reads them: bytes per second against a pure read (D4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from moa_lab.bench.decode import GIGA, DecodeInputs, decode_inputs
from moa_lab.bench.lab import READ, Lab, timing_detail
from moa_lab.bench.record import GOALS, BenchRow, errors, judged
from moa_lab.bench.shapes import Shape, described, kv_bytes
from moa_lab.bench.timing import copies_past_cache, time_calls
from moa_lab.serving import PAGE_TOKENS, PageLayout, RequestPages

if TYPE_CHECKING:
    from moa_lab.kernels.paged import Pass
    from moa_lab.serving.paged_kernels import PagedKernels


@dataclass(frozen=True)
class PagedInputs:
    """What a full ring of every row holds, in pages that lie in no order. query: (batch, query_heads, head_dim)."""

    layer: PagedKernels
    pool: torch.Tensor
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


def paged_row(shape: Shape, lab: Lab) -> BenchRow:
    """D4: useful bytes/s, as GB/s, against what a sum over bfloat16 reads."""
    spans = lab.spans(shape)
    nbytes = kv_bytes(shape, sum(spans.tokens), lab.dtype.itemsize)
    ring = decode_inputs(shape, spans, lab)
    expected = ring.expected()[:, :, 0]
    inputs = _in_pages(ring, 0)
    del ring
    found = errors(inputs.attend(), expected)
    lab.release()
    more = [_in_pages(decode_inputs(shape, spans, lab, seed=3 * copy), copy) for copy in range(1, copies_past_cache(nbytes, lab.device))]
    timing = time_calls([each.attend for each in (inputs, *more)], lab.device)
    rates = timing.rate(nbytes / GIGA), lab.read_bytes / GIGA
    detail = {**timing_detail(timing), **found, "useful_bytes": nbytes, "page_tokens": PAGE_TOKENS}
    return judged("D4", GOALS["D4"], described(shape, spans), *rates, READ, "GB/s", lab.trusts(found), detail)


def _in_pages(given: DecodeInputs, seed: int) -> PagedInputs:
    """The same step, over pages."""
    from moa_lab.kernels.paged import Pass
    from moa_lab.serving.paged_kernels import PagedKernels

    ring, (batch, _, _, head_dim), device = given.ring, given.query.shape, given.query.device
    tokens = ring.layout.capacity
    pages = RequestPages((tokens,), (PageLayout((ring.layout,), PAGE_TOKENS),))
    layer, columns = PagedKernels(pages, 0, device), pages.most_pages(tokens)
    order = torch.randperm(batch * columns, generator=torch.Generator().manual_seed(seed)).to(device, torch.int32)
    # Page 0 belongs to nobody.
    table = 1 + order.view(batch, columns)
    pool = torch.zeros(1 + batch * columns, 2, PAGE_TOKENS, head_dim, dtype=given.query.dtype, device=device)
    at, within = layer.places(0, torch.from_numpy(ring.layout.starts).to(device), ring.layout.total)
    vectors = pool.view(-1, head_dim)
    for row in range(batch):
        places = table[row, at].long() * 2 * PAGE_TOKENS + within
        vectors[places], vectors[places + PAGE_TOKENS] = ring.keys[row], ring.values[row]
    rows = torch.arange(batch + 1, dtype=torch.int32, device=device)
    step = Pass(table, given.lengths, rows, rows[:-1], torch.zeros_like(given.lengths))
    return PagedInputs(layer, pool, given.query[:, :, 0].contiguous(), step, given.scale)
