"""Keys and values of one layer in a ring cache that stores some of its heads in 8 or 4 bits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from moa_lab.cache.layout import LayerLayout
from moa_lab.cache.ring import RingLayer
from moa_lab.cache.storage import heads_as_stored, pack, places, unpack, values_at
from moa_lab.plan.bits import UNTOUCHED, Bits, code_bytes

Buffers = dict[str, torch.Tensor]
"""Flat, by kind: numbers of untouched vectors, packed places, and grids; (batch, size) each."""


class PackedRing(RingLayer):
    """As `RingLayer`, with `bits` of K and V for every KV head. The K of a head, then its V, lie slot by slot in the buffer of their kind,
    one head after the other; no byte is spare."""

    def __init__(
        self, layout: LayerLayout, batch: int, head_dim: int, dtype: torch.dtype, device: torch.device, bits: Sequence[Bits]
    ) -> None:
        self.bits = tuple(bits)
        self._head_dim, self._dtypes = head_dim, {"plain": dtype, "codes": torch.uint8, "grids": torch.float16}
        self.layout, self.table = layout, torch.from_numpy(layout.table()).to(device)
        self.buffers = self._empty(layout, batch)

    @property
    def allocated_bytes(self) -> int:
        """Bytes that K and V hold, grids included."""
        return sum(buffer.nbytes for buffer in self.buffers.values())

    def held(self, head: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of one KV head, all its slots, dequantised: (batch, slots, head_dim) each."""
        key, value = (self._read(self._views(self.layout, self.buffers)[head, part], self.bits[head][part]) for part in range(2))
        return key, value

    def as_stored(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V (batch, kv_heads, tokens, head_dim) as they will come back from here."""
        return heads_as_stored(key, value, self.bits)

    def write(self, key: torch.Tensor, value: torch.Tensor, lengths: torch.Tensor, padding: torch.Tensor) -> None:
        """Write the newest tokens, quantised; as `RingLayer.write`."""
        kept, slots = self._written(key.shape[2], lengths, padding)
        views = self._views(self.layout, self.buffers)
        for head in range(len(self.bits)):
            rows, columns = kept[..., head].nonzero(as_tuple=True)
            at = slots[rows, columns, head] - int(self.layout.starts[head])
            for part, given in enumerate((key, value)):
                self._store(views[head, part], self.bits[head][part], rows, at, given[rows, head, columns])

    def grow(self, capacity: int) -> None:
        """Make room for sequences of `capacity` tokens; heads that keep less stay as they are."""
        new = replace(self.layout, capacity=capacity)
        if new.total > self.layout.total:
            buffers = self._empty(new, len(next(iter(self.buffers.values()))))
            before, after = self._views(self.layout, self.buffers), self._views(new, buffers)
            for side, held in before.items():
                # A head that lacked room has not wrapped: its slots are its positions, also in the wider ring.
                for kind, old in held.items():
                    after[side][kind][:, : old.shape[1]] = old
            self.buffers = buffers
        self._lay_out(new)

    def select(self, rows: torch.Tensor) -> None:
        """Keep, drop, repeat or reorder rows: int64 indices."""
        self.buffers = {kind: buffer.index_select(0, rows.to(buffer.device)) for kind, buffer in self.buffers.items()}

    def _sides(self, layout: LayerLayout) -> Iterator[tuple[tuple[int, int], int, dict[str, int]]]:
        """Of every head's K and V: (head, part), slots, and elements of a slot by kind."""
        for head, (slots, widths) in enumerate(zip(layout.slots.tolist(), self.bits, strict=True)):
            for part, bits in enumerate(widths):
                packed = {"codes": code_bytes(self._head_dim, bits), "grids": 2}
                yield (head, part), slots, {"plain": self._head_dim} if bits == UNTOUCHED else packed

    def _empty(self, layout: LayerLayout, batch: int) -> Buffers:
        sizes = dict.fromkeys(self._dtypes, 0)
        for _, slots, elements in self._sides(layout):
            for kind, count in elements.items():
                sizes[kind] += slots * count
        return {kind: torch.zeros(batch, size, dtype=self._dtypes[kind], device=self.table.device) for kind, size in sizes.items()}

    def _views(self, layout: LayerLayout, buffers: Buffers) -> dict[tuple[int, int], Buffers]:
        """Every head's K and V in the buffers, by kind: (batch, slots, elements)."""
        ends = dict.fromkeys(buffers, 0)
        views: dict[tuple[int, int], Buffers] = {}
        for side, slots, elements in self._sides(layout):
            views[side] = {}
            for kind, count in elements.items():
                start, ends[kind] = ends[kind], ends[kind] + slots * count
                views[side][kind] = buffers[kind][:, start : ends[kind]].unflatten(1, (slots, count))
        return views

    def _read(self, held: Buffers, bits: int) -> torch.Tensor:
        if bits == UNTOUCHED:
            return held["plain"]
        low, step = held["grids"].split(1, dim=-1)
        return values_at(unpack(held["codes"], bits, self._head_dim), low, step, self._dtypes["plain"])

    def _store(self, held: Buffers, bits: int, rows: torch.Tensor, at: torch.Tensor, values: torch.Tensor) -> None:
        """values: (tokens, head_dim), each to a row and a slot."""
        if bits == UNTOUCHED:
            held["plain"][rows, at] = values
            return
        where, low, step = places(values, bits)
        held["codes"][rows, at] = pack(where, bits)
        held["grids"][rows, at] = torch.cat([low, step], dim=-1)
