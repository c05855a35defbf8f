"""Keys and values of a plan's heads in pages, written and read through block tables; attention over them.

Kernels do it where they run (`paged_kernels`); plain PyTorch, their reference, elsewhere.

pool, throughout: (pages, 2, page_tokens, head_dim), K before V. Page 0 belongs to nobody: it is never written.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch

from moa_lab.kernels.dispatch import kernel_applies
from moa_lab.kernels.reference import masked_attention
from moa_lab.masks import visible
from moa_lab.serving.page_layout import PageLayout
from moa_lab.serving.step import Scoring, Step

if TYPE_CHECKING:
    from moa_lab.serving.paged_kernels import PagedKernels


class PagedLayer:
    """Where the heads of one layer have their slots."""

    def __init__(self, pages: PageLayout, layer: int, device: torch.device) -> None:
        self.layout = pages.layers[layer]
        self.page_tokens = pages.page_tokens
        self._slots = self.layout.slots.tolist()
        heads = range(len(self._slots))
        self._columns = [torch.from_numpy(pages.columns(layer, head)).to(device) for head in heads]
        self._steps, self._ranks, self._sinks, self._rings = (
            torch.from_numpy(x).to(device) for x in (pages.steps, pages.ranks[layer], self.layout.sinks, self.layout.rings)
        )
        self._kernels_of = pages, layer, device

    @cached_property
    def kernels(self) -> PagedKernels:
        """The layer as kernels want it told."""
        # Imported here: Triton may be missing.
        from moa_lab.serving.paged_kernels import PagedKernels

        return PagedKernels(*self._kernels_of)

    def write(self, pool: torch.Tensor, key: torch.Tensor, value: torch.Tensor, step: Step) -> None:
        """Write the new tokens: key, value (tokens, kv_heads, head_dim)."""
        at = step.positions[:, None]
        # Skip tokens that later ones would overwrite: the order of writes to one slot is undefined.
        kept = (at < self._sinks) | (at >= step.lengths[step.rows][:, None] - self._rings)
        slots = torch.where(at < self._sinks, at, self._sinks + (at - self._sinks).remainder(self._rings))
        columns = self._steps[slots // self.page_tokens] + self._ranks
        pages = step.table[step.rows[:, None], columns][kept].long()
        slots = slots[kept] % self.page_tokens
        pool[pages, 0, slots] = key[kept]
        pool[pages, 1, slots] = value[kept]

    def held(
        self, pool: torch.Tensor, head: int, table: torch.Tensor, lengths: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What a head holds of sequences of `lengths` (rows,): K and V (rows, slots, head_dim), and the position of the token in each
        slot, -1 for an empty one: int64 (rows, slots). Empty slots come back as 0."""
        counts = lengths.clamp(max=self._slots[head])
        most = -(-int(counts.max()) // self.page_tokens)
        has = torch.arange(most, device=table.device) * self.page_tokens < counts[:, None]
        pages = torch.where(has, table[:, self._columns[head][:most]], 0).long()
        # What another request left in the last page may be NaN, which no mask hides.
        last = (counts - 1) // self.page_tokens
        left = torch.arange(self.page_tokens, device=table.device) >= (counts - last * self.page_tokens)[:, None]
        key, value = (_gathered(pool, part, pages, last, left) for part in (0, 1))
        return key, value, self._positions(head, most * self.page_tokens, lengths)

    def _positions(self, head: int, count: int, lengths: torch.Tensor) -> torch.Tensor:
        """As `RingLayer.positions`, of the first `count` slots of a head."""
        sink, ring = int(self.layout.sinks[head]), int(self.layout.rings[head])
        slot = torch.arange(count, device=lengths.device)
        newest = lengths[:, None] - 1
        turns = torch.div(newest - slot, ring, rounding_mode="floor").clamp(min=0)
        found = torch.where(slot < sink, slot, slot + turns * ring)
        return torch.where((slot <= newest) & (slot < self._slots[head]), found, -1)


def _gathered(pool: torch.Tensor, part: int, pages: torch.Tensor, last: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
    """K (part 0) or V (1) of `pages` (rows, pages): (rows, slots, head_dim). left: bool (rows, page_tokens), empty slots of each row's
    `last` page."""
    # Rows of a matrix: copied whole, several times as fast as by index.
    halves = pool.flatten(0, 1).flatten(1)
    found = halves.index_select(0, (2 * pages + part).flatten()).view(*pages.shape, *pool.shape[2:])
    rows = torch.arange(len(pages), device=pages.device)
    found[rows, last] = found[rows, last].masked_fill(left[..., None], 0)
    return found.flatten(1, 2)


def paged_attention(
    layer: PagedLayer, pool: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, step: Step, scoring: Scoring
) -> torch.Tensor:
    """Attention of the new tokens to what their heads hold and to one another: (tokens, query_heads, head_dim). They are kept from here on.

    query: (tokens, query_heads, head_dim); key, value: (tokens, kv_heads, head_dim).
    """
    if kernel_applies(query, key, value):
        return layer.kernels.attend(pool, query, key, value, step, scoring)
    output = torch.empty_like(query)
    # Before they are written: in a full ring they take the place of tokens that the first of them still see.
    for row in step.several:
        part = slice(*step.told[0][row : row + 2])
        output[part] = _chunk(layer, pool, query[part], key[part], value[part], step, row, scoring)
    layer.write(pool, key, value, step)
    if len(step.single):
        tokens = step.firsts[step.single]
        output[tokens] = _newest(layer, pool, query[tokens], step.table[step.single], step.lengths[step.single], scoring)
    return output


def _chunk(
    layer: PagedLayer, pool: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    step: Step, row: int, scoring: Scoring,
) -> torch.Tensor:  # fmt: skip
    """Of one row's new tokens, which are not yet written."""
    past = step.lengths[row : row + 1] - len(query)
    new = past + torch.arange(len(query), device=query.device)
    group = query.shape[1] // key.shape[1]
    output = torch.empty_like(query)
    for head in range(key.shape[1]):
        seen_key, seen_value, positions = key[None, :, head], value[None, :, head], new[None]
        if int(past):
            held_key, held_value, held = layer.held(pool, head, step.table[row : row + 1], past)
            seen_key, seen_value = torch.cat([held_key, seen_key], dim=1), torch.cat([held_value, seen_value], dim=1)
            positions = torch.cat([held, positions], dim=1)
        shown = _shown(layer, head, new[:, None], positions[:, None, None])
        heads = slice(head * group, (head + 1) * group)
        sinks = None if scoring.sink_logits is None else scoring.sink_logits[heads]
        asked = query[:, heads].transpose(0, 1)[None]
        found = masked_attention(asked, seen_key[:, None], seen_value[:, None], shown, scoring.scale, scoring.softcap, sinks)
        output[:, heads] = found[0].transpose(0, 1)
    return output


def _newest(
    layer: PagedLayer, pool: torch.Tensor, query: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor, scoring: Scoring
) -> torch.Tensor:
    """Of one new token a row, already written: query (rows, query_heads, head_dim)."""
    kv_heads = len(layer.layout.windows)
    group = query.shape[1] // kv_heads
    output = torch.empty_like(query)
    for head in range(kv_heads):
        key, value, positions = layer.held(pool, head, table, lengths)
        shown = _shown(layer, head, lengths[:, None] - 1, positions)
        heads = slice(head * group, (head + 1) * group)
        # One KV head: its query heads take the place of the query tokens.
        sinks = None if scoring.sink_logits is None else scoring.sink_logits[heads].transpose(0, 1)
        found = masked_attention(
            query[:, None, heads], key[:, None], value[:, None], shown[:, None, None], scoring.scale, scoring.softcap, sinks
        )
        output[:, heads] = found[:, 0]
    return output


def _shown(layer: PagedLayer, head: int, asked: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    layout = layer.layout
    shown = visible(asked, known, layout.sink_tokens, layout.windows[head]) & (known >= 0)
    return shown if layout.reach is None else shown & (asked - known < layout.reach)
