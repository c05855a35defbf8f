"""Rows that come to a cache in turn: groups of a batch, one after another, into rings of all rows."""

from __future__ import annotations

from collections.abc import Callable

import torch

from moa_lab.cache import RingLayer


class Turns:
    """The turns of a batch of `batch` rows. rows: whose turn it is; rings: of all rows, every layer's."""

    def __init__(self, batch: int) -> None:
        self.batch, self.rows = batch, slice(0, 0)
        self.rings: list[RingLayer] = []
        self._held: list[tuple[torch.Tensor, ...]] = []

    def ring(self, layer: int, make: Callable[[int], RingLayer]) -> RingLayer:
        """The layer's ring of the rows whose turn it is. make: a ring of so many rows, asked for once."""
        if len(self.rings) == layer:
            self.rings.append(make(self.batch))
        return self.rings[layer].of_rows(self.rows)

    def end(self, *counted: torch.Tensor) -> None:
        """Note what the cache counted of the rows whose turn ends, each (rows,)."""
        self._held.append(counted)

    def all(self) -> tuple[torch.Tensor, ...]:
        """What was noted, of all rows that had their turn."""
        return tuple(torch.cat(parts) for parts in zip(*self._held, strict=True))
