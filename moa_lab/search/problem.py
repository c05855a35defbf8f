"""The problem as arrays, shared by all solvers: costs, density limits, pinned heads; and errors that say what binds.

Heads are flattened: head = layer * kv_heads + kv_head. R is the number of rules, K the number of limits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from moa_lab.engines import EngineLimits
from moa_lab.geometry import ModelGeometry
from moa_lab.plan import SINK_TOKENS, WHOLE_BITS, Bits, check_density, token_price, tokens_bought
from moa_lab.records import LossTable
from moa_lab.search.goals import Goal, default_goals, mean_goal

Density = float | Mapping[int, float]
Pinned = Mapping[tuple[int, int], int]
LOW_SINK = 4
"""Tokens of a low sink: as many as hold the attention that goes nowhere (StreamingLLM)."""


class InfeasibleError(ValueError):
    """No choice meets the limits; the message names what binds and the least that is feasible."""


class NoPlanError(RuntimeError):
    """The search was stopped (cancelled, or out of time) before it knew any plan that meets the limits."""


@dataclass(frozen=True)
class WorstTerm:
    """`weight * max over rows of the sum over heads`: one worst_distance objective inside a goal; rows (k, heads, R)."""

    objective: str
    weight: float
    rows: np.ndarray

    def sums(self, choice: np.ndarray) -> np.ndarray:
        """Row sums of a choice (heads,): (k,)."""
        return self.rows[:, np.arange(len(choice)), choice].sum(axis=1)


@dataclass(frozen=True)
class Terms:
    """A goal as arrays: `linear` (heads, R) plus worst terms."""

    linear: np.ndarray
    worst: tuple[WorstTerm, ...]

    def value(self, choice: np.ndarray) -> float:
        """The goal's value for a choice (heads,)."""
        linear = self.linear[np.arange(len(choice)), choice].sum()
        return float(linear + sum(term.weight * term.sums(choice).max() for term in self.worst))


@dataclass(frozen=True)
class Limits:
    """Density limits: `usage` (K, heads, R), a choice's share of the dense cache per length, and `limit` (K,) on its sum.

    `asked` (K,) is the density that the caller gave. Usage and limit are multiples of one token of the dense cache (of one byte where
    choices differ in bits), so that half of one as `slack` (K,) absorbs rounding and no more.
    """

    lengths: tuple[int, ...]
    asked: np.ndarray
    usage: np.ndarray
    limit: np.ndarray
    slack: np.ndarray

    def met_by(self, choice: np.ndarray) -> bool:
        """True when a choice (heads,) keeps every limit."""
        used = self.usage[:, np.arange(len(choice)), choice].sum(axis=1)
        return bool((used <= self.limit + self.slack).all())


def limit_lengths(table: LossTable, lengths: Iterable[int] | None = None) -> tuple[int, ...]:
    """Lengths at which density is limited: those given, or those of the table; with twice the longest if all were profiled."""
    if lengths is not None:
        return _lengths(lengths)
    return table.lengths if table.profiled_lengths != table.lengths else limits_of(table.lengths, table.geometry.max_length)


def used_lengths(profiled: Iterable[int], max_length: int, asked: Iterable[int] | None = None) -> tuple[int, ...]:
    """Lengths at which a plan must hold: the profiled ones and those `asked` for (None: twice the longest, as `limits_of`).

    Raises ValueError for a length that is not positive, or beyond the model.
    """
    if asked is None:
        return limits_of(profiled, max_length)
    chosen = _lengths({*profiled, *asked})
    if chosen[-1] > max_length:
        raise ValueError(f"length {chosen[-1]} is beyond the model's maximum of {max_length} tokens")
    return chosen


def judged_lengths(asked: Iterable[int], profiled: Iterable[int]) -> list[int]:
    """Those of `asked` at which losses are predicted: from the shortest profiled one on. Shorter ones limit the density alone, as they
    would draw heads to spans that are too short for the others."""
    shortest = min(profiled)
    return [n for n in asked if n >= shortest]


def _lengths(lengths: Iterable[int]) -> tuple[int, ...]:
    chosen = tuple(sorted(set(lengths)))
    if not chosen or chosen[0] < 1:
        raise ValueError(f"lengths must name at least one length of at least 1 token, got {chosen}")
    return chosen


def limits_of(profiled: Iterable[int], max_length: int) -> tuple[int, ...]:
    """The profiled lengths and twice the longest, within the model's maximum."""
    ordered = sorted(set(profiled))
    return tuple(sorted({*ordered, max(ordered[-1], min(2 * ordered[-1], max_length))}))


def least_density(geometry: ModelGeometry, n_tokens: int, min_span: int, engine: EngineLimits | None = None) -> float:
    """Share of the dense cache at `n_tokens` that is allocated when every head keeps `min_span` tokens and no more."""
    dense = np.array([geometry.dense_span_tokens(layer, n_tokens) for layer in range(geometry.layers)])
    spans = np.minimum(min_span, dense)
    return float((spans if engine is None else engine.slots(spans, n_tokens)).sum() / dense.sum())


def check_floor(
    geometry: ModelGeometry,
    targets: Mapping[int, float],
    min_span: int,
    sink_tokens: int = SINK_TOKENS,
    mix: Bits = WHOLE_BITS,
    engine: EngineLimits | None = None,
) -> None:
    """Raise InfeasibleError where heads at the floor alone, stored in `mix`, exceed a density of `targets` (by length): needs no profile.

    The message names the length that binds most, the least that is feasible there, and the cure.
    """
    price, bought = token_price(mix, geometry.head_dim), tokens_bought(targets, mix, geometry)
    # In tokens of the whole cache, as in `Usage.limits`; 1e-6 for floating-point rounding.
    heads = geometry.layers * geometry.kv_heads
    excess = {n: (least_density(geometry, n, min_span, engine) - asked) * n * heads - 1e-6 for n, asked in bought.items()}
    worst = max(excess, key=lambda n: excess[n] / n, default=None)
    if worst is not None and excess[worst] > 0:
        least = _rounded_up(price * least_density(geometry, worst, min_span, engine))
        held = f" in {engine.name} ({engine.told()})" if engine is not None else ""
        raise InfeasibleError(
            f"density {targets[worst]:.4g} at length {worst} is infeasible: min_span {min_span}{held} needs at least {least}; "
            f"{_cures(geometry, worst, bought[worst], min_span, sink_tokens, price, engine)}"
        )


def _cures(
    geometry: ModelGeometry, n_tokens: int, density: float, min_span: int, sink_tokens: int, price: float, engine: EngineLimits | None
) -> str:
    """What helps where the floor exceeds the share of the tokens `density`: a higher density, a lower floor, a lower sink with it, longer
    lengths; without those that do not help here."""

    def fits(n: int, floor: int) -> bool:
        return least_density(geometry, n, floor, engine) <= density

    cures = ["raise density"]
    floor = max((tokens for tokens in range(1, min_span) if fits(n_tokens, tokens)), default=0)
    if floor > sink_tokens:
        cures.append(f"lower min_span (--min-span) to at most {floor}")
    elif sink_tokens + 1 < min_span and (least := price * least_density(geometry, n_tokens, sink_tokens + 1, engine)) < 1:
        cures[0] += f" (to {_rounded_up(least)} with the lowest floor, --min-span {sink_tokens + 1})"
    if 0 < floor <= sink_tokens:
        cures.append(f"lower sink and floor (--sink {min(LOW_SINK, floor - 1)} --min-span {floor})")
    # Layers with windows of their own see no more at any length.
    if fits(geometry.max_length, min_span):
        cures.append("take longer lengths")
    return f"{', '.join(cures[:-1])}{',' * (len(cures) > 2)} or {cures[-1]}" if len(cures) > 1 else cures[0]


def densities(table: LossTable, density: Density, lengths: Iterable[int] | None = None) -> dict[int, float]:
    """Density limit per length: one number at every limit length, or a mapping as given. Raises ValueError outside (0, 1]."""
    if isinstance(density, Mapping):
        if lengths is not None:
            raise ValueError("lengths: give them as the keys of density, or density as one number, not both")
        return {n: check_density(density[n], f"density at length {n}") for n in limit_lengths(table, density)}
    return dict.fromkeys(limit_lengths(table, lengths), check_density(density))


def feasible(
    table: LossTable, density: Density, max_rules_per_layer: int | None = None, lengths: Iterable[int] | None = None,
    mix: Bits = WHOLE_BITS,
) -> dict[int, float]:  # fmt: skip
    """The share of the tokens that `densities` of the bytes hold in `mix`, checked against the shortest rules: raises InfeasibleError as
    `check_feasible` does."""
    targets = tokens_bought(densities(table, density, lengths), mix, table.geometry)
    check_feasible(table, Usage(table, targets).limits(targets), None, max_rules_per_layer, token_price(mix, table.geometry.head_dim))
    return targets


class Usage:
    """Share of the dense cache that is allocated for every rule of every head at the limit lengths; built once for all densities."""

    def __init__(self, table: LossTable, lengths: Iterable[int]) -> None:
        self.lengths = tuple(lengths)
        self._dense = np.array([table.dense_cost(n) for n in self.lengths], dtype=np.float64)
        slots = np.stack([np.repeat(table.slot_cost(n), table.geometry.kv_heads, axis=0) for n in self.lengths])
        self.usage = slots / self._dense[:, None, None]

    def limits(self, targets: Mapping[int, float]) -> Limits:
        """The limits of `densities`, whose lengths must be these."""
        asked = np.array([targets[n] for n in self.lengths])
        # Whole tokens, or bytes: a limit of 0.5 of an odd total must not be exceeded by half a token. 1e-6 for floating-point rounding.
        tokens = np.floor(asked * self._dense + 1e-6)
        return Limits(self.lengths, asked, self.usage, tokens / self._dense, 0.5 / self._dense)


def rules_in_a_layer(table: LossTable, most: int | None) -> int | None:
    """Distinct rules that a layer may have: `most`, and no more than the windows that the table's engine holds; None for any number."""
    engine = None if table.engine is None else table.engine.windows_per_layer
    if engine is None or engine >= table.geometry.kv_heads:
        return most
    return engine if most is None else min(most, engine)


def allowed_rules(table: LossTable, pinned: Pinned | None) -> np.ndarray:
    """Boolean (heads, R): every rule, but for pinned heads only theirs. Raises ValueError for an unknown head or rule."""
    geometry = table.geometry
    allowed = np.ones((geometry.layers * geometry.kv_heads, len(table.rules)), dtype=bool)
    for (layer, head), rule in (pinned or {}).items():
        if not (0 <= layer < geometry.layers and 0 <= head < geometry.kv_heads):
            raise ValueError(f"pinned: there is no (layer {layer}, KV head {head}) in {geometry}")
        if not 0 <= rule < len(table.rules):
            raise ValueError(f"pinned: rule index {rule} of (layer {layer}, KV head {head}) is not in 0..{len(table.rules) - 1}")
        allowed[layer * geometry.kv_heads + head] = False
        allowed[layer * geometry.kv_heads + head, rule] = True
    return allowed


def terms(table: LossTable, goal: Goal | None) -> Terms:
    """The arrays of a goal (None: the mean of the default goals). Raises ValueError for an objective that is not in the table."""
    goal = mean_goal(default_goals(table)) if goal is None else goal
    objectives = {objective.name: objective for objective in table.objectives}
    missing = sorted(set(goal.shares) - set(objectives))
    if missing:
        raise ValueError(f"goal {goal.name!r}: objective {missing[0]!r} is not in the table; it holds {sorted(objectives)}")
    heads = table.geometry.layers * table.geometry.kv_heads
    linear = np.zeros((heads, len(table.rules)))
    worst = []
    for name, share in goal.shares.items():
        rows = table.losses[slice(*objectives[name].rows)].reshape(-1, heads, len(table.rules))
        if len(rows) == 1:
            linear += share * rows[0]
        else:
            worst.append(WorstTerm(name, share, rows))
    return Terms(linear, tuple(worst))


def check_feasible(
    table: LossTable, limits: Limits, pinned: Pinned | None = None, max_rules_per_layer: int | None = None, price: float = 1.0
) -> None:
    """Raise InfeasibleError naming the first length whose limit no choice can keep, and the least feasible density there.

    price: the bytes of a token as it is stored, as a share of those in 16 bits, by which the message counts.
    """
    if max_rules_per_layer is not None and max_rules_per_layer < 1:
        raise ValueError(f"max_rules_per_layer must be at least 1 or None, got {max_rules_per_layer}")
    allowed = allowed_rules(table, pinned).reshape(table.geometry.layers, table.geometry.kv_heads, -1)
    if max_rules_per_layer is not None:
        allowed = _within_rule_limit(allowed, pinned or {}, max_rules_per_layer)
    usage = limits.usage.reshape(len(limits.usage), *allowed.shape)
    # Within a layer all heads have the same spans, so one cheapest rule serves its free heads, whatever the rule limit.
    least = np.where(allowed[None], usage, np.inf).min(axis=3).sum(axis=(1, 2))
    for n, asked, lowest, limit, slack in zip(limits.lengths, limits.asked, least, limits.limit, limits.slack, strict=True):
        if lowest > limit + slack:
            why = f"min_span {table.min_span}" + (" with the pinned heads" if pinned else "")
            why += f" in {table.engine.name} ({table.engine.told()})" if table.engine is not None else ""
            raise InfeasibleError(
                f"density {price * asked:.4g} at length {n} is infeasible: {why} needs at least {_rounded_up(price * lowest)}; "
                f"raise density{', unpin a head' if pinned else ''} or lower min_span (--min-span)"
            )


def _within_rule_limit(allowed: np.ndarray, pinned: Pinned, most: int) -> np.ndarray:
    """Where pinned heads use all the rules a layer may have, its other heads are limited to those."""
    allowed = allowed.copy()
    for layer in range(len(allowed)):
        used = sorted({rule for (at, _), rule in pinned.items() if at == layer})
        if len(used) > most:
            raise InfeasibleError(
                f"max_rules_per_layer {most}: layer {layer} has heads pinned to {len(used)} rules; unpin some or allow {len(used)} rules"
            )
        if len(used) == most:
            keep = np.zeros(allowed.shape[2], dtype=bool)
            keep[used] = True
            allowed[layer] &= keep
    return allowed


def _rounded_up(density: float) -> str:
    """Rounded up to four decimals, so that the printed density is feasible."""
    return f"{math.ceil(density * 1e4 - 1e-9) / 1e4:.4g}"
