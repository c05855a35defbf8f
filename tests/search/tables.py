"""Small random loss tables and profiles for the tests of the search, and their answers by trying every choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np

from moa_lab.geometry import ModelGeometry
from moa_lab.plan import DENSE, Bits, SpanRule
from moa_lab.records import BLOCK_TOKENS, Form, InfluenceProfile, LossTable, Objective, ProfileKey
from moa_lab.search import Goal, rule_grid

SINK = 64
FLOOR = SpanRule(128.0, 0.0)
# Constants, ratios and mixes whose order by span changes with the length.
CROSSING = (FLOOR, SpanRule(0.0, 0.25), SpanRule(512.0, 0.0), SpanRule(-512.0, 0.75), DENSE)


def small_geometry(
    layers: int = 2, kv_heads: int = 2, group: int = 2, max_length: int = 8192, layer_windows: tuple[int | None, ...] = ()
) -> ModelGeometry:
    """Few heads, so that every choice can be tried."""
    return ModelGeometry(layers, kv_heads * group, kv_heads, 16, max_length, layer_windows)


def random_table(
    seed: int = 0,
    *,
    geometry: ModelGeometry | None = None,
    rules: Sequence[SpanRule] = CROSSING,
    objectives: Sequence[tuple[str, int, Form]] = (("questions", 2048, "all_or_nothing"), ("summaries", 2048, "sum")),
    worst_rows: int = 3,
    monotone: bool = True,
) -> LossTable:
    """Losses of a heavy-tailed kind: rules that keep more lose less when `monotone`, anything goes otherwise."""
    geometry = geometry or small_geometry()
    random = np.random.default_rng(seed)
    named, blocks, first = [], [], 0
    for task, length, form in objectives:
        rows = worst_rows if form == "worst_distance" else 1
        heads = random.lognormal(0.0, 1.5, (rows, geometry.layers, geometry.kv_heads, 1))
        losses = heads * random.random((rows, geometry.layers, geometry.kv_heads, len(rules)))
        if monotone:
            spans = np.array([rule.span_tokens(length) for rule in rules])
            losses = heads * np.sort(losses / heads, axis=-1)[..., ::-1][..., spans.argsort(kind="stable").argsort(kind="stable")]
            losses[..., spans == length] = 0.0
        blocks.append(losses / losses[..., 0].sum(axis=(1, 2)).max())
        named.append(Objective(task, length, form, (first, first + rows)))
        first += rows
    return LossTable(geometry, tuple(rules), SINK, 128, tuple(named), np.concatenate(blocks))


def stored_table(seed: int = 0, mixes: Sequence[Bits] = ((8, 8), (8, 4)), rounding: float = 0.3, **settings: Any) -> LossTable:
    """`random_table` with every rule in each of `mixes`, of which later ones lose more, by a share of what heads lose at the floor."""
    table = random_table(seed, **settings)
    random = np.random.default_rng(seed)
    heads = rounding * table.losses[..., :1] * random.random((*table.losses.shape[:3], 1))
    losses = np.concatenate([table.losses + place * heads for place in range(len(mixes))], axis=3)
    stored = tuple(mix for mix in mixes for _ in table.rules)
    return replace(table, rules=table.rules * len(mixes), losses=losses, stored=stored)


def large_table(seed: int = 0, layers: int = 32, kv_heads: int = 32, worst: bool = False) -> LossTable:
    """The size of a 7B model with the default rule grid and three profiled lengths."""
    lengths = (2048, 4096, 8192)
    objectives: list[tuple[str, int, Form]] = [("questions", n, "all_or_nothing") for n in lengths]
    objectives += [("summaries", n, "worst_distance" if worst else "sum") for n in lengths]
    geometry = small_geometry(layers, kv_heads, group=1, max_length=8192)
    return random_table(seed, geometry=geometry, rules=rule_grid(lengths), objectives=objectives, worst_rows=10)


def random_profile(
    seed: int = 0,
    *,
    geometry: ModelGeometry | None = None,
    keys: Sequence[ProfileKey] = (("questions", 512), ("questions", 1024), ("summaries", 512), ("summaries", 1024)),
    samples: int = 3,
    span_effects: bool = True,
) -> InfluenceProfile:
    """Random histograms and signed curves; layers with their own window have nothing beyond it."""
    geometry = geometry or small_geometry()
    random = np.random.default_rng(seed)
    blocks, distances, effects = {}, {}, {}
    for task, length in keys:
        bins = length // BLOCK_TOKENS
        shape = (samples, geometry.layers, geometry.query_heads, bins)
        reach = np.array([geometry.dense_span_tokens(layer, length) for layer in range(geometry.layers)])
        seen = (BLOCK_TOKENS * np.arange(bins) < reach[:, None])[None, :, None, :]
        distances[task, length] = (random.lognormal(0, 1, shape) * seen).astype(np.float32)
        effects[task, length] = (random.normal(0, 1, shape) * seen).astype(np.float32)
        blocks[task, length] = np.zeros((geometry.layers, geometry.query_heads, bins, bins), dtype=np.float32)
    return InfluenceProfile(geometry, SINK, blocks, distances, span_effects=effects if span_effects else {})


def rounded_profile(profile: InfluenceProfile, seed: int = 0) -> InfluenceProfile:
    """The profile with random losses of rounding, heavy-tailed over heads; 8 bits lose a sixteenth of what 4 do, V a quarter of K."""
    random, geometry = np.random.default_rng(seed), profile.geometry
    weight = np.array([[1.0, 0.25], [1 / 16, 1 / 64]])
    rounding = {}
    for key, histogram in profile.distances.items():
        heads = random.lognormal(-2.0, 1.0, (len(histogram), geometry.layers, geometry.kv_heads, 1, 1))
        rounding[key] = (heads * weight).astype(np.float32)
    return replace(profile, rounding=rounding)


def curve_profile(curves: np.ndarray, length: int, *, geometry: ModelGeometry, task: str = "questions") -> InfluenceProfile:
    """A profile with the given span effects (samples, layers, query_heads, length / 64) for one task and length."""
    histogram = np.ones_like(curves, dtype=np.float32)
    blocks = np.zeros((geometry.layers, geometry.query_heads, curves.shape[-1], curves.shape[-1]), dtype=np.float32)
    return InfluenceProfile(
        geometry, SINK, {(task, length): blocks}, {(task, length): histogram}, span_effects={(task, length): curves.astype(np.float32)}
    )


def all_choices(table: LossTable) -> np.ndarray:
    """Every choice: (count, layers, kv_heads)."""
    geometry = table.geometry
    grid = product(range(len(table.rules)), repeat=geometry.layers * geometry.kv_heads)
    return np.array(list(grid), dtype=np.int64).reshape(-1, geometry.layers, geometry.kv_heads)


def goal_values(table: LossTable, goal: Goal, choices: np.ndarray) -> np.ndarray:
    """The goal's value of many choices, straight from the words: the weighted mean of the objectives' largest row sums."""
    layer, head = np.indices(choices.shape[1:])
    sums = table.losses[:, layer, head, choices].sum(axis=(2, 3))
    total = sum(goal.weights.values())
    of = {objective.name: sums[slice(*objective.rows)].max(axis=0) for objective in table.objectives}
    return np.sum([weight / total * of[name] for name, weight in goal.weights.items()], axis=0)


def keeps(table: LossTable, choices: np.ndarray, density: Mapping[int, float]) -> np.ndarray:
    """Boolean (count,): the tokens kept never exceed density times the dense tokens, at any length; or their bytes, by the bits."""
    fine = np.ones(len(choices), dtype=bool)
    head_dim = table.geometry.head_dim
    # A grid for every vector in fewer bits: the smallest value and the step, in 16 bits each.
    bits = [sum(2 * head_dim if width == 16 else head_dim * width // 8 + 4 for width in mix) for mix in table.stored]
    each, whole = (np.array(bits), 4 * head_dim) if bits else (1, 1)
    for n, most in density.items():
        spans = table.span_tokens(n) * each
        kept = spans[np.arange(choices.shape[1])[None, :, None], choices].sum(axis=(1, 2))
        fine &= kept <= most * table.dense_tokens(n) * whole + 1e-6
    return fine


def rules_per_layer(choices: np.ndarray) -> np.ndarray:
    """Most distinct rules in any layer, per choice: (count,)."""
    ordered = np.sort(choices, axis=2)
    return 1 + (np.diff(ordered, axis=2) != 0).sum(axis=2).max(axis=1)


def dominated(values: np.ndarray) -> list[int]:
    """Rows that some other row beats: nowhere worse, somewhere better. By two loops."""
    return [
        index
        for index, row in enumerate(values)
        if any((other <= row).all() and (other < row).any() for position, other in enumerate(values) if position != index)
    ]


def task_goals(table: LossTable) -> tuple[Goal, ...]:
    """One goal per objective."""
    return tuple(Goal(objective.name, {objective.name: 1.0}) for objective in table.objectives)
