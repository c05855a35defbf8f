"""Which slots of a layer's buffer hold the tokens of each KV head."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from moa_lab.plan import Plan

LONGEST = 2**30
"""Tokens, beyond any sequence: sums of so many with a position stay within 32 bits."""


@dataclass(frozen=True)
class LayerLayout:
    """Slots of a flat buffer, one KV head after the other: first the sink, which stays, then a ring for the window.

    sink_tokens, windows: what queries see, per KV head (see `moa_lab.masks.visible`). reach: the model's own window in this layer
    (None: unlimited), beyond which nothing is seen, not even the sink. capacity: tokens per sequence that must fit; a head with a
    longer span gets `capacity` slots, none of which is overwritten.

    A token's slot depends only on its position in the sequence, so nothing moves when a ring wraps.
    """

    sink_tokens: int
    windows: tuple[int, ...]
    reach: int | None
    capacity: int

    def __post_init__(self) -> None:
        if self.capacity < 1 or self.sink_tokens < 0 or not self.windows or min(self.windows) < 1:
            raise ValueError(f"a layout needs windows and a capacity of at least 1 token, got {self.windows} and {self.capacity}")

    @cached_property
    def sinks(self) -> np.ndarray:
        """Slots of the sink: int64 (kv_heads,). 0 where sink and window exceed `reach`: then the ring alone holds all that is seen."""
        if self.reach is None:
            return np.full(len(self.windows), self.sink_tokens)
        return np.where(self.sink_tokens + np.array(self.windows) > self.reach, 0, self.sink_tokens)

    @cached_property
    def rings(self) -> np.ndarray:
        """Slots that each ring needs, not limited by `capacity`: int64 (kv_heads,)."""
        windows = np.array(self.windows)
        return windows if self.reach is None else np.where(self.sink_tokens + windows > self.reach, self.reach, windows)

    @cached_property
    def slots(self) -> np.ndarray:
        """Slots per head: int64 (kv_heads,)."""
        return np.minimum(self.sinks + self.rings, self.capacity)

    @cached_property
    def starts(self) -> np.ndarray:
        """First slot of every head, then the total: int64 (kv_heads + 1,)."""
        return np.concatenate([[0], np.cumsum(self.slots)])

    @property
    def total(self) -> int:
        """Slots of all heads."""
        return int(self.starts[-1])

    def table(self) -> np.ndarray:
        """What a kernel needs to know of every head: int32 (kv_heads, 4): first slot, sink, ring, window."""
        rings, windows = (np.minimum(tokens, LONGEST) for tokens in (self.rings, self.windows))
        return np.stack([self.starts[:-1], self.sinks, rings, windows], axis=1).astype(np.int32)


def layer_layouts(plan: Plan, n_tokens: int, capacity: int | None = None) -> list[LayerLayout]:
    """The layout of every layer under `plan` at length N = `n_tokens`, with room for `capacity` tokens (None: N)."""
    reaches = plan.geometry.layer_windows
    return [
        LayerLayout(plan.sink_tokens, tuple(row.tolist()), reach, capacity or n_tokens)
        for row, reach in zip(plan.windows(n_tokens), reaches, strict=True)
    ]
