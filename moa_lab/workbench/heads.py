"""Heads: their long-range influence, details of one of them, and the rank correlation with another profile, task or length."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from moa_lab.figures import HeadPool, alike_together, largest_first, long_range_influence
from moa_lab.geometry import ModelGeometry
from moa_lab.plan import Plan
from moa_lab.records import InfluenceProfile, ProfileKey
from moa_lab.text import from_to
from moa_lab.workbench.finding import find_head
from moa_lab.workbench.profiles import FILE, profile_file
from moa_lab.workbench.state import State

OWN = "this profile"
NUMBER, SPAN, INFLUENCE = "number", "span, longest first", "influence, most first"
ALIKE = "likeness, by distance"
ORDERS = (NUMBER, INFLUENCE, SPAN, ALIKE)
"""In which the heads of a layer stand on a map."""
Source = tuple[str, ProfileKey]
"""A profile by its name, and a (task, length) of it."""


def rank_stability(
    first: InfluenceProfile, key: ProfileKey, second: InfluenceProfile, other: ProfileKey, beyond_tokens: int, pool: HeadPool | None = None
) -> float:
    """Spearman's correlation of the heads' long-range influence in two profiles (or two lengths or tasks of one).

    NaN where all heads are equal in either. Raises ValueError for profiles of other models.
    """
    if not first.geometry.fits(second.geometry):
        raise ValueError("the two profiles are of models of different geometry: their heads cannot be compared")
    values = [long_range_influence(profile, *where, beyond_tokens, pool) for profile, where in ((first, key), (second, other))]
    if any(np.ptp(each) == 0 for each in values):
        return float("nan")
    return float(spearmanr(values[0].ravel(), values[1].ravel()).statistic)


class Heads:
    """The state's profile, and others of the same model to compare it with. query_head: the selected one, of the state's KV head.

    beyond: distance in tokens from which influence counts as long-range. pool: how the query heads of a KV head become one row; None:
    one row each. order: one of `ORDERS`: by span where the state has a plan; by likeness, where heads that look equally far stand
    together. against: the source compared with. Raises ValueError without a profile.
    """

    def __init__(self, state: State, others: dict[str, InfluenceProfile] | None = None) -> None:
        if state.profile is None:
            raise ValueError("heads are shown from a profile: load a run, or make one with moa_lab.profile(model, samples)")
        self.state, self.profile = state, state.profile
        self.profiles = {OWN: state.profile}
        for name, profile in (others or {}).items():
            self.add(name, profile)
        self.query_head = state.kv_head * self._group
        self.beyond = min(128, max(self.profile.lengths) - 1)
        self.pool: HeadPool | None = None
        self.order = NUMBER
        self.against: Source = next((each for each in self.sources if each != (OWN, self.key)), (OWN, self.key))

    @property
    def key(self) -> ProfileKey:
        """The selected task and length."""
        return self.state.task, self.state.length

    @property
    def sources(self) -> tuple[Source, ...]:
        """All sources to compare with."""
        return tuple((name, key) for name, profile in self.profiles.items() for key in profile.keys)

    def choose_key(self, task: str, length: int) -> None:
        """Select another task or length. Raises ValueError where it was not profiled."""
        if (task, length) not in self.profile.keys:
            raise ValueError(f"{task!r} at {length} tokens was not profiled; there is {', '.join(map(str, self.profile.keys))}")
        self.state.set(task=task, length=length)

    def choose(self, layer: int, query_head: int) -> bool:
        """Select a query head, and its KV head in the state. Returns False, and no watcher is called, where that one was selected already.

        Raises ValueError for an unknown head.
        """
        geometry = self.profile.geometry
        if not (0 <= layer < geometry.layers and 0 <= query_head < geometry.query_heads):
            raise ValueError(
                f"there is no layer {layer}, query head {query_head}: {geometry.layers} layers of {geometry.query_heads} query heads"
            )
        before = (self.state.layer, self.state.kv_head)
        self.query_head = query_head
        self.state.set(layer=layer, kv_head=query_head // self._group)
        return before != (self.state.layer, self.state.kv_head)

    def choose_row(self, layer: int, row: int) -> bool:
        """`choose` by a row of the map: a query head or, for pooled heads, the one of the KV head with the most long-range influence.

        Rows are those of `ordered`.
        """
        order = self.ordered()
        head = row if order is None else int(order[layer, row])
        return self.choose(layer, head if self.pool is None else self._furthest(layer, head))

    def find(self, text: str) -> bool:
        """`choose` by what a head is called, for instance "L12 H3": a query head or, where they are pooled, a KV head.

        Raises ValueError for what names no head.
        """
        geometry = self.profile.geometry
        layer, head = find_head(text, geometry.layers, geometry.query_heads if self.pool is None else geometry.kv_heads)
        return self.choose(layer, head if self.pool is None else self._furthest(layer, head))

    def ordered(self) -> np.ndarray | None:
        """The heads of every layer from the first row of the map to the last, int (layers, rows); None: by number."""
        if self.order == INFLUENCE:
            return largest_first(self.influence())
        if self.order == SPAN and self.state.plan is not None:
            spans = self.state.plan.spans(self.state.n_tokens)
            return largest_first(spans if self.pool else np.repeat(spans, self._group, axis=1))
        if self.order == ALIKE:
            return alike_together(self._shares_by_distance())
        return None

    def follow(self) -> int:
        """The selected query head; if another KV head was selected since, the one of its group with the most long-range influence."""
        if self.query_head // self._group != self.state.kv_head:
            self.query_head = self._furthest(self.state.layer, self.state.kv_head)
        return self.query_head

    def row(self) -> int:
        """The selected row of the map: a head's place in `ordered`."""
        order = self.ordered()
        return self.head() if order is None else int(np.flatnonzero(order[self.state.layer] == self.head())[0])

    def kv_head_of(self, layer: int, row: int) -> int:
        """The KV head of a row of the map."""
        order = self.ordered()
        head = row if order is None else int(order[layer, row])
        return head if self.pool else head // self._group

    def rows_of(self, layer: int, kv_head: int) -> list[int]:
        """The rows of the map that show a KV head: one of its own, or those of its query heads, from the top."""
        rows = self.profile.geometry.kv_heads if self.pool else self.profile.geometry.query_heads
        return [row for row in range(rows) if self.kv_head_of(layer, row) == kv_head]

    def head(self) -> int:
        """The selected head of the map: a query head or, where they are pooled, a KV head."""
        return self.follow() if self.pool is None else self.state.kv_head

    def influence(self, source: Source | None = None) -> np.ndarray:
        """Long-range influence in nats of every row of the map (layers, query_heads, or kv_heads where they are pooled), in `source`
        (None: the selected one)."""
        name, key = source or (OWN, self.key)
        return long_range_influence(self.profiles[name], *key, self.beyond, self.pool)

    def facts(self) -> list[tuple[str, str]]:
        """Facts about the selected head: its influence and rank here and in the source compared with, and its rule."""
        layer, kv_head, head = self.state.layer, self.state.kv_head, self.follow()
        rows = [
            ("head", f"layer {layer}, query head {head} (KV head {kv_head})"),
            ("influence", self._standing(self.influence(), layer)),
            (f"in {described(self.against)}", self._standing(self.influence(self.against), layer)),
            ("confidence", self._confidence(layer)),
        ]
        plan = self.state.plan
        if plan is not None:
            plan.check_model(self.profile.geometry)
            rows.append(("rule", rule_text(plan, layer, kv_head, self.state.n_tokens)))
        return rows

    def compare(self, source: Source) -> None:
        """Compare with another profile, task or length. Raises ValueError for an unknown one."""
        if source not in self.sources:
            raise ValueError(f"there is no {described(source)} to compare with")
        self.against = source

    def stability(self) -> float:
        """`rank_stability` of the selected source and the one compared with."""
        name, key = self.against
        return rank_stability(self.profile, self.key, self.profiles[name], key, self.beyond, self.pool)

    def add(self, name: str, profile: InfluenceProfile) -> None:
        """One more profile to compare with. Raises ValueError for one of another model, and for a name that is taken."""
        if not profile.geometry.fits(self.profile.geometry):
            raise ValueError(f"{name} is of a model of different geometry: its heads cannot be compared")
        if name in self.profiles:
            raise ValueError(f"a profile named {name!r} is there already")
        self.profiles[name] = profile

    def load(self, path: str | Path) -> str:
        """Read a profile from its file or a run's folder, and compare with it, at the same task and length where it has them; returns
        its name.

        Raises ValueError for what is no profile of this model, FileNotFoundError where there is no such file.
        """
        file = profile_file(path)
        name = file.parent.name if file.name == FILE else file.stem
        self.add(name, InfluenceProfile.load(file))
        keys = self.profiles[name].keys
        self.against = (name, self.key if self.key in keys else keys[0])
        return name

    @property
    def _group(self) -> int:
        return self.profile.geometry.group_size

    def _furthest(self, layer: int, kv_head: int) -> int:
        """The query head of a KV head with the most long-range influence."""
        first = kv_head * self._group
        far = long_range_influence(self.profile, *self.key, self.beyond)
        return first + int(far[layer, first : first + self._group].argmax())

    def _shares_by_distance(self) -> np.ndarray:
        """The share of every row's influence at each distance: (layers, rows, blocks); 0 where a head has none."""
        found = self.profile.distance(*self.key)
        if self.pool:
            found = found.reshape(len(found), -1, self._group, found.shape[-1]).sum(axis=2)
        total = found.sum(axis=-1, keepdims=True)
        return np.divide(found, total, out=np.zeros_like(found), where=total > 0)

    def _standing(self, far: np.ndarray, layer: int) -> str:
        return f"{far[layer, self.head()]:.3g} nats beyond {self.beyond:,} tokens, rank {self._rank(far, layer)} of {far.size}"

    def _rank(self, far: np.ndarray, layer: int) -> int:
        return int((far > far[layer, self.head()]).sum()) + 1

    def _confidence(self, layer: int) -> str:
        """The range of the head's ranks over single samples, and over all sources."""
        samples = self.profile.distances[self.key]
        alone = [replace(self.profile, distances={self.key: samples[index : index + 1]}) for index in range(len(samples))]
        ranks = [self._rank(long_range_influence(one, *self.key, self.beyond, self.pool), layer) for one in alone]
        others = [self._rank(self.influence(source), layer) for source in self.sources]
        told = [f"rank {from_to(ranks)} in {len(ranks)} samples, one by one"] if len(ranks) > 1 else []
        return "; ".join([*told, f"{from_to(others)} in {len(others)} tasks and lengths"])


def described(source: Source) -> str:
    """A source in words."""
    name, (task, length) = source
    return f"{name}: {task}, {length:,} tokens"


def rule_text(plan: Plan, layer: int, kv_head: int, n_tokens: int) -> str:
    """A head's rule in words, and what it keeps of `n_tokens`."""
    rule = plan.rules[layer][kv_head]
    parts = [*([f"{rule.alpha:,.0f} tokens"] if rule.alpha or not rule.beta else []), *([f"{rule.beta:.3g} N"] if rule.beta else [])]
    grown = "everything" if rule.keeps_everything else " + ".join(parts)
    kept = kept_text(plan.geometry, layer, int(plan.spans(n_tokens)[layer, kv_head]), n_tokens)
    stored = "; keys in {} bits, values in {}".format(*plan.bits[layer][kv_head]) if plan.bits else ""
    return f"{grown}; at N = {n_tokens:,} it keeps {kept}{stored}"


def kept_text(geometry: ModelGeometry, layer: int, kept: int, n_tokens: int) -> str:
    """What a head keeps of `n_tokens`, or of the fewer that a layer with a window of its own sees."""
    seen = geometry.dense_span_tokens(layer, n_tokens)
    return f"{kept:,} of {n_tokens:,} tokens" if seen == n_tokens else f"{kept:,} of the {seen:,} tokens that its layer sees"
