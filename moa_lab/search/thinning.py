"""Few candidates of many: references stay, and of the others those that differ most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from moa_lab.records import FrontPoint
from moa_lab.search.front import front_values
from moa_lab.search.plain import SIMPLE, WHOLE

PREFERRED_POINTS = 5


def thinned(points: list[FrontPoint], names: Sequence[str], most: int, keep: Sequence[str], preferred: str) -> list[FrontPoint]:
    """Those in `keep`, and of the others at most what these leave of `most`, but half of `most` at least: the first of every origin,
    then a few of the origin `preferred`, then any; each time the one furthest from those chosen."""
    if not points:
        return []
    kept = _kept(points, most, keep)
    others = [each for each in points if each.origin not in keep]
    wanted = min(max(most - len(kept), -(-most // 2)), len(others))
    everyone = [*kept, *others]
    values = front_values(everyone, names)
    spread = np.ptp(values, axis=0)
    scaled = (values - values.min(axis=0)) / np.where(spread > 0, spread, 1.0)
    origins = [candidate.origin for candidate in everyone]
    first = [index for index, origin in enumerate(origins) if index >= len(kept) and origins.index(origin) == index]
    chosen = [*range(len(kept)), *first[:wanted]]
    while len(chosen) < len(kept) + wanted:
        distance = np.linalg.norm(scaled[:, None] - scaled[None, chosen], axis=2).min(axis=1)
        liked = [index for index, origin in enumerate(origins) if origin == preferred and index not in chosen]
        if liked and sum(origins[index] == preferred for index in chosen) < PREFERRED_POINTS:
            chosen.append(max(liked, key=lambda index: distance[index]))
            continue
        distance[[*chosen, *range(len(kept))]] = -1.0
        chosen.append(int(distance.argmax()))
    return [everyone[index] for index in sorted(chosen)]


def _kept(points: list[FrontPoint], most: int, keep: Sequence[str]) -> list[FrontPoint]:
    """Points that stay because of their origin: all of it, but of whole heads as many as fill half of `most`, the first two at least."""
    kept = [each for each in points if each.origin in keep]
    whole = [each for each in kept if each.origin == WHOLE]
    stay = whole[: max(2, most // 2 - (len(kept) - len(whole)))]
    return [each for each in kept if each.origin != WHOLE or each in stay]


def renamed(points: Sequence[FrontPoint]) -> list[FrontPoint]:
    """The points with distinct names that tell where each plan came from."""
    count: dict[str, int] = {}
    renamed = []
    for candidate in points:
        count[candidate.origin] = count.get(candidate.origin, 0) + 1
        name = candidate.plan.name if candidate.origin in SIMPLE else f"{candidate.origin}-{count[candidate.origin]}"
        renamed.append(replace(candidate, plan=replace(candidate.plan, name=name)))
    return renamed
