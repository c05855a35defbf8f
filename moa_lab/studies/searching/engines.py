"""Engines hold few windows: a plan searched for what they hold, against the best plan rounded up to it, at equal allocated bytes.

Windows are fixed when an engine starts, so all is done at one length. Rounding is given what it needs: of the plans solved without limits
at many densities, the one of least predicted loss whose rounding allocates no more than the density. Both are solved for the mean of the
default goals at that length, without validation, and measured with the sink that some engines do not keep.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from moa_lab.engines import EngineLimits, engine_of, held, padded_plan
from moa_lab.pipeline import Run
from moa_lab.plan import Plan, dense_plan
from moa_lab.records import LossTable
from moa_lab.search import BudgetSolver, Goal, InfeasibleError, NoPlanError, default_goals, loss_table, mean_goal, solve_milp
from moa_lab.search.front import plan_point
from moa_lab.search.holding import for_all_heads, held_table
from moa_lab.search.spend import spend
from moa_lab.studies.gains import Gain, gains, unequal
from moa_lab.studies.plans import DOCUMENTS, NEEDLES, SUMMARIES, record_of
from moa_lab.studies.record import StudyRecord
from moa_lab.studies.scale import Scale

LIMITS: Mapping[str, str] = {
    "layers": "windows_per_layer=1", "one": "windows_per_model=1,windows_per_layer=1", "three": "windows_per_model=3",
}  # fmt: skip
"""Engines compared, by a word in the names of plans: any window per layer (vLLM, TensorRT-LLM); one window for some layers, others whole
(transformers, SGLang, llama.cpp); three windows for any heads beside whole ones."""
DENSITIES_TRIED, LEAST_SHARE = 60, 0.1
"""Of plans that are rounded: so many, from the budget downwards in equal ratios to this share of it."""


def engines(run: Run, scale: Scale) -> StudyRecord:
    """Needles, documents and own answers at the longest tested length, with the predicted losses of both plans in the settings."""
    length = max(run.test_lengths)
    table = loss_table(run.profile(), min_span=run.settings.min_span, use_lengths=(length,))
    plans, left_out = engine_plans(table, scale.density, length, scale.search_seconds)
    rows = run.measure([dense_plan(run.geometry), *plans.values()], lengths=(length,), tasks=(NEEDLES, DOCUMENTS, SUMMARIES))
    found = gains(rows, [(f"searched-{word}", f"rounded-{word}") for word in LIMITS if f"searched-{word}" in plans], (length,))
    predicted = {name: predicted_loss(table, plan, length) for name, plan in plans.items()}
    return record_of(
        run, "engines", "Is a plan searched for what an engine holds better than one rounded up to it, at equal allocated bytes?",
        engines_answer(found, predicted, length, scale.density), [*rows, *(one.row() for one in found)],
        density=scale.density, limits=dict(LIMITS), left_out=left_out, predicted=predicted, search_seconds=scale.search_seconds,
        allocated={name: plan.search["allocated"] for name, plan in plans.items()},
        solved={name: solved(plan, length) for name, plan in plans.items()},
    )  # fmt: skip


def engine_plans(table: LossTable, density: float, length: int, seconds: float) -> tuple[dict[str, Plan], dict[str, str]]:
    """Pairs of plans, `searched-` and `rounded-` and the word of `LIMITS`; and why others are left out. seconds: of each exact solve."""
    plans: dict[str, Plan] = {}
    left_out: dict[str, str] = {}
    for word, text in LIMITS.items():
        engine = engine_of(text)
        try:
            searched, rounded = _searched(table, engine, density, length, seconds), _rounded(table, engine, density, length)
        except (InfeasibleError, NoPlanError) as error:
            left_out[word] = str(error)
            continue
        for name, plan in ((f"searched-{word}", searched), (f"rounded-{word}", rounded)):
            plans[name] = replace(plan, name=name, search={**plan.search, "allocated": held(plan, engine, length).density})
    return plans, left_out


def goal_at(table: LossTable, length: int) -> Goal:
    """The mean of the default goals, of the objectives at one length of the table."""
    weights = {objective.name: float(objective.length == length) for objective in table.objectives}
    return mean_goal(default_goals(table, weights=weights))


def predicted_loss(table: LossTable, plan: Plan, length: int) -> float:
    """`goal_at` of a plan: 1 for the cheapest plan of the table, 0 for the dense one."""
    return goal_at(table, length).value(plan_point(table, plan, origin="", lengths=(length,)).predicted)


def solved(plan: Plan, length: int) -> dict[str, Any]:
    """How many heads have which span at `length`, by tokens; how a searched plan was solved, and what a rounded one kept before."""
    spans, heads = np.unique(plan.spans(length), return_counts=True)
    told: dict[str, Any] = {"heads": {str(int(span)): int(count) for span, count in zip(spans, heads, strict=True)}}
    return told | {key: plan.search[key] for key in ("gap", "status", "before") if key in plan.search}


def engines_answer(found: Sequence[Gain], predicted: Mapping[str, float], length: int, density: float) -> str:
    """What searching under the limits changed, by prediction and as measured."""
    if not found:
        return f"At a density of {density:.0%} no engine holds a plan."
    told = []
    for word in dict.fromkeys(one.plan.removeprefix("searched-") for one in found):
        losses = f"predicted loss {predicted[f'searched-{word}']:.3f} against {predicted[f'rounded-{word}']:.3f}"
        scores = ", ".join(f"{one.task} {one.verdict} ({one.numbers})" for one in found if one.plan == f"searched-{word}")
        told.append(f"{word}: {losses}, {scores}")
    start = f"At {density:.0%} allocated and {length:,} tokens, searched under the limits against rounded up to them: {'; '.join(told)}."
    return " ".join(filter(None, [start, unequal(found)]))


def _searched(table: LossTable, engine: EngineLimits, density: float, length: int, seconds: float) -> Plan:
    limited, targets = held_table(table, engine), {length: density}
    answer = solve_milp(limited, targets, goal=goal_at(table, length), time_limit_s=seconds)
    told = {"origin": "searched", "engine": engine.name, "gap": answer.gap, "status": answer.status}
    return for_all_heads(spend(limited.plan(answer.choice, "searched", search=told), targets, engine=engine), table)


def _rounded(table: LossTable, engine: EngineLimits, density: float, length: int) -> Plan:
    solver, plans = BudgetSolver(table, goal_at(table, length), (length,)), []
    for asked in density * np.geomspace(1.0, LEAST_SHARE, DENSITIES_TRIED):
        try:
            choice = solver.solve(float(asked)).choice
        except InfeasibleError:
            break
        exact = spend(table.plan(choice, "exact"), {length: float(asked)})
        if held(exact, engine, length).density <= density + 1e-9:
            told = {"origin": "rounded", "engine": engine.name, "before": exact.density(length)}
            plans.append(replace(padded_plan(exact, engine, length), search=told))
    if not plans:
        raise InfeasibleError(f"no plan rounded up to {engine.told()} allocates {density:.0%} of {length} tokens or less")
    return min(plans, key=lambda plan: predicted_loss(table, plan, length))
