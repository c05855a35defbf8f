"""Which program reads what in a decode step: the tiles of all heads and rows, divided into equal runs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch


@dataclass(frozen=True)
class DecodeSchedule:
    """Work for `decode_attention`, made once for a batch and a layout and shared by all layers with that layout.

    segments: int32 (n, 4): row, KV head, first slot and slot after the last, counted within the head. A segment lies within one head
    of one row; those of a row and head are consecutive. bounds: int32 (programs + 1,), first segment of every program.
    firsts: int32 (batch * kv_heads + 1,), first segment of every row and head. tile: slots that a program reads at once.

    One program per head would leave programs idle where spans differ: here every program takes an equal run of tiles, across heads
    (the idea of stream-K: Osama et al., 2023).
    """

    segments: torch.Tensor
    bounds: torch.Tensor
    firsts: torch.Tensor
    tile: int

    @property
    def programs(self) -> int:
        """Number of programs."""
        return len(self.bounds) - 1


def decode_schedule(slots: np.ndarray, batch: int, tile: int, programs: int, device: torch.device) -> DecodeSchedule:
    """Divide `batch` rows of heads with `slots` slots each, int (kv_heads,), among at most `programs` programs."""
    tiles = np.tile(-(-np.asarray(slots) // tile), batch)
    ends = np.cumsum(tiles)
    total = int(ends[-1])
    programs = max(1, min(programs, total))
    # A segment begins where a program's share of the tiles begins, or a head of a row.
    shares = total * np.arange(1, programs) // programs
    cuts = np.unique(np.concatenate([[0], shares, ends]))
    begins, stops = cuts[:-1], cuts[1:]
    owner = np.searchsorted(ends, begins, side="right")
    before = ends[owner] - tiles[owner]
    row, head = np.divmod(owner, len(slots))
    last = np.minimum((stops - before) * tile, np.asarray(slots)[head])
    segments = np.stack([row, head, (begins - before) * tile, last], axis=1)
    bounds = np.concatenate([np.searchsorted(begins, [0, *shares]), [len(begins)]])
    firsts = np.searchsorted(owner, np.arange(len(tiles) + 1))
    on_device = [torch.from_numpy(x.astype(np.int32)).to(device) for x in (segments, bounds, firsts)]
    return DecodeSchedule(on_device[0], on_device[1], on_device[2], tile)


@cache
def cores_of(device: torch.device) -> int:
    """Number of streaming multiprocessors; few in the interpreter, so that tests are fast."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
