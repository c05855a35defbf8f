"""How well a plan's loss is predicted at a length that nobody profiled.

What is measured is kept in the run's folder as it is made: answers and profiles sample by sample, losses plan by plan, sums of slopes every
half a minute. After a kill the same command goes on there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from moa_lab.calibration import calibrate
from moa_lab.calibration.samples import SampleSet
from moa_lab.evaluate.compare import spearman
from moa_lab.learning import mean_slopes
from moa_lab.pipeline import Run
from moa_lab.profiling import profile
from moa_lab.records import LossTable, Measurement
from moa_lab.search import InfeasibleError, default_goals, loss_table
from moa_lab.studies.plans import record_of
from moa_lab.studies.predicting.predictions import PLANS_DRAWN, SLOPE_STEPS, STEPS_PER_PLAN, measured_losses
from moa_lab.studies.predicting.predictors import chances_of, random_choices
from moa_lab.studies.record import StudyGoal, StudyRecord
from moa_lab.studies.scale import Scale

QUESTION = "How well is a plan's loss predicted at a length that nobody profiled?"
GOAL = "rank correlation of predicted and measured loss at {:,} tokens, random plans of equal density, {} ({})"
MOVED = "slopes of shorter texts, spans moved"
HALF = 0.5
FEW = 2
"""Samples a task of the cheap profile at the unseen length."""


def unseen(run: Run, scale: Scale) -> StudyRecord:
    """Predictors that never ran the longest validated length, and two that run it a little, at `scale.density` and a half.

    The samples of the cheap profile are calibrated and profiled once for both densities. Nothing else can be shared without measuring
    something else: the plans differ, and slopes of shorter texts, moved or not, draw the same texts and the same rules but run them with
    other windows. They have only the dense model's pass in common.
    """
    length = max(sample.length for sample in run.suites.validation)
    if length <= max(run.lengths):
        return record_of(
            run, "unseen", QUESTION, f"Not answered: the model goes no further than the profiled {max(run.lengths):,} tokens.", ()
        )
    try:
        limits = {share: run.at(share).limits for share in (scale.density, HALF)}
        few = _few(run, length)
        rows = [row for share, own in limits.items() for row in _correlations(run, length, share, own, scale.random_plans, few)]
    except InfeasibleError as error:
        return record_of(run, "unseen", QUESTION, f"Not answered: {error}.", (), density=scale.density)
    goals = [
        StudyGoal(GOAL.format(length, row.plan, row.task), row.value, 0.8, low=row.low, high=row.high, n=row.n)
        for row in rows if row.plan == MOVED
    ]  # fmt: skip
    return record_of(run, "unseen", QUESTION, unseen_answer(rows, length), rows, goals, random_plans=scale.random_plans, length=length)


def unseen_answer(rows: Sequence[Measurement], length: int) -> str:
    """A sentence for every density: all predictors, the best first."""
    told = []
    for task in dict.fromkeys(row.task for row in rows):
        ranked = sorted((row for row in rows if row.task == task), key=lambda row: -row.value)
        told.append(f"{task}: " + ", ".join(f"{row.plan} {row.value:.2f}" for row in ranked))
    return f"Rank correlation with the loss measured at {length:,} tokens. {'; '.join(told)}."


def _few(run: Run, length: int) -> SampleSet:
    """`FEW` samples a task at `length`."""
    wanted = [replace(request, count=min(FEW, request.count)) for request in run.wanted if request.count]
    return calibrate(
        run.model, run.tokenizer, [length], wanted=wanted, documents=run.documents["calibration"], seed=run.settings.seed + 1,
        batch_size=run.answer_batch, parts_dir=run.parts_dir("answers"),
    )  # fmt: skip


def _correlations(run: Run, length: int, density: float, limits: Mapping[int, float], plans: int, few: SampleSet) -> list[Measurement]:
    table, seed = run.table(), run.settings.seed
    choices = random_choices(table, limits, plans, seed)
    samples = [sample for sample in run.suites.validation if sample.length == length]
    losses = measured_losses(run, choices, samples, "unseen: random plans")
    found = {name: [predict(choice) for choice in choices] for name, predict in _predictors(run, length, limits, plans, few).items()}
    task = f"random plans of {density:.0%}"
    return [
        Measurement(name, "rank_correlation", task, length, *spearman(told, losses), density, {"measured": losses, "predicted": told})
        for name, told in found.items()
    ]


def _predictors(run: Run, length: int, limits: Mapping[int, float], plans: int, few: SampleSet) -> dict[str, Callable[[np.ndarray], float]]:
    """By name, what takes a choice (layers, kv_heads) and returns the plan's predicted loss at `length`."""
    table, steps = run.table(), min(SLOPE_STEPS, STEPS_PER_PLAN * plans)
    cheap = loss_table(profile(run.model, few, parts_dir=run.parts_dir("profile")), table.rules, min_span=table.min_span, use_lengths=())
    chances = chances_of(random_choices(table, limits, PLANS_DRAWN, run.settings.seed + 2), len(table.rules))

    def slopes(samples: SampleSet, count: int, stands_for: int | None = None) -> Callable[[np.ndarray], float]:
        found = mean_slopes(
            run.model, samples, table, chances, steps=count, seed=run.settings.seed, stands_for=stands_for,
            parts_dir=run.parts_dir("slopes"), progress=lambda done, total: run.progress("unseen: slopes", done, total),
        )  # fmt: skip
        heads = np.arange(len(found))
        return lambda choice: float(found[heads, choice.ravel()].sum())

    return {
        "profile, extrapolated": _at(table, length),
        "profile, its longest length": _at(table, max(run.lengths)),
        f"profile of {FEW} samples a task there": _at(cheap, length),
        "slopes of shorter texts": slopes(run.lessons(), steps),
        MOVED: slopes(run.lessons(), steps, length),
        f"slopes of {FEW} samples a task there": slopes(few, max(1, steps // 4)),
    }


def _at(table: LossTable, length: int) -> Callable[[np.ndarray], float]:
    """The mean of a table's default goals by task at one length."""
    names = [goal.name for goal in default_goals(table, "task_length") if goal.name.rpartition("/")[0].endswith(f"@{length}")]
    return lambda choice: float(np.mean([table.predict(choice)[name] for name in names]))
