"""Which objective to minimise, and with which solver: predicted against measured losses."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from moa_lab.pipeline import Run
from moa_lab.plan import Plan, dense_plan
from moa_lab.profiling.gates import train_gates
from moa_lab.records import Front, FrontPoint, LossTable, Measurement
from moa_lab.search import (
    BudgetSolver,
    Goal,
    InfeasibleError,
    WholeHeads,
    default_goals,
    epsilon_front,
    evolve,
    front_values,
    hypervolume,
    loss_table,
    mean_goal,
    paper_goals,
    ranked_plan,
)
from moa_lab.search import search as searched
from moa_lab.search.front import point, undominated
from moa_lab.search.goals import QUESTIONS
from moa_lab.studies.gains import gain, listed
from moa_lab.studies.plans import DOCUMENTS, NEEDLES, SUMMARIES, equal_uniform, record_of, solved_plan
from moa_lab.studies.predicting.predictions import predictions
from moa_lab.studies.record import StudyGoal, StudyRecord
from moa_lab.studies.scale import Scale

FLOOR_TOKENS = 192
GATE_STEPS, GATE_TOKENS = 80, 131_072
HALF = 0.5
"""Predictors are tried at this density too: at a lower one random plans lie closer together."""
MEASURED_POINTS = 5
"""Plans of every front that validation measures."""


def search(run: Run, scale: Scale) -> StudyRecord:
    """Objectives, solvers at equal time, and predictors, at `scale.density`."""
    try:
        density, table = run.at(scale.density).limits, run.table()
        plans = _objectives(run, table, density, scale)
    except InfeasibleError as error:
        return record_of(run, "search", QUESTION, f"Not answered: {error}.", (), density=scale.density)
    lengths, tasks = run.lengths, (NEEDLES, SUMMARIES, DOCUMENTS)
    rows = run.measure([dense_plan(run.geometry), *plans], lengths=lengths, tasks=tasks)
    for length in lengths:
        rows += run.measure([equal_uniform(plans[0], length, "uniform")], lengths=[length], tasks=tasks)
    volumes, chosen = _solvers(run, table, density, scale)
    rows += [*volumes, *run.measure(chosen, lengths=lengths, tasks=tasks)]
    correlations = [row for share in dict.fromkeys((scale.density, HALF)) for row in predictions(run, share, scale.random_plans)]
    rows += correlations
    goals = search_goals(correlations)
    answer = search_answer([plan.name for plan in plans], rows, correlations)
    return record_of(run, "search", QUESTION, answer, rows, goals, density=scale.density, random_plans=scale.random_plans,
                     search_seconds=scale.search_seconds, floor_tokens=FLOOR_TOKENS, gate_steps=_gate_steps(scale),
                     learning_steps=run.preset.learning_steps)  # fmt: skip


QUESTION = "Which objective, which solver, and does a better prediction mean a better plan?"
GOAL = "rank correlation of predicted and measured loss of random plans of equal density, best predictor ({}), where it is lower ({})"


def search_goals(correlations: Sequence[Measurement]) -> list[StudyGoal]:
    """The predictor whose lowest correlation over the densities is highest: the best at one density alone may be so by chance."""
    lower: dict[str, Measurement] = {}
    for row in correlations:
        lower[row.plan] = min(lower.get(row.plan, row), row, key=lambda each: each.value)
    best = max(lower.values(), key=lambda row: row.value)
    return [StudyGoal(GOAL.format(best.plan, best.task), best.value, 0.8, low=best.low, high=best.high, n=best.n)]


def search_answer(objectives: Sequence[str], rows: Sequence[Measurement], correlations: Sequence[Measurement]) -> str:
    """A sentence each on objectives, solvers and predictors. rows: of plans by name; correlations: one row per predictor and density."""
    found = {name: _mean_score(rows, name, "retrieval") for name in objectives}
    best = max(found, key=lambda name: found[name])
    paper = next(name for name in objectives if name.startswith("element"))
    lengths = sorted({row.length for row in rows if row.plan == best and row.task == NEEDLES})
    ahead = gain(rows, best, paper, NEEDLES, lengths)
    against = "which is the paper's own" if best == paper else (
        f"against {found[paper]:.2f} of the paper's ({paper}), a difference of {ahead.numbers} over {listed(lengths)}"
        f"{'' if ahead.decided else ', not decided'}"
    )  # fmt: skip
    volumes = sorted((row for row in rows if row.metric == "hypervolume"), key=lambda row: -row.value)
    solvers = f"at equal time {volumes[0].plan} covers most ({', '.join(f'{row.plan} {row.value:.3f}' for row in volumes)})"
    ranked = sorted(correlations, key=lambda row: -row.value)
    first, last = (f"{row.value:.2f}, {row.task}" for row in (ranked[0], ranked[-1]))
    told = f"{ranked[0].plan} predicts best (rank correlation {first}), {ranked[-1].plan} worst ({last})"
    equals = "; ".join(name for name in objectives if name != best and found[name] == found[best])
    score = f"{found[best]:.2f}" + (f", as many as by {equals}" if equals else "")
    most = f"Most needles are found by the plan of {best} ({score}), {against}" if found[best] else "No objective's plan finds a needle"
    return f"{most}; {solvers}; {told}."


def _mean_score(rows: Sequence[Measurement], name: str, metric: str) -> float:
    return float(np.mean([row.value for row in rows if row.plan == name and row.metric == metric and row.task == NEEDLES]))


def _objectives(run: Run, table: LossTable, density: Mapping[int, float], scale: Scale) -> list[Plan]:
    """A plan for every objective, and the learned ones; none is chosen by validation."""
    element = loss_table(run.profile(), table.rules, estimator="element")
    ways: dict[str, tuple[LossTable, Sequence[Goal]]] = {
        "element, sum": (element, paper_goals(element)),
        "span, sum": (table, paper_goals(table)),
        "all or nothing": (table, default_goals(table, forms={o.task: "all_or_nothing" for o in table.objectives})),
        "worst distance": (table, default_goals(table, forms={o.task: "worst_distance" for o in table.objectives})),
        "all or nothing + sum": (table, default_goals(table)),
        "worst distance + sum": (table, default_goals(table, forms={QUESTIONS: "worst_distance"})),
    }
    plans = [solved_plan(of, density, name, goals) for name, (of, goals) in ways.items()]
    plans.append(ranked_plan(table, density, floor_tokens=FLOOR_TOKENS, name="ranked"))
    gates = train_gates(
        run.model, run.samples().limited(GATE_TOKENS), steps=_gate_steps(scale), span_tokens=FLOOR_TOKENS, seed=run.settings.seed,
        progress=lambda done, total: run.progress("search: gates", done, total),
    )  # fmt: skip
    heads = WholeHeads(table, density, FLOOR_TOKENS)
    plans.append(table.plan(heads.choice(-gates.ravel()), "gates", search={"origin": "gates"}))
    return [*plans, *(one.plan for one in run.at(scale.density).learned())]


def _gate_steps(scale: Scale) -> int:
    return min(GATE_STEPS, scale.random_plans)


def _solvers(run: Run, table: LossTable, density: Mapping[int, float], scale: Scale) -> tuple[list[Measurement], list[Plan]]:
    """Hypervolume of every solver's front after the same time, and the plan of each that validation chooses."""
    goals, seconds = default_goals(table), scale.search_seconds
    names = [goal.name for goal in goals]
    ways: dict[str, Callable[[], Front]] = {
        "epsilon": lambda: epsilon_front(table, density, goals=goals, time_limit_s=seconds),
        "pymoo": lambda: _evolved(table, density, goals, seconds, run.settings.seed),
        "budget": lambda: _swept(table, density, goals, seconds, run.settings.seed),
        "search": lambda: searched(table, density, time_limit_s=seconds, seed=run.settings.seed),
    }
    rows, chosen = [], []
    for done, (name, solve) in enumerate(ways.items()):
        run.progress("search: solvers", done, len(ways))
        began = time.perf_counter()
        front = solve()
        took = time.perf_counter() - began
        # A goal is 1 where every head has the cheapest rule.
        volume = hypervolume(front_values(front.points, names), np.ones(len(names)))
        rows.append(_volume_row(name, volume, len(front), took))
        chosen.append(replace(run.validation(_thinned(front, names), name).best, name=name))
    run.progress("search: solvers", len(ways), len(ways))
    return rows, chosen


def _evolved(table: LossTable, density: Mapping[int, float], goals: Sequence[Goal], seconds: float, seed: int) -> Front:
    stop = threading.Event()
    timer = threading.Timer(seconds, stop.set)
    timer.start()
    try:
        return evolve(table, density, goals=goals, generations=10_000, seed=seed, cancel=stop)
    finally:
        timer.cancel()


def _swept(table: LossTable, density: Mapping[int, float], goals: Sequence[Goal], seconds: float, seed: int) -> Front:
    """Budget solves at random weights of the goals, until the time is up."""
    rng, end = np.random.default_rng(seed), time.perf_counter() + seconds
    points: list[FrontPoint] = []
    while not points or time.perf_counter() < end:
        weights = dict(zip((goal.name for goal in goals), rng.dirichlet(np.ones(len(goals))) + 1e-3, strict=True))
        answer = BudgetSolver(table, mean_goal(goals, weights), density).solve(density)
        points.append(point(table, answer.choice, name=f"budget-{len(points) + 1}", origin="budget", lengths=density, goals=goals))
    names = tuple(goal.name for goal in goals)
    return Front(tuple(undominated(points, names)), names, {}, table.provenance)


def _thinned(front: Front, names: Sequence[str]) -> Front:
    """Plans that spread over the front from the best mean of the goals on: at most `MEASURED_POINTS`."""
    order = np.argsort(front_values(front.points, names).mean(axis=1), kind="stable")
    picks = order[np.unique(np.linspace(0, len(order) - 1, min(MEASURED_POINTS, len(order))).round().astype(int))]
    return replace(front, points=tuple(front.points[int(index)] for index in picks))


def _volume_row(name: str, volume: float, plans: int, seconds: float) -> Measurement:
    return Measurement(name, "hypervolume", "front", 0, volume, plans, volume, volume, 0.0, {"seconds": seconds, "plans": plans})


def solver_table(record: StudyRecord, lengths: Sequence[int]) -> pd.DataFrame:
    """Every solver's front and seconds, and the mean scores of the plan that was chosen from it, over all of `lengths`."""
    return pd.DataFrame(
        {
            row.plan: {
                "hypervolume of the front": f"{row.value:.3f}",
                "plans": f"{row.detail['plans']:,}",
                "seconds": f"{row.detail['seconds']:.1f}",
                **_mean_scores(record, row.plan, lengths),
            }
            for row in record.select(metric="hypervolume")
        }
    ).T


MINIMISED = {
    "element, sum": "element, sum", "span, all or nothing": "all or nothing", "span, default": "all or nothing + sum",
    "span, sum": "span, sum", "span, worst distance": "worst distance", "slopes under drawn plans": "learned",
}  # fmt: skip
"""By predictor, the plan that minimises what it predicts."""


def predictor_table(record: StudyRecord, density: str, lengths: Sequence[int]) -> pd.DataFrame:
    """Predictors by their rank correlation with measured losses of random plans of `density` ("25%"), beside the plans that minimise
    them and what these score, over all of `lengths`; the best predictor last.
    """
    ranks = {row.plan: row.value for row in record.select(metric="rank_correlation") if row.task.split()[-1] == density}
    told = {
        name: {"predicts, rank correlation": f"{ranks[name]:.2f}", "plan": plan, **_mean_scores(record, plan, lengths)}
        for name, plan in sorted(MINIMISED.items(), key=lambda pair: ranks[pair[0]])
    }
    return pd.DataFrame(told).T


def _mean_scores(record: StudyRecord, plan: str, lengths: Sequence[int]) -> dict[str, str]:
    metrics = {NEEDLES: "retrieval", DOCUMENTS: "cross_entropy", SUMMARIES: "cross_entropy"}
    return {task: f"{record.mean_score(plan, task, metric, lengths):.3f}" for task, metric in metrics.items()}
