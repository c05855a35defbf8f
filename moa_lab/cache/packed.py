"""Keys and values of one layer in a ring cache that stores some of its heads in 8 or 4 bits."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch

from moa_lab.cache.layout import LayerLayout
from moa_lab.cache.ring import RingLayer
from moa_lab.cache.storage import pack, places, unpack, values_at
from moa_lab.plan.bits import UNTOUCHED, Bits, code_words

Buffers = dict[str, torch.Tensor]
"""Flat, by kind, (batch, size) each: numbers of untouched vectors ("plain"), 32-bit words of packed places ("codes"), and "grids", a
word each: the bits of the smallest value, a float16, are the lower half."""

Side = tuple[int, int]
"""A head, and 0 for its K or 1 for its V."""
Place = dict[str, tuple[int, int, int]]
"""Of one side in the buffer of each of its kinds: first element, slots, and elements of a slot."""


class PackedRing(RingLayer):
    """As `RingLayer`, with `bits` of K and V for every KV head. The K of a head, then its V, lie slot by slot in the buffer of their kind,
    one head after the other.

    table: as `LayerLayout.table`, on the device. sides: what a kernel needs to know beside it, of every head's K and V, int64 (kv_heads,
    2, 3): bits, first number or word of codes, and first grid. widths: bits of K and V by turns, of every pair that heads have.
    """

    def __init__(
        self, layout: LayerLayout, batch: int, head_dim: int, dtype: torch.dtype, device: torch.device, bits: Sequence[Bits]
    ) -> None:
        self.bits = tuple(bits)
        self.widths = [width for pair in sorted(set(self.bits)) for width in pair]
        self._head_dim, self._dtypes = head_dim, {"plain": dtype, "codes": torch.int32, "grids": torch.int32}
        self.layout, self.table = layout, torch.from_numpy(layout.table()).to(device)
        self._places = self._placed(layout)
        self.sides = self._sides()
        self.buffers = self._empty(self._places, batch)

    @property
    def sample(self) -> torch.Tensor:
        """Empty, of the dtype and on the device of what is read from here: (batch, 0, head_dim)."""
        return self.buffers["plain"][:, :0, None].expand(-1, -1, self._head_dim)

    @property
    def stored_bits(self) -> tuple[Bits, ...]:
        """As `bits`."""
        return self.bits

    @property
    def most_bits(self) -> int:
        """The most bits that a head's K or V has."""
        return max(self.widths)

    @property
    def allocated_bytes(self) -> int:
        """Bytes that K and V hold, grids included."""
        return sum(buffer.nbytes for buffer in self.buffers.values())

    def held(self, head: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of one KV head, all its slots, dequantised: (batch, slots, head_dim) each."""
        key, value = (self._read(self.views(head, part), self.bits[head][part]) for part in range(2))
        return key, value

    def views(self, head: int, part: int) -> Buffers:
        """What is stored of one head's K (part 0) or V (1), by kind: (batch, slots, elements)."""
        return _views(self._places[head, part], self.buffers)

    def in_float32(self) -> PackedRing:
        """As `RingLayer.in_float32`: what codes stand for is not rounded, and the codes themselves are shared."""
        exact = copy.copy(self)
        exact._dtypes = {**self._dtypes, "plain": torch.float32}
        exact.buffers = {**self.buffers, "plain": self.buffers["plain"].float()}
        return exact

    def of_rows(self, rows: slice) -> PackedRing:
        """As `RingLayer.of_rows`."""
        part = copy.copy(self)
        part.buffers = {kind: buffer[rows] for kind, buffer in self.buffers.items()}
        return part

    def write(self, key: torch.Tensor, value: torch.Tensor, lengths: torch.Tensor, padding: torch.Tensor) -> None:
        """Write the newest tokens, quantised; as `RingLayer.write`."""
        kept, slots = self._written(key.shape[2], lengths, padding)
        for head in range(len(self.bits)):
            rows, columns = kept[..., head].nonzero(as_tuple=True)
            at = slots[rows, columns, head] - int(self.layout.starts[head])
            for part, given in enumerate((key, value)):
                self._store(self.views(head, part), self.bits[head][part], rows, at, given[rows, head, columns])

    def grow(self, capacity: int) -> None:
        """Make room for sequences of `capacity` tokens; heads that keep less stay as they are."""
        new = replace(self.layout, capacity=capacity)
        if new.total > self.layout.total:
            places = self._placed(new)
            buffers = self._empty(places, len(next(iter(self.buffers.values()))))
            for side, place in self._places.items():
                after = _views(places[side], buffers)
                # A head that lacked room has not wrapped: its slots are its positions, also in the wider ring.
                for kind, old in _views(place, self.buffers).items():
                    after[kind][:, : old.shape[1]] = old
            self._places, self.buffers = places, buffers
            self.sides = self._sides()
        self._lay_out(new)

    def select(self, rows: torch.Tensor) -> None:
        """Keep, drop, repeat or reorder rows: int64 indices."""
        self.buffers = {kind: buffer.index_select(0, rows.to(buffer.device)) for kind, buffer in self.buffers.items()}

    def _placed(self, layout: LayerLayout) -> dict[Side, Place]:
        """Where every head's K and V lie."""
        ends = dict.fromkeys(self._dtypes, 0)
        found: dict[Side, Place] = {}
        for head, (slots, widths) in enumerate(zip(layout.slots.tolist(), self.bits, strict=True)):
            for part, bits in enumerate(widths):
                packed = {"codes": code_words(self._head_dim, bits), "grids": 1}
                found[head, part] = {}
                for kind, count in ({"plain": self._head_dim} if bits == UNTOUCHED else packed).items():
                    found[head, part][kind] = (ends[kind], slots, count)
                    ends[kind] += slots * count
        return found

    def _sides(self) -> torch.Tensor:
        # One tensor from lists: a tensor for every head would take most of a slider's move.
        return torch.tensor(
            [[self._side(bits, self._places[head, part]) for part, bits in enumerate(widths)] for head, widths in enumerate(self.bits)],
            dtype=torch.int64, device=self.table.device,
        )  # fmt: skip

    @staticmethod
    def _side(bits: int, place: Place) -> list[int]:
        return [bits, place["plain" if bits == UNTOUCHED else "codes"][0], place["grids"][0] if "grids" in place else 0]

    def _empty(self, places: dict[Side, Place], batch: int) -> Buffers:
        sizes = dict.fromkeys(self._dtypes, 0)
        for place in places.values():
            for kind, (start, slots, count) in place.items():
                sizes[kind] = start + slots * count
        return {kind: torch.zeros(batch, size, dtype=self._dtypes[kind], device=self.table.device) for kind, size in sizes.items()}

    def _read(self, held: Buffers, bits: int) -> torch.Tensor:
        if bits == UNTOUCHED:
            return held["plain"]
        low, step = held["grids"].contiguous().view(torch.float16).split(1, dim=-1)
        return values_at(unpack(held["codes"], bits, self._head_dim), low, step, self._dtypes["plain"])

    def _store(self, held: Buffers, bits: int, rows: torch.Tensor, at: torch.Tensor, values: torch.Tensor) -> None:
        """values: (tokens, head_dim), each to a row and a slot."""
        if bits == UNTOUCHED:
            held["plain"][rows, at] = values
            return
        where, low, step = places(values, bits)
        held["codes"][rows, at] = pack(where, bits)
        held["grids"][rows, at] = torch.cat([low, step], dim=-1).view(torch.int32)


def _views(place: Place, buffers: Buffers) -> Buffers:
    """One side in the buffers, by kind: (batch, slots, elements)."""
    return {
        kind: buffers[kind][:, start : start + slots * count].unflatten(1, (slots, count)) for kind, (start, slots, count) in place.items()
    }
