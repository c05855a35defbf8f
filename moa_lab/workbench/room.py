"""How wide figures may be in the room that a panel has on the page."""

from __future__ import annotations

from moa_lab.workbench.canvas import WIDE

EDGES, GAP = 48, 12
"""Pixels around what is in a tab, and between figures that stand side by side."""
NARROWEST, WIDEST = 360, 760
"""Pixels below which figures stand below each other, and beyond which one of several grows no further."""


def room(width: int) -> int:
    """Pixels for what is in a tab of a workbench of `width` pixels; 0, not known yet: a small laptop's."""
    return max(width - EDGES, 320) if width else WIDE


def columns(free: int, count: int = 2, narrowest: int = NARROWEST, widest: int = WIDEST) -> int:
    """Pixels of each of `count` figures in `free` pixels: side by side as many as fit, equally wide, and none narrower than `narrowest`
    but where there is less room."""
    beside = min(count, max((free + GAP) // (narrowest + GAP), 1))
    each = (free - GAP * (beside - 1)) // beside
    return each if beside == 1 else min(each, widest)
