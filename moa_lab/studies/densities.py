"""What a density costs: dense, uniform and searched plans at equal KV bytes, over lengths and densities.

Plans are searched and chosen on calibration and validation texts and wordings; what is measured here they never saw.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace

from moa_lab.pipeline import Run
from moa_lab.plan import Plan, dense_plan, uniform_plan
from moa_lab.records import Measurement
from moa_lab.search import InfeasibleError
from moa_lab.studies.record import StudyGoal, StudyRecord

DENSITIES = (0.125, 0.15, 0.2, 0.25, 0.35, 0.5, 0.75)
EFFECTIVE = 0.9
"""A context is effective while retrieval stays at least here (arXiv 2406.14909, sec. 5)."""
PUBLISHED_REACH = 3.9
"""Effective context over mean span in the paper."""
LONGEST_OF_GOALS = 4096


def retrieval(run: Run, densities: Sequence[float] = DENSITIES) -> StudyRecord:
    """Needles and lines found under plans of every density that is feasible, at the tested lengths of `run`."""
    plans, left_out = _plans(run, densities)
    rows = tuple(row for row in run.measure(plans) if row.metric == "retrieval")
    reach = {name: _reach(name, rows) for name in dict.fromkeys(row.plan for row in rows) if name != "dense"}
    return _record(
        run, "retrieval", "How much can be dropped before what lies far back is not found any more?", retrieval_answer(reach), rows,
        retrieval_goals(rows, reach), {"densities": list(densities), "left_out": left_out},
    )  # fmt: skip


def retrieval_goals(rows: Sequence[Measurement], reach: Mapping[str, tuple[int, float]]) -> list[StudyGoal]:
    """The goals that `rows` say something of. reach: see `_reach`."""
    needles = {(row.plan, row.length): row.value for row in rows if row.task == "needles" and row.length <= LONGEST_OF_GOALS}
    half = [_ratio(value, needles["dense", length]) for (plan, length), value in needles.items() if plan == _name("moa", 0.5)]
    goals = [StudyGoal("50%: needles found, of those the dense model finds, worst length to 4k", min(half), 0.95)] if half else []
    furthest = max((ratio for name, (_, ratio) in reach.items() if name.startswith("moa")), default=None)
    if furthest is not None:
        goals.append(StudyGoal("effective context over mean span, best density", furthest, PUBLISHED_REACH))
    return goals


def retrieval_answer(reach: Mapping[str, tuple[int, float]]) -> str:
    """A sentence. reach: see `_reach`."""
    searched = {name: found for name, found in reach.items() if name.startswith("moa")}
    if not searched:
        return "No density was feasible."
    best = max(searched, key=lambda name: searched[name][1])
    length, ratio = searched[best]
    if not length:
        return f"No plan finds {EFFECTIVE:.0%} of the needles at the shortest length."
    uniform = max((ratio for name, (_, ratio) in reach.items() if name.startswith("uniform")), default=0.0)
    others = f"reach {uniform:.1f} times theirs" if uniform else "do not at any length or density"
    return (
        f"{best} reaches furthest for what it keeps: {EFFECTIVE:.0%} of the needles are found up to {length:,} tokens, "
        f"{ratio:.1f} times its mean span there (the paper: {PUBLISHED_REACH}); uniform spans {others}."
    )


def quality(run: Run, densities: Sequence[float] = DENSITIES) -> StudyRecord:
    """Cross-entropy (nats per token) of held-out documents and of the dense model's own answers, under the same plans."""
    plans, left_out = _plans(run, densities)
    rows = tuple(row for row in run.measure(plans) if row.metric == "cross_entropy")
    found = {(row.plan, row.task, row.length): row.value for row in rows}
    tasks = sorted({row.task for row in rows})

    def excess(plan: str, task: str, lengths: Iterable[int]) -> float:
        """Perplexity above the dense model's, as a fraction, at the worst length."""
        return max(math.expm1(found[plan, task, n] - found["dense", task, n]) for n in lengths)

    goals, lengths = [], [n for n in run.test_lengths if n <= LONGEST_OF_GOALS]
    if 0.5 in densities and _name("moa", 0.5) not in left_out and lengths:
        worst = {task: excess(_name("moa", 0.5), task, lengths) for task in tasks}
        named = "50%: perplexity of {} above the dense model's, worst length to 4k"
        goals = [StudyGoal(named.format(task), worst[task], 0.02, at_most=True) for task in tasks]
    parts = []
    for density in (d for d in densities if _name("moa", d) not in left_out):
        costs = [f"{_worse(excess(_name(kind, density), tasks[0], run.test_lengths))} ({kind})" for kind in ("moa", "uniform")]
        parts.append(f"{density:.1%} kept: {' and '.join(costs)}")
    answer = (
        f"Perplexity of {tasks[0]} at the worst length, against the dense model: {'; '.join(parts)}."
        if parts
        else "No density was feasible."
    )
    return _record(run, "quality", "What does a density cost where nothing particular is looked for?", answer, rows, goals, {
        "densities": list(densities), "left_out": left_out,
    })  # fmt: skip


def _plans(run: Run, densities: Sequence[float]) -> tuple[list[Plan], dict[str, str]]:
    """Dense, then a uniform and a chosen plan per density; and, by name, why a plan is left out."""
    lengths = run.test_lengths
    plans, left_out = [dense_plan(run.geometry, lengths)], {}
    for density in densities:
        try:
            chosen = run.at(density).plan()
        except InfeasibleError as error:
            left_out[_name("moa", density)] = str(error)
            continue
        plans.append(replace(uniform_plan(run.geometry, density, lengths), name=_name("uniform", density)))
        plans.append(replace(chosen, name=_name("moa", density)))
    return plans, left_out


def _name(kind: str, density: float) -> str:
    return f"{kind}-{100 * density:g}"


def _reach(plan: str, rows: Sequence[Measurement]) -> tuple[int, float]:
    """The longest length up to which every tested one keeps its needles, and that length over the mean span; zeros where none does."""
    longest = (0, 0.0)
    for row in sorted((row for row in rows if row.plan == plan and row.task == "needles"), key=lambda row: row.length):
        if row.value < EFFECTIVE:
            break
        longest = (row.length, 1 / row.density)
    return longest


def _ratio(value: float, of: float) -> float:
    return value / of if of else 1.0


def _worse(fraction: float) -> str:
    return f"{100 * fraction:+.1f}%"


def _record(
    run: Run, name: str, question: str, answer: str, rows: tuple[Measurement, ...], goals: Sequence[StudyGoal], settings: dict[str, object]
) -> StudyRecord:
    told = {**settings, "run": asdict(run.settings), "profiled_lengths": list(run.lengths), "test_lengths": list(run.test_lengths)}
    return StudyRecord(name, question, answer, rows, tuple(goals), told, run.origin())
