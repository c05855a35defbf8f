"""Stages after the search: spans learned by descent, then a few heads moved at a time by measured losses, against the search alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from moa_lab.evaluate.compare import answers_way, difference, excess_over_dense, ratio, row_of, worst
from moa_lab.evaluate.intervals import Interval
from moa_lab.pipeline import Run
from moa_lab.plan import Plan
from moa_lab.records import FrontPoint, Measurement
from moa_lab.refinement import refine as improve
from moa_lab.search import InfeasibleError
from moa_lab.studies.plans import DOCUMENTS, NEEDLES, SUMMARIES, candidates_of, chosen_among, dense_and_uniform, name_of, record_of
from moa_lab.studies.record import StudyGoal, StudyRecord
from moa_lab.studies.scale import Scale

DENSITIES = (0.15, 0.2, 0.25, 0.5)
LONGEST = 4096
STAGES = ("ranked", "search", "learned", "refined")
REFINED_ON = 262_144
"""Tokens of the lessons (training samples) that losses are measured on."""
QUESTION = "How much better does a plan get when its spans are learned under the budget, and then moved by measured losses?"


def refine(run: Run, scale: Scale) -> StudyRecord:
    """Plans of every stage at some densities, each chosen on validation samples, measured on test samples at lengths up to 4k."""
    plans: list[Plan] = []
    left_out: dict[str, str] = {}
    densities = [density for density in DENSITIES if density in scale.densities] or list(scale.densities)
    for density in densities:
        try:
            plans += _stages(run.at(density), density, scale)
        except InfeasibleError as error:
            left_out[name_of("refined", density)] = str(error)
    lengths = [n for n in run.test_lengths if n <= LONGEST] or list(run.test_lengths)
    tasks = (NEEDLES, SUMMARIES, DOCUMENTS)
    last = [plan for plan in plans if plan.name.startswith(STAGES[-1])]
    rows = [*dense_and_uniform(run, last, lengths=lengths, tasks=tasks), *run.measure(plans, lengths=lengths, tasks=tasks)]
    done = [density for density in densities if name_of("refined", density) not in left_out]
    return record_of(
        run, "refine", QUESTION, refine_answer(rows, done, lengths), rows,
        refine_goals(rows, done, lengths, run.lengths), left_out=left_out, chosen=candidates_of(plans),
        densities=densities, stages=list(STAGES), refine_rounds=scale.refine_rounds, refine_heads=scale.refine_heads,
        learning_steps=run.preset.learning_steps,
    )  # fmt: skip


def _stages(run: Run, density: float, scale: Scale) -> list[Plan]:
    """The best plan of every stage by validation: ranked, searched, learned, and refined from the best of these."""
    front = run.front()
    parts: dict[str, list[FrontPoint]] = {name: [] for name in STAGES}
    for candidate in front:
        parts[candidate.origin if candidate.origin in STAGES else "search"].append(candidate)
    chosen = {name: chosen_among(run, replace(front, points=tuple(points)), name, density) for name, points in parts.items() if points}
    start = chosen_among(run, front, "draft", density)
    found = improve(
        run.model, start, run.lessons().limited(REFINED_ON), run.table(), run.limits, rounds=scale.refine_rounds,
        heads=scale.refine_heads, parts_dir=run.parts_dir("refine"),
        progress=lambda done, total: run.progress(f"refine {density:.0%}", done, total),
    )  # fmt: skip
    chosen["refined"] = chosen_among(run, replace(front, points=(*front, *found)), "refined", density)
    return list(chosen.values())


def refine_goals(
    rows: Sequence[Measurement], densities: Sequence[float], lengths: Sequence[int], profiled: Sequence[int]
) -> list[StudyGoal]:
    """Goals by density: no loss at 50%; no needles lost at 25%, own answers half-way to uniform; 0.9 of dense's needles at 20%."""
    goals: list[StudyGoal] = []
    for density in densities:
        plan = name_of("refined", density)
        percent = f"{density:.0%}"
        if density in (0.25, 0.5):
            lost = worst((_lost_needles(rows, plan, n) for n in lengths), at_most=True)
            goals.append(_nothing_lost(f"{percent}: needles lost against dense, lower end of the interval, worst length", lost))
        if density == 0.25:
            gone = worst((_half_way(rows, plan, density, n) for n in lengths), at_most=True)
            name = f"{percent}: cross-entropy of own answers, from dense (0) to uniform (1), worst length"
            goals.append(StudyGoal.of(name, gone, 0.5, at_most=True))
        if density == 0.2:
            among = [n for n in lengths if n in profiled] or lengths
            found = worst(ratio(row_of(rows, plan, NEEDLES, n), row_of(rows, "dense", NEEDLES, n)) for n in among)
            goals.append(StudyGoal.of(f"{percent}: needles found, of those the dense model finds, worst profiled length", found, 0.9))
        if density == 0.5:
            excess = worst((excess_over_dense(rows, plan, task, n) for task in (DOCUMENTS, SUMMARIES) for n in lengths), at_most=True)
            goals.append(
                _nothing_lost(f"{percent}: perplexity above the dense model's, lower end of the interval, worst task and length", excess)
            )
    return goals


def _nothing_lost(name: str, lost: Interval) -> StudyGoal:
    """Met where the interval of the loss reaches 0: no interval can prove that nothing is lost."""
    return replace(StudyGoal.of(name, lost, 0.0, at_most=True), value=lost.low if math.isfinite(lost.low) else lost.value)


def _half_way(rows: Sequence[Measurement], plan: str, density: float, length: int) -> Interval:
    return answers_way(rows, plan, name_of("uniform", density), length)


def _lost_needles(rows: Sequence[Measurement], plan: str, length: int) -> Interval:
    return difference(row_of(rows, "dense", NEEDLES, length), row_of(rows, plan, NEEDLES, length))


def refine_answer(rows: Sequence[Measurement], densities: Sequence[float], lengths: Sequence[int]) -> str:
    """A clause for every density: needles of each stage at the longest length, and whether the last gains on the search alone."""
    if not densities:
        return "No density was feasible."
    length = max(lengths)
    parts = []
    for density in densities:
        scores = {name: _score(rows, name_of(name, density), length) for name in STAGES}
        told = ", ".join(f"{name} {score:.2f}" for name, score in scores.items() if score is not None)
        parts.append(f"{density:.0%} kept: {told}{_gain(rows, density, length)}")
    dense = row_of(rows, "dense", NEEDLES, length).value
    return f"Needles found at {length:,} tokens (dense {dense:.2f}): {'; '.join(parts)}."


def _gain(rows: Sequence[Measurement], density: float, length: int) -> str:
    try:
        before = row_of(rows, name_of("search", density), NEEDLES, length)
    except KeyError:
        return ""
    gain = difference(row_of(rows, name_of("refined", density), NEEDLES, length), before)
    verdict = "more than the search alone" if gain.low > 0 else "fewer than the search alone" if gain.high < 0 else "no difference decided"
    return f" ({verdict})"


def _score(rows: Sequence[Measurement], plan: str, length: int) -> float | None:
    scores: Mapping[str, float] = {row.plan: row.value for row in rows if row.task == NEEDLES and row.length == length}
    return scores.get(plan)
