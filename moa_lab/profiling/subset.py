"""A part of a profile: some tasks, lengths and samples of it, as if only those had been profiled."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import numpy as np

from moa_lab.records import InfluenceProfile, ProfileKey


def profile_part(
    profile: InfluenceProfile,
    *,
    tasks: Collection[str] | None = None,
    lengths: Collection[int] | None = None,
    samples: slice | Mapping[ProfileKey, slice] = slice(None),
) -> InfluenceProfile:
    """The profile of `samples` of every (task, length) in `tasks` and `lengths` (None: all); a mapping gives a slice for each.

    `blocks`, which are averages over all samples, exist only for a (task, length) that keeps all of its samples: a part with fewer can
    make loss tables, but not be saved. Raises ValueError where nothing is left of a (task, length), or of the profile.
    """
    keys = [(task, n) for task, n in profile.keys if (tasks is None or task in tasks) and (lengths is None or n in lengths)]
    if not keys:
        raise ValueError(f"nothing is left of the profile: it holds {', '.join(f'{task}@{length}' for task, length in profile.keys)}")
    picks = {key: samples if isinstance(samples, slice) else samples[key] for key in keys}
    distances = {key: profile.distances[key][pick] for key, pick in picks.items()}
    for (task, length), kept in distances.items():
        if not len(kept):
            raise ValueError(f"samples: none is left of {task}@{length}")
    whole = [key for key in keys if len(distances[key]) == len(profile.distances[key])]
    effects = {key: np.asarray(profile.span_effects[key][pick]) for key, pick in picks.items() if key in profile.span_effects}
    rounding = {key: np.asarray(profile.rounding[key][pick]) for key, pick in picks.items() if key in profile.rounding}
    blocks = {key: profile.blocks[key] for key in whole if key in profile.blocks}
    return replace(profile, blocks=blocks, distances=distances, span_effects=effects, rounding=rounding)
