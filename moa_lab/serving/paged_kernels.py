"""Attention over pages by kernels, for devices that run them: what one layer needs, and a pass in the order that rings ask for."""

from __future__ import annotations

import numpy as np
import torch

from moa_lab.kernels.dispatch import prompt_by_kernel
from moa_lab.kernels.paged import PagedHeads, Pass, PooledPages, paged_decode, paged_read, paged_write
from moa_lab.kernels.prefill import prefill_attention
from moa_lab.kernels.stored import heads_as_stored
from moa_lab.serving.page_layout import LayerPages
from moa_lab.serving.page_pool import PagePool
from moa_lab.serving.step import Scoring, Step

MOST_READ = 2**28
"""Bytes of K and V that lie beside the pages at a time: an engine leaves little memory free."""


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
            seen = heads_as_stored(new_key, new_value, [pool.bits] * key.shape[1])
            output[part] = self._chunk(held, asked, *seen, step, row, scoring)[0].transpose(0, 1)
        paged_write(self.heads, held, key, value, found)
        if len(step.several) < len(step.told[1]):
            paged_decode(self.heads, held, query, output, found, scoring.scale, scoring.softcap, scoring.sink_logits)
        return output

    def _chunk(
        self, pool: PooledPages, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, step: Step, row: int, scoring: Scoring
    ) -> torch.Tensor:
        """Of one row's new tokens, (1, heads, tokens, head_dim), which are not yet written: over what the row holds, read to where its
        positions are, of as many heads at a time as `MOST_READ` allows."""
        length, bucket = step.told[1][row], step.told_buckets[row]
        layout, past = self._layouts[bucket], length - query.shape[2]
        if not past:
            return prompt_by_kernel(
                query, key, value, layout.windows, layout.sink_tokens, scoring.scale, layout.reach, scoring.softcap, scoring.sink_logits
            )
        kv_heads, head_dim = key.shape[1], key.shape[3]
        group = query.shape[1] // kv_heads
        output = torch.empty_like(query)
        at_once = max(1, MOST_READ // (2 * length * head_dim * key.itemsize))
        for first in range(0, kv_heads, at_once):
            heads = slice(first, min(first + at_once, kv_heads))
            asking = slice(heads.start * group, heads.stop * group)
            # What lies beside a span in a tile is read, and counts nothing: it must be a number.
            keys, values = (key.new_zeros(heads.stop - heads.start, length, head_dim) for _ in range(2))
            paged_read(self.heads, pool, step.table[row], bucket, past, heads, keys, values)
            keys[:, past:], values[:, past:] = key[0, heads], value[0, heads]
            sinks = None if scoring.sink_logits is None else scoring.sink_logits[asking]
            output[:, asking] = prefill_attention(
                query[:, asking], keys[None], values[None], layout.windows[heads], layout.sink_tokens, scoring.scale,
                reach=layout.reach, softcap=scoring.softcap, sink_logits=sinks,
            )  # fmt: skip
        return output


def pooled(pool: PagePool) -> PooledPages:
    """A pool as kernels want it told."""
    numbers, words = (pool.raw.view(len(pool.raw), -1).view(dtype) for dtype in (pool.dtype, torch.int32))
    return PooledPages(numbers, words, pool.raw.nbytes // len(pool.raw), *pool.parts)
