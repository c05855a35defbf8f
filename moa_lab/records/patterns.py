"""The pattern of every head in a profile: where its influence goes, what the loss becomes without its far past, and the kind that follows.

A KV head is, by the first line that holds:

- `retrieval`: without what it reads beyond the nearest tokens the loss rises by at least `MANY` times the mean of all heads, and the 95%
  interval over samples lies above 0;
- `sink`: at least `MOST` of its influence is on the first positions;
- `local`: at least `MOST` of its influence is on the nearest tokens;
- `mixed`: none of these.

Retrieval comes first: a head that brings facts from afar reads the sink or its neighbours at all other tokens. Where a profile keeps no
blocks, it is not known where influence goes: what is no retrieval head is `unknown`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

from moa_lab.records.profile import InfluenceProfile

RETRIEVAL, SINK, LOCAL, MIXED = "retrieval", "sink", "local", "mixed"
KINDS = (RETRIEVAL, SINK, LOCAL, MIXED)
UNKNOWN = "unknown"
NEAR_BLOCKS = 2
"""Blocks of 64 tokens that are near: the query's own and the one before it."""
MANY, MOST = 2.0, 0.5


@dataclass(frozen=True)
class Patterns:
    """Of every KV head, (layers, kv_heads), at one task and length.

    near, first, far: shares of its |influence| on keys of the query's block of 64 tokens or the one before, on the first 64 positions
    beyond these, and on all others. lost: nats that the loss rises by without all keys 128 tokens back and more, but for the sink.
    sure: whether the 95% interval of that lies above 0 (with one sample: whether it is above 0). kinds: of `KINDS`, or `UNKNOWN`.
    near, first and far are NaN where the profile keeps no blocks.
    """

    near: np.ndarray
    first: np.ndarray
    far: np.ndarray
    lost: np.ndarray
    sure: np.ndarray
    kinds: np.ndarray


def head_patterns(profile: InfluenceProfile, task: str, length: int) -> Patterns:
    """The patterns of all KV heads, each the sum of its query heads.

    A profile without span effects tells what is lost by the influence of the far keys instead, which is never below 0. Raises ValueError
    for what was not profiled.
    """
    if (task, length) not in profile.distances:
        known = ", ".join(f"{name!r} at {size}" for name, size in profile.keys)
        raise ValueError(f"the profile has no {task!r} at {length} tokens; it has {known}")
    lost, sure = _lost(profile, task, length)
    even = np.maximum(lost, 0).mean()
    brings = sure & (lost > 0) & (lost >= MANY * even)
    if not profile.has_blocks(task, length):
        nowhere = np.full(lost.shape, np.nan)
        return Patterns(nowhere, nowhere, nowhere, lost, sure, np.where(brings, RETRIEVAL, UNKNOWN))
    near, first, far = _shares(profile, task, length)
    kinds = np.select([brings, first >= MOST, near >= MOST], [RETRIEVAL, SINK, LOCAL], MIXED)
    return Patterns(near, first, far, lost, sure, kinds)


def _shares(profile: InfluenceProfile, task: str, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of every KV head (layers, kv_heads): the shares of its influence on near keys, on the first block beyond these, and on all others."""
    blocks = _by_kv_head(profile, profile.blocks[task, length], axis=1)
    lag = np.subtract(*np.indices(blocks.shape[2:]))
    at_start = np.indices(blocks.shape[2:])[1] == 0
    near = lag < NEAR_BLOCKS
    sums = [blocks[..., where].sum(axis=-1) for where in (near, ~near & at_start, ~near & ~at_start)]
    total = np.maximum(sum(sums), np.finfo(np.float64).tiny)
    nearest, first, far = (part / total for part in sums)
    return nearest, first, far


def _lost(profile: InfluenceProfile, task: str, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Nats lost beyond the nearest tokens (layers, kv_heads), the mean over samples, and whether it is surely above 0."""
    if (task, length) in profile.span_effects:
        effects = _by_kv_head(profile, profile.span_effects[task, length], axis=2)
        samples = effects[..., NEAR_BLOCKS] if effects.shape[-1] > NEAR_BLOCKS else np.zeros(effects.shape[:3])
    else:
        samples = _by_kv_head(profile, profile.distances[task, length], axis=2)[..., NEAR_BLOCKS:].sum(axis=-1)
    n, mean = len(samples), samples.mean(axis=0)
    if n < 2:
        return mean, mean > 0
    error = student.ppf(0.975, n - 1) * samples.std(axis=0, ddof=1) / np.sqrt(n)
    return mean, mean - error > 0


def _by_kv_head(profile: InfluenceProfile, values: np.ndarray, axis: int) -> np.ndarray:
    """The sum over the query heads of a KV head, float64; axis: that of the query heads."""
    shape = values.shape
    groups = (*shape[:axis], profile.geometry.kv_heads, profile.geometry.group_size, *shape[axis + 1 :])
    return values.astype(np.float64).reshape(groups).sum(axis=axis + 1)
