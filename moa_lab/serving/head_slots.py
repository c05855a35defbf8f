"""Where the tokens of a pass go in the pages of every head, and what its rows hold: worked out once a pass, for all layers together."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch

from moa_lab.masks import visible
from moa_lab.serving.page_layout import LayerPages
from moa_lab.serving.step import Step


class HeadSlots:
    """The slots of heads of one kind, as many in every layer: int64 (layers, buckets, kv_heads) each, but steps, (buckets, steps + 1)."""

    def __init__(self, layers: Sequence[LayerPages], device: torch.device) -> None:
        layouts = [pages.layouts for pages in layers]
        self.page_tokens, self.sink_tokens = layers[0].page_tokens, layouts[0][0].sink_tokens
        self.slots, self.sinks, self.rings, self.windows = (
            torch.from_numpy(np.array([[getattr(each, name) for each in row] for row in layouts])).to(device)
            for name in ("slots", "sinks", "rings", "windows")
        )
        self.ranks = torch.from_numpy(np.stack([pages.ranks for pages in layers])).to(device)
        self.steps = torch.from_numpy(layers[0].steps).to(device)
        self.reaches = [row[0].reach for row in layouts]

    def of_pass(self, step: Step) -> PassSlots:
        """What was worked out for this pass already, or is now."""
        found = step.worked_out.get(self)
        if found is None:
            found = step.worked_out[self] = PassSlots(self, step)
        assert isinstance(found, PassSlots)
        return found


class HeldSlots:
    """What heads hold of sequences, in `most` pages at most.

    pages: (layers, rows, kv_heads, most), 0 where there is none. positions: of the token in each slot, -1 for an empty one: int64 (layers,
    rows, kv_heads, slots). alike: of every layer, heads that hold as many pages of the longest sequence, by that number.
    """

    def __init__(self, heads: HeadSlots, table: torch.Tensor, buckets: torch.Tensor, lengths: torch.Tensor) -> None:
        slots, sinks, rings = (x[:, buckets] for x in (heads.slots, heads.sinks, heads.rings))
        counts = lengths[:, None].clamp(max=slots)
        counted = (-(-counts.amax(dim=1) // heads.page_tokens)).tolist()
        self.alike = [{pages: [head for head, count in enumerate(row) if count == pages] for pages in sorted(set(row))} for row in counted]
        most = max(map(max, counted))
        has = torch.arange(most, device=table.device) * heads.page_tokens < counts[..., None]
        columns = (heads.steps[buckets, :most][:, None] + heads.ranks[:, buckets][..., None]).clamp(max=table.shape[1] - 1)
        rows = torch.arange(len(table), device=table.device)[:, None, None]
        self.pages = torch.where(has, table[rows, columns], 0).long()
        slot = torch.arange(most * heads.page_tokens, device=table.device)
        newest = lengths[:, None, None] - 1
        # As `RingLayer.positions`.
        turns = torch.div(newest - slot, rings[..., None], rounding_mode="floor").clamp(min=0)
        found = torch.where(slot < sinks[..., None], slot, slot + turns * rings[..., None])
        self.positions = torch.where((slot <= newest) & (slot < slots[..., None]), found, -1)


class PassSlots:
    """Of one pass. Where its new tokens are written, and what its rows of one new token hold with it."""

    def __init__(self, heads: HeadSlots, step: Step) -> None:
        self._heads, self._step = heads, step

    @cached_property
    def written(self) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor | None]]:
        """Of every layer: pages and slots of what is written, int64 (written,), and which of the new tokens' heads these are, bool (tokens,
        kv_heads); None for all."""
        heads, step = self._heads, self._step
        buckets, at, rows = step.buckets[step.rows], step.positions[:, None], step.rows[:, None]
        sinks, rings = heads.sinks[:, buckets], heads.rings[:, buckets]
        # Skip tokens that later ones would overwrite: the order of writes to one slot is undefined.
        kept = (at < sinks) | (at >= step.lengths[rows] - rings)
        slots = torch.where(at < sinks, at, sinks + (at - sinks).remainder(rings))
        pages = step.table[rows, heads.steps[buckets[:, None], slots // heads.page_tokens] + heads.ranks[:, buckets]].long()
        slots = slots % heads.page_tokens
        whole = kept.flatten(1).all(dim=1).tolist()
        masks = [None if all_of_it else mask for all_of_it, mask in zip(whole, kept, strict=True)]
        chosen = [[x.flatten() if mask is None else x[mask] for x, mask in zip(each, masks, strict=True)] for each in (pages, slots)]
        return chosen[0], chosen[1], masks

    @cached_property
    def held(self) -> HeldSlots:
        """By the rows of one new token, which is written."""
        step = self._step
        return HeldSlots(self._heads, step.table[step.single], step.buckets[step.single], step.lengths[step.single])

    @cached_property
    def shown(self) -> torch.Tensor:
        """Which slots the new token of each of these rows sees: bool (layers, rows, kv_heads, slots)."""
        heads, step = self._heads, self._step
        newest = step.lengths[step.single][:, None, None] - 1
        known = self.held.positions
        found = visible(newest, known, heads.sink_tokens, heads.windows[:, step.buckets[step.single]][..., None]) & (known >= 0)
        for layer, reach in enumerate(heads.reaches):
            if reach is not None:
                found[layer] &= newest - known[layer] < reach
        return found

    @cached_property
    def empty(self) -> torch.Tensor:
        """Slots that hold nothing: bool (layers, rows, kv_heads, slots, 1)."""
        return (self.held.positions < 0)[..., None]

    def past(self, row: int) -> HeldSlots | None:
        """By a row of several new tokens, before they are written; None where it has none yet."""
        firsts, lengths = self._step.told
        before = lengths[row] - (firsts[row + 1] - firsts[row])
        if not before:
            return None
        if row not in self._pasts:
            this = slice(row, row + 1)
            length = torch.tensor([before], device=self._step.lengths.device)
            self._pasts[row] = HeldSlots(self._heads, self._step.table[this], self._step.buckets[this], length)
        return self._pasts[row]

    @cached_property
    def _pasts(self) -> dict[int, HeldSlots]:
        return {}
