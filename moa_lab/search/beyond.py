"""Influence by distance at lengths that were not profiled, from the lengths that were.

Two things can happen to what a head loses with a window when the input grows. What it reads nearby stays where it is: the loss depends on
the window in tokens. What it fetches from anywhere (a fact at any depth) moves away with the length: the loss depends on the window as a
share of the length. Every task is a mixture of both; the share is fitted to how the longest profiled length follows from the one below
it, and what the fit leaves unexplained is the error that is told.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moa_lab.records import BLOCK_TOKENS

Curves = Mapping[int, np.ndarray]
"""By length: (samples, layers, query_heads, length / 64), what is lost with the keys at distances >= 64 b."""


@dataclass(frozen=True)
class Growth:
    """How influence grows with the length. moving: share of it that moves away with the length, from 0 to 1. error: of the length that
    this was fitted to, root mean square as a share of its influence; None where only one length was profiled."""

    moving: float
    error: float | None


def growth(curves: Curves, near_bins: int, windows: Sequence[int | None]) -> Growth:
    """Fitted to the two longest lengths of `curves`, beyond the first `near_bins` bins; with one length, all of it moves.

    That is the careful choice: then no span is enough because it was enough at a shorter length. windows: those of the layers
    themselves, which cannot grow and are left out.
    """
    lengths = sorted(curves)
    if len(lengths) < 2:
        return Growth(1.0, None)
    shorter, longer = lengths[-2:]
    far = [layer for layer, window in enumerate(windows) if window is None or window > longer]
    if not far:
        return Growth(0.0, None)
    # Beyond the shorter length nothing is known of what stays.
    bins = slice(near_bins, curves[shorter].shape[-1])
    found = _mean(curves[longer])[far][..., bins]
    staying, moving = (_mean(stretched(curves[shorter], shorter, longer, share))[far][..., bins] for share in (0.0, 1.0))
    total = np.sqrt((found**2).sum())
    difference = moving - staying
    scale = (difference**2).sum()
    if not total or not scale:
        return Growth(1.0, None)
    share = float(np.clip((difference * (found - staying)).sum() / scale, 0.0, 1.0))
    error = np.sqrt(((found - staying - share * difference) ** 2).sum()) / total
    return Growth(share, float(error))


def at_length(curves: Curves, length: int, moving: float, windows: Sequence[int | None]) -> np.ndarray:
    """The curve at a length that `curves` lacks, from the nearest one (by ratio), of which a share is `moving`."""
    source = nearest(curves, length)
    own = np.array([window is not None and window <= source for window in windows])
    grown, still = (stretched(curves[source], source, length, share) for share in (moving, 0.0))
    return np.where(own[None, :, None, None], still, grown)


def nearest(lengths: Iterable[int], n: int) -> int:
    """The one of `lengths` nearest to n by their ratio."""
    return min(lengths, key=lambda known: abs(np.log(known / n)))


def stretched(curve: np.ndarray, n: int, length: int, moving: float) -> np.ndarray:
    """`curve` of n tokens at another length: a share of it `moving` with the length, the rest staying at its distances."""
    starts = BLOCK_TOKENS * np.arange(-(-length // BLOCK_TOKENS), dtype=np.float64)
    return moving * lost_at(curve, starts * n / length) + (1 - moving) * lost_at(curve, starts)


def lost_at(curve: np.ndarray, windows: np.ndarray) -> np.ndarray:
    """`curve[..., b]`, which belongs to windows of 64 b tokens and is 0 beyond its end, at `windows` (interpolated linearly)."""
    ended = np.concatenate([curve, np.zeros((*curve.shape[:-1], 1))], axis=-1)
    position = np.minimum(windows / BLOCK_TOKENS, curve.shape[-1])
    below = np.minimum(position.astype(np.int64), curve.shape[-1] - 1)
    part = position - below
    return np.asarray(ended[..., below] * (1 - part) + ended[..., below + 1] * part)


def _mean(curve: np.ndarray) -> np.ndarray:
    """Mean over samples of what is lost, all heads together counting 1: (layers, query_heads, bins)."""
    lost = np.abs(curve).mean(axis=0)
    total = lost.max(axis=-1).sum()
    return np.asarray(lost / total if total > 0 else lost)
