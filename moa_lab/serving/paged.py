"""Keys and values of a plan's heads in pages, written and read through block tables; attention over them.

Kernels do it where they run (`paged_kernels`); plain PyTorch, their reference, elsewhere. Page 0 belongs to nobody: it is never written.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from moa_lab.cache.storage import heads_as_stored
from moa_lab.kernels.dispatch import kernel_applies
from moa_lab.kernels.reference import masked_attention
from moa_lab.masks import visible
from moa_lab.serving.page_layout import RequestPages
from moa_lab.serving.page_pool import PagePool
from moa_lab.serving.step import Scoring, Step

if TYPE_CHECKING:
    from moa_lab.serving.paged_kernels import PagedKernels


class PagedLayer:
    """Where the heads of one layer have their slots, in requests of every bucket."""

    def __init__(self, pages: RequestPages, layer: int, device: torch.device) -> None:
        layouts = [each.layers[layer] for each in pages.layouts]
        self.page_tokens, self.sink_tokens, self.reach = pages.page_tokens, layouts[0].sink_tokens, layouts[0].reach
        # By bucket and head.
        self._slots, self._sinks, self._rings, self._windows, self._ranks = (
            torch.from_numpy(np.stack(found)).to(device)
            for found in (
                [each.slots for each in layouts], [each.sinks for each in layouts], [each.rings for each in layouts],
                [np.array(each.windows) for each in layouts], [each.ranks[layer] for each in pages.layouts],
            )
        )  # fmt: skip
        self._steps = torch.from_numpy(pages.steps).to(device)
        self.kv_heads = self._slots.shape[1]
        self._kernels_of = pages, layer, device

    @cached_property
    def kernels(self) -> PagedKernels:
        """The layer as kernels want it told."""
        # Imported here: Triton may be missing.
        from moa_lab.serving.paged_kernels import PagedKernels

        return PagedKernels(*self._kernels_of)

    def write(self, pool: PagePool, key: torch.Tensor, value: torch.Tensor, step: Step) -> None:
        """Write the new tokens: key, value (tokens, kv_heads, head_dim)."""
        buckets, at = step.buckets[step.rows], step.positions[:, None]
        sinks, rings = self._sinks[buckets], self._rings[buckets]
        # Skip tokens that later ones would overwrite: the order of writes to one slot is undefined.
        kept = (at < sinks) | (at >= step.lengths[step.rows][:, None] - rings)
        slots = torch.where(at < sinks, at, sinks + (at - sinks).remainder(rings))
        columns = self._steps[buckets[:, None], slots // self.page_tokens] + self._ranks[buckets]
        pages = step.table[step.rows[:, None], columns][kept].long()
        slots = slots[kept] % self.page_tokens
        for part, given in enumerate((key, value)):
            pool.write(part, pages, slots, given[kept])

    def alike(self, buckets: torch.Tensor, lengths: torch.Tensor) -> Iterator[tuple[torch.Tensor, int]]:
        """Heads that hold as many pages of the longest of their sequences, of `lengths` (rows,), and this number."""
        counts = lengths[:, None].clamp(max=self._slots[buckets]).amax(dim=0)
        most = (-(-counts // self.page_tokens)).tolist()
        for pages in sorted(set(most)):
            yield torch.tensor([head for head, count in enumerate(most) if count == pages], device=lengths.device), pages

    def held(
        self, pool: PagePool, heads: torch.Tensor, most: int, table: torch.Tensor, buckets: torch.Tensor, lengths: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What `heads` (h,) hold of sequences of `lengths` (rows,), in up to `most` pages each: K and V (rows, h, slots, head_dim), and the
        position of the token in each slot, -1 for an empty one: int64 (rows, h, slots). Empty slots come back as 0."""
        of_head = buckets[:, None], heads
        counts = lengths[:, None].clamp(max=self._slots[of_head])
        has = torch.arange(most, device=table.device) * self.page_tokens < counts[..., None]
        columns = (self._steps[buckets, :most][:, None] + self._ranks[of_head][..., None]).clamp(max=table.shape[1] - 1)
        pages = torch.where(has, table.gather(1, columns.flatten(1)).view(has.shape), 0).long()
        # What another request left in the last page may be NaN, which no mask hides.
        last = (counts - 1) // self.page_tokens
        left = torch.arange(self.page_tokens, device=table.device) >= (counts - last * self.page_tokens)[..., None]
        key, value = (_read(pool, part, pages, last, left) for part in (0, 1))
        return key, value, self._positions(of_head, most * self.page_tokens, lengths)

    def shown(self, heads: torch.Tensor, buckets: torch.Tensor, asked: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        """Whether `heads` (h,) at positions `asked` see those `known`, both (rows, h or 1, ...) of one rank; -1 is nobody."""
        windows = self._windows[buckets[:, None], heads]
        found = visible(asked, known, self.sink_tokens, windows.view(*windows.shape, *[1] * (known.dim() - 2))) & (known >= 0)
        return found if self.reach is None else found & (asked - known < self.reach)

    def _positions(self, of_head: tuple[torch.Tensor, torch.Tensor], count: int, lengths: torch.Tensor) -> torch.Tensor:
        """As `RingLayer.positions`, of the first `count` slots of heads."""
        sinks, rings, slots = (x[of_head][..., None] for x in (self._sinks, self._rings, self._slots))
        slot = torch.arange(count, device=lengths.device)
        newest = lengths[:, None, None] - 1
        turns = torch.div(newest - slot, rings, rounding_mode="floor").clamp(min=0)
        found = torch.where(slot < sinks, slot, slot + turns * rings)
        return torch.where((slot <= newest) & (slot < slots), found, -1)


def _read(pool: PagePool, part: int, pages: torch.Tensor, last: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
    """K (part 0) or V (1) of `pages` (rows, h, pages): (rows, h, slots, head_dim). left: bool (rows, h, page_tokens), empty slots of each
    head's `last` page."""
    found = pool.read(part, pages)
    where = last[..., None, None, None].expand(*last.shape, 1, *found.shape[-2:])
    found.scatter_(2, where, found.gather(2, where).masked_fill(left[:, :, None, :, None], 0))
    return found.flatten(2, 3)


def paged_attention(
    layer: PagedLayer, pool: PagePool, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, step: Step, scoring: Scoring
) -> torch.Tensor:
    """Attention of the new tokens to what their heads hold and to one another: (tokens, query_heads, head_dim). They are kept from here on.

    query: (tokens, query_heads, head_dim); key, value: (tokens, kv_heads, head_dim). A token is seen as it is stored.
    """
    if pool.is_untouched and kernel_applies(query, key, value):
        return layer.kernels.attend(pool.numbers, query, key, value, step, scoring)
    output = torch.empty_like(query)
    # Before they are written: in a full ring they take the place of tokens that the first of them still see.
    for row in step.several:
        part = slice(*step.told[0][row : row + 2])
        output[part] = _chunk(layer, pool, query[part], key[part], value[part], step, row, scoring)
    layer.write(pool, key, value, step)
    if len(step.single):
        rows = step.single
        tokens = step.firsts[rows]
        output[tokens] = _newest(layer, pool, query[tokens], step.table[rows], step.buckets[rows], step.lengths[rows], scoring)
    return output


def _chunk(
    layer: PagedLayer, pool: PagePool, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    step: Step, row: int, scoring: Scoring,
) -> torch.Tensor:  # fmt: skip
    """Of one row's new tokens, which are not yet written."""
    this = slice(row, row + 1)
    buckets, past = step.buckets[this], step.lengths[this] - len(query)
    new = past + torch.arange(len(query), device=query.device)
    kv_heads, group = key.shape[1], query.shape[1] // key.shape[1]
    # (1, kv_heads, tokens, head_dim)
    given_key, given_value = heads_as_stored(key.transpose(0, 1)[None], value.transpose(0, 1)[None], [pool.bits] * kv_heads)
    output = torch.empty_like(query)
    for heads, most in layer.alike(buckets, past):
        seen_key, seen_value, positions = given_key[:, heads], given_value[:, heads], new.expand(1, len(heads), -1)
        if most:
            held_key, held_value, held = layer.held(pool, heads, most, step.table[this], buckets, past)
            seen_key, seen_value = torch.cat([held_key, seen_key], dim=2), torch.cat([held_value, seen_value], dim=2)
            positions = torch.cat([held, positions], dim=2)
        shown = layer.shown(heads, buckets, new[None, None, :, None], positions[:, :, None])
        asking = _query_heads(heads, group)
        sinks = None if scoring.sink_logits is None else scoring.sink_logits[asking]
        found = masked_attention(
            query[:, asking].transpose(0, 1)[None], seen_key, seen_value,
            shown.repeat_interleave(group, dim=1), scoring.scale, scoring.softcap, sinks,
        )  # fmt: skip
        output[:, asking] = found[0].transpose(0, 1)
    return output


def _newest(
    layer: PagedLayer, pool: PagePool, query: torch.Tensor, table: torch.Tensor, buckets: torch.Tensor, lengths: torch.Tensor,
    scoring: Scoring,
) -> torch.Tensor:  # fmt: skip
    """Of one new token a row, already written: query (rows, query_heads, head_dim)."""
    output = torch.empty_like(query)
    group = query.shape[1] // layer.kv_heads
    for heads, most in layer.alike(buckets, lengths):
        key, value, positions = layer.held(pool, heads, most, table, buckets, lengths)
        shown = layer.shown(heads, buckets, lengths[:, None, None] - 1, positions)
        asking = _query_heads(heads, group)
        # The query heads of a KV head take the place of its query tokens.
        sinks = None if scoring.sink_logits is None else scoring.sink_logits[asking].view(len(heads), group, 1)
        asked = query[:, asking].unflatten(1, (len(heads), group))
        found = masked_attention(asked, key, value, shown[:, :, None], scoring.scale, scoring.softcap, sinks)
        output[:, asking] = found.flatten(1, 2)
    return output


def _query_heads(heads: torch.Tensor, group: int) -> torch.Tensor:
    """The query heads of KV heads, in their order."""
    return (heads[:, None] * group + torch.arange(group, device=heads.device)).flatten()
