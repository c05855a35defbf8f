"""Keys and values of one layer in a ring cache, written and read by token position."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch

from moa_lab.cache.layout import LayerLayout
from moa_lab.plan.bits import UNTOUCHED, Bits


class RingLayer:
    """One layer's flat K and V: (batch, layout.total, head_dim) each.

    Which tokens it holds follows from `lengths`, int32 (batch,): tokens of each row so far, without padding. The caller keeps it,
    since all layers share it. Slots that were never written hold arbitrary values.
    """

    def __init__(self, layout: LayerLayout, batch: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self.layout = layout
        self.keys, self.values = (torch.zeros(batch, layout.total, head_dim, dtype=dtype, device=device) for _ in range(2))
        self.table = torch.from_numpy(layout.table()).to(device)

    @property
    def sample(self) -> torch.Tensor:
        """Empty, of the dtype and on the device of what is read from here: (batch, 0, head_dim)."""
        return self.keys[:, :0]

    @property
    def stored_bits(self) -> tuple[Bits, ...] | None:
        """Of every KV head's K and V; None: they are stored as they come."""
        return None

    @property
    def most_bits(self) -> int:
        """The most bits that a head's K or V has."""
        return UNTOUCHED

    @property
    def allocated_bytes(self) -> int:
        """Bytes that K and V hold."""
        return self.keys.nbytes + self.values.nbytes

    def held(self, head: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of one KV head, all its slots: (batch, slots, head_dim) each."""
        part = slice(int(self.layout.starts[head]), int(self.layout.starts[head + 1]))
        return self.keys[:, part], self.values[:, part]

    def in_float32(self) -> RingLayer:
        """A ring that holds the same numbers in float32, for a reference."""
        exact = copy.copy(self)
        exact.keys, exact.values = self.keys.float(), self.values.float()
        return exact

    def of_rows(self, rows: slice) -> RingLayer:
        """A ring of some rows alone, in the same memory: what is written there is written here. It must not grow."""
        part = copy.copy(self)
        part.keys, part.values = self.keys[rows], self.values[rows]
        return part

    def positions(self, lengths: torch.Tensor) -> torch.Tensor:
        """The position of the token in each slot, -1 for an empty slot: int32 (batch, layout.total)."""
        device = lengths.device
        heads = torch.from_numpy(self.layout.slots).to(device)
        of = torch.repeat_interleave(self.table[:, 1:3], heads, dim=0, output_size=self.layout.total)
        sinks, rings = of[:, 0], of[:, 1]
        starts = torch.repeat_interleave(self.table[:, 0], heads, output_size=self.layout.total)
        slot = torch.arange(self.layout.total, device=device, dtype=torch.int32) - starts
        newest = lengths[:, None] - 1
        # In the ring: the newest position that is a whole number of turns past the slot's first one.
        turns = torch.div(newest - slot, rings, rounding_mode="floor").clamp(min=0)
        found = torch.where(slot < sinks, slot, slot + turns * rings)
        return torch.where(slot <= newest, found, -1).to(torch.int32)

    def slots_of(self, positions: torch.Tensor) -> torch.Tensor:
        """The slot of a token in each head's part of the buffer: int64 (..., kv_heads) for `positions` (...)."""
        starts, sinks, rings, _ = self.table.long().unbind(dim=1)
        at = positions[..., None].long()
        return starts + torch.where(at < sinks, at, sinks + (at - sinks).remainder(rings))

    def write(self, key: torch.Tensor, value: torch.Tensor, lengths: torch.Tensor, padding: torch.Tensor) -> None:
        """Write the newest tokens: key, value (batch, kv_heads, tokens, head_dim).

        lengths: including the new tokens. padding: int32 (batch,), number of leading padding columns in each row.
        """
        kept, slots = self._written(key.shape[2], lengths, padding)
        batch = torch.arange(len(key), device=key.device)[:, None, None].expand_as(kept)[kept]
        self.keys[batch, slots[kept]] = key.transpose(1, 2)[kept]
        self.values[batch, slots[kept]] = value.transpose(1, 2)[kept]

    def _written(self, tokens: int, lengths: torch.Tensor, padding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Which of the newest tokens are written, and to which slots: bool and int64 (batch, tokens, kv_heads)."""
        column = torch.arange(tokens, device=lengths.device)
        positions = lengths[:, None].long() - tokens + column
        _, sinks, rings, _ = self.table.long().unbind(dim=1)
        at = positions[..., None]
        # Skip tokens that later ones would overwrite: the order of writes to one slot is undefined.
        kept = (column >= padding[:, None])[..., None] & ((at < sinks) | (at >= lengths[:, None, None] - rings))
        return kept, self.slots_of(positions)

    def grow(self, capacity: int) -> None:
        """Make room for sequences of `capacity` tokens; heads that keep less stay as they are."""
        old, new = self.layout, replace(self.layout, capacity=capacity)
        if new.total > old.total:
            for name in ("keys", "values"):
                before = getattr(self, name)
                after = before.new_zeros(before.shape[0], new.total, before.shape[2])
                # A head that lacked room has not wrapped: its slots are its positions, also in the wider ring.
                for start, target, count in zip(old.starts[:-1], new.starts[:-1], old.slots, strict=True):
                    after[:, target : target + count] = before[:, start : start + count]
                setattr(self, name, after)
        self._lay_out(new)

    def _lay_out(self, layout: LayerLayout) -> None:
        self.layout = layout
        self.table = torch.from_numpy(layout.table()).to(self.table.device)

    def select(self, rows: torch.Tensor) -> None:
        """Keep, drop, repeat or reorder rows: int64 indices."""
        self.keys, self.values = (x.index_select(0, rows.to(x.device)) for x in (self.keys, self.values))
