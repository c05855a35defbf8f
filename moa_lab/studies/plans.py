"""The plans that studies compare: dense, uniform of equal bytes, chosen by validation, and from a single solve."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace

import numpy as np

from moa_lab.pipeline import Run
from moa_lab.plan import Plan, SpanRule, dense_plan, uniform_plan
from moa_lab.records import Front, LossTable, Measurement
from moa_lab.search import Goal, InfeasibleError, default_goals, mean_goal, solve_budget
from moa_lab.search.problem import Density
from moa_lab.studies.record import StudyGoal, StudyRecord

NEEDLES, LINES, DOCUMENTS, SUMMARIES = "needles", "lines", "documents", "summaries"
"""Tasks of the test samples: `Suites.test`."""


def name_of(kind: str, density: float) -> str:
    """For instance `moa-25` for 0.25."""
    return f"{kind}-{100 * density:g}"


def chosen_plans(run: Run, densities: Iterable[float]) -> tuple[dict[float, Plan], dict[str, str]]:
    """The measured choice of the pipeline at every density that is feasible; and, by name, why the others are left out."""
    plans, left_out = {}, {}
    for density in densities:
        name = name_of("moa", density)
        try:
            plans[density] = replace(run.at(density).plan(), name=name)
        except InfeasibleError as error:
            left_out[name] = str(error)
    return plans, left_out


def check_some_feasible(run: Run, densities: Iterable[float]) -> None:
    """Raise InfeasibleError where none of the densities is feasible; single ones that are not, a study leaves out by itself."""
    refused = None
    for density in sorted(densities, reverse=True):
        try:
            run.at(density)
            return
        except InfeasibleError as error:
            refused = refused or error
    if refused is not None:
        raise refused


def chosen_among(run: Run, front: Front, kind: str, density: float) -> Plan:
    """The plan of `front` that loses least on validation samples, under the name of its kind and density."""
    return replace(run.validation(front, kind).best, name=name_of(kind, density))


def candidates_of(plans: Iterable[Plan]) -> dict[str, str]:
    """Names of the candidates that validation chose, by the name of the plan."""
    return {plan.name: plan.search["candidate"] for plan in plans if "candidate" in plan.search}


def solved_plan(table: LossTable, density: Density, name: str, goals: Sequence[Goal] | None = None) -> Plan:
    """One Lagrangian solve for the mean of `goals` (None: the default ones), without validation."""
    answer = solve_budget(table, density, goal=mean_goal(default_goals(table) if goals is None else goals))
    return table.plan(answer.choice, name, search={"origin": name, "gap": answer.gap})


def equal_uniform(plan: Plan, length: int, name: str) -> Plan:
    """The uniform plan (StreamingLLM, arXiv 2309.17453) that keeps as many tokens at `length` as `plan`, rounded down per head.

    A layer with a window of its own keeps the same share of that.
    """
    geometry = plan.geometry
    span = float(np.floor(plan.spans(length).mean()))
    spans = [span] * geometry.layers
    if any(geometry.dense_span_tokens(layer, length) < length for layer in range(geometry.layers)):
        same = uniform_plan(geometry, plan.density(length), [length], sink_tokens=plan.sink_tokens, min_span=plan.min_span)
        spans = [float(row[0]) for row in same.spans(length)]
    rules = tuple((SpanRule(own, 0.0),) * geometry.kv_heads for own in spans)
    return replace(plan, rules=rules, name=name, search={"origin": "uniform"}, scores={})


def dense_and_uniform(
    run: Run, plans: Iterable[Plan], *, lengths: Sequence[int] | None = None, tasks: Sequence[str] | None = None
) -> list[Measurement]:
    """Rows of the dense model and, for every plan `KIND-25`, of `uniform-25` with the bytes of that plan at each length."""
    lengths = run.test_lengths if lengths is None else tuple(dict.fromkeys(lengths))
    rows = run.measure([dense_plan(run.geometry)], lengths=lengths, tasks=tasks)
    for plan in plans:
        name = f"uniform-{plan.name.rpartition('-')[2]}"
        for length in lengths:
            rows += run.measure([equal_uniform(plan, length, name)], lengths=[length], tasks=tasks)
    return rows


def record_of(
    run: Run, name: str, question: str, answer: str, rows: Sequence[Measurement], goals: Sequence[StudyGoal] = (), **settings: object
) -> StudyRecord:
    """A study's record with the settings and the provenance of its run."""
    told = {**settings, "run": asdict(run.settings), "profiled_lengths": list(run.lengths), "test_lengths": list(run.test_lengths)}
    return StudyRecord(name, question, answer, tuple(rows), tuple(goals), told, run.origin())
