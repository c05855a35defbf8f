"""The biography of a KV head: its rank and kind in every profile, task and length, and whether others' scores rank the heads alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moa_lab.evaluate.compare import rank_agreement
from moa_lab.evaluate.intervals import Interval
from moa_lab.figures import long_range_influence
from moa_lab.records import KINDS, UNKNOWN, InfluenceProfile, Patterns, ProfileKey, head_patterns
from moa_lab.text import from_to
from moa_lab.workbench.published_scores import HeadScores


@dataclass(frozen=True)
class Chapter:
    """A KV head in one profile (of a run, or of a domain's texts), task and length in tokens.

    influence: nats beyond the biography's distance, summed over its query heads; rank: by that, 1 the most influential of `of`. lost:
    nats of the loss without its far past, with the rank by that. near, first, far: where its influence goes, and kind, as in `Patterns`:
    NaN, and `UNKNOWN` but for retrieval heads, where the profile keeps no blocks.
    """

    profile: str
    task: str
    length: int
    influence: float
    rank: int
    of: int
    kind: str
    lost: float
    lost_rank: int
    near: float
    first: float
    far: float


class Biography:
    """profiles: by name, of one model, none for a run that keeps none; more may be added to the mapping later. beyond: tokens back from
    which influence is long-range.

    scores: published ones, by name.
    """

    def __init__(self, profiles: Mapping[str, InfluenceProfile], beyond: int = 128) -> None:
        self.profiles, self.beyond = profiles, beyond
        self.scores: dict[str, HeadScores] = {}
        self._patterns: dict[tuple[str, ProfileKey], Patterns] = {}
        self._influence: dict[tuple[str, ProfileKey, int], np.ndarray] = {}

    def patterns(self, name: str, key: ProfileKey) -> Patterns:
        """Of all heads of a profile at a task and length, worked out once. Raises ValueError for what was not profiled."""
        if name not in self.profiles:
            raise ValueError(f"there is no profile {name!r}; there are {', '.join(self.profiles)}")
        if (name, key) not in self._patterns:
            self._patterns[name, key] = head_patterns(self.profiles[name], *key)
        return self._patterns[name, key]

    def influence(self, name: str, key: ProfileKey) -> np.ndarray:
        """Long-range influence of all KV heads in nats, (layers, kv_heads), worked out once."""
        where = (name, key, self.beyond)
        if where not in self._influence:
            self._influence[where] = long_range_influence(self.profiles[name], *key, min(self.beyond, key[1] - 1), "sum")
        return self._influence[where]

    def chapters(self, layer: int, kv_head: int) -> tuple[Chapter, ...]:
        """A head in every profile, task and length. Raises ValueError for a head that the model does not have."""
        return tuple(self.chapter(name, key, layer, kv_head) for name, profile in self.profiles.items() for key in profile.keys)

    def chapter(self, name: str, key: ProfileKey, layer: int, kv_head: int) -> Chapter:
        """A head in one of them. Raises ValueError for a head that the model does not have, and for what was not profiled."""
        found, at = self.patterns(name, key), (layer, kv_head)
        layers, heads = found.kinds.shape
        if not (0 <= layer < layers and 0 <= kv_head < heads):
            raise ValueError(f"there is no layer {layer}, KV head {kv_head}: {layers} layers of {heads} KV heads")
        influence = self.influence(name, key)
        return Chapter(
            name, *key, influence=float(influence[at]), rank=_rank(influence, at), of=influence.size, kind=str(found.kinds[at]),
            lost=float(found.lost[at]), lost_rank=_rank(found.lost, at), near=float(found.near[at]), first=float(found.first[at]),
            far=float(found.far[at]),
        )  # fmt: skip

    def told(self, layer: int, kv_head: int) -> str:
        """The head in one sentence."""
        chapters, name = self.chapters(layer, kv_head), f"Layer {layer}, KV head {kv_head}"
        given = "".join(f"; {one.method} ({source}) {one.values[layer, kv_head]:.2f}" for source, one in self.scores.items())
        if not chapters:
            return f"{name}{given}."
        kinds = [one.kind for one in chapters]
        counted = [(kinds.count(kind), kind) for kind in (*KINDS, UNKNOWN) if kind in kinds]
        found = ", ".join(f"{kind} in {count}" for count, kind in sorted(counted, key=lambda pair: -pair[0]))
        where = "" if len(chapters) == 1 else f" of {len(chapters)} tasks and lengths"
        of = chapters[0].of
        ranks = f"rank {from_to(one.rank for one in chapters)} of {of} by influence"
        lost = f"{from_to(one.lost_rank for one in chapters)} by the loss without its far past"
        return f"{name}: {kinds[0] if len(chapters) == 1 else found}{where}; {ranks}, {lost}{given}."

    def table(self, layer: int, kv_head: int) -> tuple[list[str], list[list[str]]]:
        """The chapters in words: a head and a row each, and a row for every published score."""
        rows = [
            [
                one.profile, one.task, f"{one.length:,}", one.kind, f"{one.influence:.3g}", f"{one.rank} of {one.of}",
                f"{one.lost:+.4f}", f"{one.lost_rank} of {one.of}", _shares(one),
            ]
            for one in self.chapters(layer, kv_head)
        ]  # fmt: skip
        for name, scores in self.scores.items():
            rank, shown = _rank(scores.values, (layer, kv_head)), f"{scores.values[layer, kv_head]:.3g}"
            rows.append([name, scores.method, "-", "-", shown, f"{rank} of {scores.values.size}", "-", "-", "-"])
        titles = ["profile", "task", "tokens", "kind", "influence, nats", "its rank", "nats lost without its far past", "its rank"]
        return [*titles, "near / first 64 / far"], rows

    def counts(self, name: str, key: ProfileKey) -> dict[str, int]:
        """How many heads are of each kind."""
        kinds = self.patterns(name, key).kinds
        return {kind: int((kinds == kind).sum()) for kind in (*KINDS, UNKNOWN) if kind != UNKNOWN or kind in kinds}

    def agreement(self, scores: str, name: str, key: ProfileKey) -> Interval:
        """Rank correlation of published scores with this profile's long-range influence, over the heads, with a 95% interval."""
        return rank_agreement(self.influence(name, key), self.scores[scores].values)

    def add_scores(self, scores: HeadScores) -> str:
        """One more overlay; returns the name it goes by. Raises ValueError where that name is taken."""
        if scores.name in self.scores or scores.name in self.profiles:
            raise ValueError(f"{scores.name!r} is there already")
        self.scores[scores.name] = scores
        return scores.name


def _shares(one: Chapter) -> str:
    return "-" if np.isnan(one.near) else f"{one.near:.0%} / {one.first:.0%} / {one.far:.0%}"


def _rank(values: np.ndarray, at: tuple[int, int]) -> int:
    return int((values > values[at]).sum()) + 1
