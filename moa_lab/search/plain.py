"""Simple plans, which every search must beat: uniform spans, a span per layer, whole heads, and all subsets of few far-seeing heads."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain, combinations, permutations

import numpy as np

from moa_lab.engines import EngineLimits, meets
from moa_lab.plan import Bits, Plan, SpanRule, token_price, uniform_plan
from moa_lab.records import LossTable
from moa_lab.search.goals import QUESTIONS, default_goals, mean_goal
from moa_lab.search.milp import solve_milp
from moa_lab.search.problem import InfeasibleError, NoPlanError
from moa_lab.search.ranked import FLOORS, head_scores, ranked_plan
from moa_lab.search.spend import spend

logger = logging.getLogger(__name__)

UNIFORM, LAYERS, WHOLE, FAR = "uniform", "layers", "ranked", "far"
SIMPLE = (UNIFORM, LAYERS, WHOLE, FAR)
"""Origins of simple plans: one span for all, a span per layer, whole heads over a floor, whole far-seeing heads where few are."""
FEW = 4
"""So many far-seeing heads are few: every subset of them is tried (15)."""
FLOOR_SHARES = (0.5, 0.75)
"""Floors of whole-heads plans that grow with the length, as shares of the density: what they take, whole heads cannot."""


def simple_plans(
    table: LossTable, targets: Mapping[int, float], time_limit_s: float = 10.0, cancel: threading.Event | None = None
) -> Iterator[Plan]:
    """Simple plans that keep the densities `targets` (by length) as nearly as they can: uniform, a span per layer, far-seeing heads.

    time_limit_s: for the plan of a span per layer.
    """
    yield _uniform(table, targets)
    yield from _layers(table, targets, time_limit_s, cancel)
    yield from _far(table, targets)


def whole_heads(table: LossTable, targets: Mapping[int, float]) -> list[Plan]:
    """The heads with the most influence on questions whole, the others at a floor: constant ones, and some that grow with the length.

    Of a table of several mixes of bits: whole heads in each, the others in each other one; what is predicted to lose least comes first.
    """
    if len(table.mixes) == 1:
        return _whole_heads(table, targets, None)
    plans = [plan for mixes in permutations(table.mixes, 2) for plan in _whole_heads(table, targets, mixes)]
    goal = mean_goal(default_goals(table))

    def lost(plan: Plan) -> float:
        wide = table.with_plans(plan)
        return goal.value(wide.predict(wide.choice(plan)))

    return sorted(plans, key=lost)


def _whole_heads(table: LossTable, targets: Mapping[int, float], mixes: tuple[Bits, Bits] | None) -> list[Plan]:
    """mixes: bits of whole heads and of the others."""
    tokens = min(targets.values()) / (1.0 if mixes is None else token_price(mixes[1], table.geometry.head_dim))
    shares = [SpanRule(0.0, min(share * tokens, 1.0)) for share in FLOOR_SHARES]
    floors = [SpanRule(float(tokens), 0.0) for tokens in sorted({table.min_span, *FLOORS})]
    plans = []
    for floor in (floors[0], *shares, *floors[1:]):
        try:
            plan = ranked_plan(table.with_rules([floor]), targets, floor_tokens=floor, mixes=mixes)
            plans.append(spend(plan, targets, engine=table.engine))
        except ValueError as error:
            logger.info("no plan of whole heads over %s: %s", floor, error)
    return plans


def far_heads(table: LossTable) -> list[tuple[int, int]]:
    """(layer, kv_head) pairs that see further than the layers with windows of their own; none where no layer has one."""
    windows = table.geometry.layer_windows
    if not any(windows):
        return []
    return [(layer, head) for layer, window in enumerate(windows) if window is None for head in range(table.geometry.kv_heads)]


def _uniform(table: LossTable, targets: Mapping[int, float]) -> Plan:
    if len(set(targets.values())) == 1:
        plan = uniform_plan(table.geometry, next(iter(targets.values())), targets, min_span=table.min_span, sink_tokens=table.sink_tokens)
        # Where layers have windows of their own, or an engine allocates more than it keeps, a uniform plan may take more at some lengths.
        if _within(plan, targets, table.engine):
            return plan
    return replace(spend(_floor(table, UNIFORM), targets, engine=table.engine), name=UNIFORM)


def _within(plan: Plan, targets: Mapping[int, float], engine: EngineLimits | None) -> bool:
    return all(plan.density(n) <= asked * (1 + 1e-6) for n, asked in targets.items()) and (engine is None or meets(plan, engine, targets))


def _layers(table: LossTable, targets: Mapping[int, float], time_limit_s: float, cancel: threading.Event | None) -> Iterator[Plan]:
    """The least predicted loss with one span per layer, as in SqueezeAttention (arXiv 2404.04793) and PyramidKV (arXiv 2406.02069)."""
    try:
        answer = solve_milp(table, dict(targets), max_rules_per_layer=1, time_limit_s=time_limit_s, mip_gap=1e-2, cancel=cancel)
    except (InfeasibleError, NoPlanError) as error:
        logger.info("no plan with a span per layer: %s", error)
        return
    found = table.plan(answer.choice, LAYERS, lengths=tuple(targets), search={"origin": LAYERS, "gap": answer.gap})
    yield spend(found, targets, engine=table.engine)


def _far(table: LossTable, targets: Mapping[int, float]) -> Iterator[Plan]:
    """Some far-seeing heads as whole as the budget allows, the others at the floor, and what is left for these."""
    heads = far_heads(table)
    if not heads:
        return
    for chosen in _subsets(table, heads):
        mask = np.zeros((table.geometry.layers, table.geometry.kv_heads), dtype=bool)
        mask[tuple(np.array(chosen).T)] = True
        name = "far-" + "+".join(f"{layer}.{head}" if table.geometry.kv_heads > 1 else str(layer) for layer, head in chosen)
        grown = spend(spend(_floor(table, FAR), targets, mask, table.engine), targets, ~mask, table.engine)
        yield replace(grown, name=name if len(chosen) <= FEW else f"far-{len(chosen)}")


def _subsets(table: LossTable, heads: list[tuple[int, int]]) -> list[tuple[tuple[int, int], ...]]:
    """All subsets of few heads; of many the first by influence on questions, in four numbers."""
    if len(heads) <= FEW:
        return list(chain.from_iterable(combinations(heads, count) for count in range(1, len(heads) + 1)))
    scores = head_scores(table, QUESTIONS, SpanRule(float(table.min_span), 0.0)).reshape(table.geometry.layers, -1)
    ranked = sorted(heads, key=lambda head: -scores[head])
    return [tuple(sorted(ranked[:count])) for count in dict.fromkeys(max(1, len(heads) * share // 4) for share in (1, 2, 3, 4))]


def _floor(table: LossTable, origin: str) -> Plan:
    rule = SpanRule(float(table.min_span), 0.0)
    rules = ((rule,) * table.geometry.kv_heads,) * table.geometry.layers
    return Plan(
        geometry=table.geometry, rules=rules, sink_tokens=table.sink_tokens, min_span=table.min_span, name=origin,
        search={"origin": origin}, provenance=table.provenance,
    )  # fmt: skip
