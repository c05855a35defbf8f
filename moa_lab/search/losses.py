"""Profile x rules -> loss table: the predicted loss of every choice, by suffix sums over distance."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np

from moa_lab.plan import MIN_SPAN, WHOLE_BITS, Bits, SpanRule
from moa_lab.records import BLOCK_TOKENS, FORMS, Form, InfluenceProfile, LossTable, Objective
from moa_lab.search.beyond import at_length, growth, lost_at, nearest
from moa_lab.search.problem import Density, judged_lengths, used_lengths
from moa_lab.search.rounding import check_rounding, in_all_mixes, mix_losses
from moa_lab.search.space import rule_grid

Pool = Literal["max", "sum", "mean"]
Estimator = Literal["span", "element"]

DISTANCE_BUCKETS = 10
"""Rows of a worst-distance objective. Equal widths: a fact may sit anywhere, so no far distance should hide in a wide bucket."""


def loss_table(
    profile: InfluenceProfile,
    rules: Sequence[SpanRule] | None = None,
    *,
    min_span: int = MIN_SPAN,
    pool: Pool = "max",
    forms: Sequence[Form] = FORMS,
    estimator: Estimator | None = None,
    use_lengths: Iterable[int] | None = None,
    mixes: Sequence[Bits] = (WHOLE_BITS,),
) -> LossTable:
    """Predicted loss of every (layer, KV head, rule), per task, length and form.

    `estimator`: "span" (default where the profile has span effects) or "element" (single values, as in the paper).
    A rule with window W = span - sink loses the influence at distances >= W (bins are interpolated linearly). Forms: `sum`
    of what is lost; `all_or_nothing`, where a head that keeps less than the dense span loses all its influence beyond
    `min_span`; `worst_distance`, one row per distance bucket beyond `min_span`. Query heads h of KV head h // group_size
    are pooled, row by row, by `pool`. `rules` default to `rule_grid` of the lengths. Every objective is scaled to
    1 for the plan whose heads all have the cheapest rule (left as zeros where the cheapest rule loses nothing).

    use_lengths: where plans will be used, beside the profiled lengths (None: twice the longest of them, within the model's maximum).
    There the influence is extrapolated (see `beyond`), so that a rule is judged by the span it will have.

    mixes: bits of K and V that a head may be stored in; by default nothing is rounded. With others each rule is there once for every mix,
    and loses what the rounding loses as well, in the units of a table of 16 bits. At a length that was not profiled rounding loses what it
    does at the nearest one. Of a head that is cut it loses no less: it is measured where the dense model sees everything.

    Raises ValueError for an empty profile or rule list, an unknown pool, form or estimator, span effects that the profile lacks,
    mixes whose rounding it lacks, a min_span that does not exceed the sink, a length that is not positive or beyond the model, or influence
    that is not finite.
    """
    estimator = estimator or ("span" if profile.span_effects else "element")
    _check(profile, rules, pool, forms, min_span, estimator)
    lengths = used_lengths(profile.lengths, profile.geometry.max_length, use_lengths)
    chosen = rule_grid(lengths, min_span=min_span) if rules is None else tuple(rules)
    stored = () if tuple(mixes) == (WHOLE_BITS,) else tuple(mix for mix in mixes for _ in chosen)
    if stored:
        check_rounding(profile)
    near = -(-max(min_span - profile.sink_tokens, 0) // BLOCK_TOKENS)
    windows = profile.geometry.layer_windows
    objectives: list[Objective] = []
    blocks: list[np.ndarray] = []
    first = 0
    for task in profile.tasks:
        curves = {n: _curve(profile, task, n, estimator) for known, n in profile.keys if known == task}
        grown = growth(curves, near, windows)
        for length in sorted({*curves, *lengths}):
            curve = curves[length] if length in curves else at_length(curves, length, grown.moving, windows)
            heads = _HeadLosses(profile, curve, length, chosen, min_span)
            rounded = mix_losses(_rounding(profile, task, nearest(curves, length), estimator), mixes) if stored else None
            told: dict[str, Any] = {} if length in curves else {"profiled": False, "error": grown.error}
            for form in forms:
                rows = _scaled(_pooled(heads.rows(form), profile.geometry.kv_heads, pool), heads.cheapest, rounded)
                blocks.append(rows)
                objectives.append(Objective(task, length, form, (first, first + len(rows)), **told))
                first += len(rows)
    return LossTable(
        geometry=profile.geometry, rules=chosen * len(mixes), stored=stored, sink_tokens=profile.sink_tokens, min_span=min_span,
        objectives=tuple(objectives), losses=np.concatenate(blocks), provenance=profile.provenance,
    )  # fmt: skip


def _curve(profile: InfluenceProfile, task: str, length: int, estimator: Estimator) -> np.ndarray:
    """What is lost with the keys at distances >= 64 b: (samples, layers, query_heads, bins)."""
    if estimator == "span":
        effects = profile.span_effects[task, length].astype(np.float64)
        return effects / _totals(effects)
    histogram = profile.distance(task, length)[None]
    return np.cumsum(histogram[..., ::-1], axis=-1)[..., ::-1]


def _rounding(profile: InfluenceProfile, task: str, length: int, estimator: Estimator) -> np.ndarray:
    """The profile's rounding in the units of `_curve`: (samples, layers, kv_heads, widths, 2)."""
    found = profile.rounding[task, length]
    return found / _totals(profile.span_effects[task, length].astype(np.float64))[..., None] if estimator == "span" else found


class _HeadLosses:
    """Losses of one task and length, of a curve as `_curve` gives it, before pooling: (rows, layers, query_heads, rules)."""

    def __init__(self, profile: InfluenceProfile, curve: np.ndarray, length: int, rules: tuple[SpanRule, ...], min_span: int) -> None:
        self._curve = curve
        self._furthest = float(BLOCK_TOKENS * curve.shape[-1])
        spans = np.array([rule.span_tokens(length, min_span) for rule in rules])
        dense = np.array([profile.geometry.dense_span_tokens(layer, length) for layer in range(profile.geometry.layers)])
        self._floor = float(max(min(min_span, length) - profile.sink_tokens, 0))
        self._windows = np.maximum(spans - profile.sink_tokens, 0).astype(np.float64)
        # Spans are compared, not windows: the dense span cuts nothing, though its window is one sink shorter.
        self._cut = spans[None, :] < dense[:, None]
        self.cheapest = int(spans.argmin())

    def rows(self, form: Form) -> np.ndarray:
        """The rows of one objective: (rows, layers, query_heads, rules)."""
        cut = self._cut[None, :, None, :]
        if form == "sum":
            return np.where(cut, self._lost(self._windows)[None], 0.0)
        if form == "all_or_nothing":
            return np.where(cut, self._lost(np.array([self._floor]))[None], 0.0)
        return np.where(cut, self._by_distance(), 0.0)

    def _by_distance(self) -> np.ndarray:
        furthest = self._furthest
        if self._floor >= furthest:
            return np.zeros((1, *self._curve.shape[1:3], len(self._windows)))
        count = min(DISTANCE_BUCKETS, max(1, round((furthest - self._floor) / BLOCK_TOKENS)))
        edges = np.linspace(self._floor, furthest, count + 1)
        # A window that ends inside a bucket masks the rest of the bucket; one that ends beyond it masks nothing there.
        return np.stack([self._lost(np.clip(self._windows, near, far), until=far) for near, far in pairwise(edges)])

    def _lost(self, windows: np.ndarray, until: float | None = None) -> np.ndarray:
        """Mean over samples of what is lost at distances from each window on (up to `until`): (layers, query_heads, windows)."""
        lost = lost_at(self._curve, windows) - (0.0 if until is None else lost_at(self._curve, np.array([until])))
        return np.abs(lost).mean(axis=0)


def _totals(effects: np.ndarray) -> np.ndarray:
    """The total effect of every sample, (samples, 1, 1, 1), by which all are scaled alike; else a few samples that the model barely answers
    would outweigh the others."""
    total = np.abs(effects).max(axis=-1).sum(axis=(1, 2))[:, None, None, None]
    return np.where(total > 0, total, 1.0)


_POOLS: dict[str, Callable[..., np.ndarray]] = {"max": np.max, "sum": np.sum, "mean": np.mean}


def _pooled(rows: np.ndarray, kv_heads: int, pool: Pool) -> np.ndarray:
    """(rows, layers, query_heads, rules) -> (rows, layers, kv_heads, rules)."""
    count, layers, query_heads, rules = rows.shape
    return _POOLS[pool](rows.reshape(count, layers, kv_heads, query_heads // kv_heads, rules), axis=3)


def _scaled(rows: np.ndarray, cheapest: int, rounded: np.ndarray | None) -> np.ndarray:
    largest = rows[..., cheapest].sum(axis=(1, 2)).max()
    rows = rows if rounded is None else in_all_mixes(rows, rounded)
    return rows / largest if largest > 0 else rows


def _check(
    profile: InfluenceProfile, rules: Sequence[SpanRule] | None, pool: str, forms: Sequence[str], min_span: int, estimator: str
) -> None:
    if not profile.keys:
        raise ValueError("profile holds no (task, length): profile at least one length first")
    if rules is not None and not rules:
        raise ValueError("rules is empty: give at least one rule, or None for the default grid")
    if pool not in get_args(Pool):
        raise ValueError(f"pool must be one of {get_args(Pool)}, got {pool!r}")
    if not forms or any(form not in FORMS for form in forms):
        raise ValueError(f"forms must be some of {FORMS}, got {tuple(forms)}")
    if min_span <= profile.sink_tokens:
        raise ValueError(f"min_span ({min_span}) must exceed the profile's sink_tokens ({profile.sink_tokens})")
    if estimator not in get_args(Estimator):
        raise ValueError(f"estimator must be one of {get_args(Estimator)}, got {estimator!r}")
    if estimator == "span" and set(profile.span_effects) != set(profile.distances):
        raise ValueError("estimator 'span' needs a profile with span effects; profile again, or use 'element'")
    used = profile.span_effects if estimator == "span" else profile.distances
    for task, length in profile.keys:
        if not np.isfinite(used[task, length]).all():
            raise ValueError(f"profile has influence that is not finite for {task}@{length}: profile that task again")


def tables_of(
    given: InfluenceProfile | LossTable, min_span: int | None, density: Density, lengths: Iterable[int] | None,
    mixes: Sequence[Bits] = (WHOLE_BITS,),
) -> tuple[LossTable, LossTable | None]:  # fmt: skip
    """The table to search, and one of single values over the same rules where the profile has both estimators.

    A profile's table holds the lengths at which density is limited, where these are given, and all rules in each of `mixes`.
    """
    if isinstance(given, LossTable):
        if min_span not in (None, given.min_span):
            raise ValueError(
                f"min_span {min_span}: the table was made with {given.min_span}; pass loss_table(profile, min_span={min_span})"
            )
        return given, None
    floor = MIN_SPAN if min_span is None else min_span
    asked = lengths if lengths is not None else density if isinstance(density, Mapping) else None
    used = None if asked is None else judged_lengths(asked, given.lengths)
    table = loss_table(given, min_span=floor, use_lengths=used, mixes=mixes)
    if not given.span_effects:
        return table, None
    rules = tuple(dict.fromkeys(table.rules))
    return table, loss_table(given, rules, min_span=floor, estimator="element", use_lengths=used, mixes=mixes)
