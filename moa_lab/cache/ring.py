"""Keys and values of one layer in a ring cache, written and read by token position."""

from __future__ import annotations

from dataclasses import replace

import torch

from moa_lab.cache.layout import LayerLayout, layer_layouts
from moa_lab.plan import Plan


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
    def allocated_bytes(self) -> int:
        """Bytes that K and V hold."""
        return self.keys.nbytes + self.values.nbytes

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
        tokens = key.shape[2]
        column = torch.arange(tokens, device=key.device)
        positions = lengths[:, None].long() - tokens + column
        _, sinks, rings, _ = self.table.long().unbind(dim=1)
        at = positions[..., None]
        # Skip tokens that later ones would overwrite: the order of writes to one slot is undefined.
        kept = (column >= padding[:, None])[..., None] & ((at < sinks) | (at >= lengths[:, None, None] - rings))
        batch = torch.arange(len(key), device=key.device)[:, None, None].expand_as(kept)[kept]
        slots = self.slots_of(positions)[kept]
        self.keys[batch, slots] = key.transpose(1, 2)[kept]
        self.values[batch, slots] = value.transpose(1, 2)[kept]

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
        self.layout = new
        self.table = torch.from_numpy(new.table()).to(self.keys.device)

    def select(self, rows: torch.Tensor) -> None:
        """Keep, drop, repeat or reorder rows: int64 indices."""
        self.keys, self.values = (x.index_select(0, rows.to(x.device)) for x in (self.keys, self.values))


def allocated_kv_bytes(plan: Plan, n_tokens: int, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu") -> int:
    """Bytes that the K and V of one sequence of `n_tokens` take under `plan`, found by allocating them, a layer at a time."""
    head_dim = plan.geometry.head_dim
    return sum(RingLayer(layout, 1, head_dim, dtype, torch.device(device)).allocated_bytes for layout in layer_layouts(plan, n_tokens))
