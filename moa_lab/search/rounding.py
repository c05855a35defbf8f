"""What storing K and V in fewer bits loses, beside what spans lose."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moa_lab.plan import UNTOUCHED, Bits
from moa_lab.records import ROUNDED_BITS, InfluenceProfile


def has_rounding(profile: InfluenceProfile) -> bool:
    """Whether the profile knows what rounding costs each head."""
    return set(profile.rounding) == set(profile.distances)


def check_rounding(profile: InfluenceProfile) -> None:
    """Raise ValueError where it does not."""
    if not has_rounding(profile):
        raise ValueError(
            "the profile does not know what stored bits cost each head: profile again with rounding=True "
            "(--rounding; a run in a new folder)"
        )


def mix_losses(rounding: np.ndarray, mixes: Sequence[Bits]) -> np.ndarray:
    """Loss of every head in every mix, the mean over samples, never less for fewer bits: float64 (layers, kv_heads, mixes).

    rounding: as of a profile, (samples, layers, kv_heads, widths, 2). The losses of K and of V add up.
    """
    mean = rounding.astype(np.float64).mean(axis=0)
    # Of ascending widths the wider ones come later.
    worst = np.maximum.accumulate(mean[:, :, ::-1], axis=2)[:, :, ::-1]
    by_bits = {bits: worst[:, :, at] for at, bits in enumerate(ROUNDED_BITS)} | {UNTOUCHED: np.zeros_like(worst[:, :, 0])}
    return np.stack([by_bits[key][..., 0] + by_bits[value][..., 1] for key, value in mixes], axis=-1)


def in_all_mixes(rows: np.ndarray, rounded: np.ndarray) -> np.ndarray:
    """Losses (rows, layers, kv_heads, rules) with those of rounding (layers, kv_heads, mixes): (rows, layers, kv_heads, mixes * rules),
    the rules of the first mix first.

    What is rounded lies at all distances alike: each of several rows, of a distance bucket each, has its part of it.
    """
    added = rows[..., None, :] + rounded[..., None] / len(rows)
    return np.asarray(added.reshape(*rows.shape[:3], -1))
