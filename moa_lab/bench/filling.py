"""Random keys and values in rings, where only their number matters and not where they came from."""

from __future__ import annotations

import torch

from moa_lab.cache import PackedRing, RingLayer
from moa_lab.plan import UNTOUCHED

REACH = (1.5, 2.0)
"""A vector of codes is on a grid from -a to a with a drawn from here: its numbers are about as large as normal ones."""


def fill_ring(ring: RingLayer, generator: torch.Generator | None = None) -> None:
    """Fill all slots: with normal numbers and, where heads are stored in fewer bits, with random codes, each vector on a grid of its own.

    generator: on the ring's device; None: torch's own.
    """
    if not isinstance(ring, PackedRing):
        ring.keys.normal_(generator=generator)
        ring.values.normal_(generator=generator)
        return
    for head, pair in enumerate(ring.bits):
        for part, bits in enumerate(pair):
            held = ring.views(head, part)
            if bits == UNTOUCHED:
                held["plain"].normal_(generator=generator)
                continue
            # Any word is a word of codes.
            held["codes"].random_(-(2**31), 2**31, generator=generator)
            reach = torch.empty(held["grids"].shape, device=held["grids"].device).uniform_(*REACH, generator=generator)
            grids = torch.cat([-reach, 2 * reach / (2**bits - 1)], dim=-1)
            held["grids"].copy_(grids.half().view(torch.int32))
