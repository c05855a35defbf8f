"""Predicted against measured losses of random plans of equal density."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from moa_lab.calibration.samples import Sample, SampleSet
from moa_lab.evaluate.compare import spearman
from moa_lab.evaluate.effects import MeasuredLosses
from moa_lab.learning import mean_slopes
from moa_lab.pipeline import Run
from moa_lab.profiling import profile
from moa_lab.records import InfluenceProfile, Measurement
from moa_lab.studies.predicting.predictors import chances_of, merged, predictors, random_choices, regressed

PLANS_PROFILED = 4
PROFILED_TOKENS = 65_536
"""Calibration tokens that are profiled again under each of `PLANS_PROFILED` random plans."""
PLANS_DRAWN = 256
"""Random plans that estimate the probability of each rule for each head."""
SLOPE_STEPS = 240
STEPS_PER_PLAN = 3
"""At most so many steps of the slopes for every random plan that is predicted."""


def predictions(run: Run, density: float, plans: int) -> list[Measurement]:
    """Rank correlation of every predictor with the measured loss of `plans` random plans of a density."""
    table, limits, seed = run.table(), run.at(density).limits, run.settings.seed
    choices = random_choices(table, limits, plans, seed)
    losses = measured_losses(run, choices, run.suites.validation, "search: random plans")
    ways = predictors(run.profile(), _under_plans(run, limits), table.rules)
    found = {name: [predict(choice) for choice in choices] for name, predict in ways.items()}
    slopes = _slopes(run, limits, min(SLOPE_STEPS, STEPS_PER_PLAN * plans))
    heads = np.arange(len(slopes))
    found["slopes under drawn plans"] = [float(slopes[heads, choice.ravel()].sum()) for choice in choices]
    found["regression on measured plans"] = list(regressed(table, choices, losses, seed))
    return [
        Measurement(
            name, "rank_correlation", f"random plans of {density:.0%}", 0, *spearman(told, losses), density,
            {"measured": losses, "predicted": list(told)},
        )
        for name, told in found.items()
    ]  # fmt: skip


def measured_losses(run: Run, choices: Sequence[np.ndarray], samples: Iterable[Sample], stage: str) -> list[float]:
    """Mean loss over (task, length) of the plan of every choice of the run's table. stage: what its progress is called."""
    measured = MeasuredLosses(run.model, SampleSet(tuple(samples)), run.parts_dir("random-plans"))
    table, losses = run.table(), []
    for done, choice in enumerate(choices):
        run.progress(stage, done, len(choices))
        losses.append(float(np.mean(list(measured(table.plan(choice, "random")).values()))))
    run.progress(stage, len(choices), len(choices))
    return losses


def _under_plans(run: Run, density: Mapping[int, float]) -> InfluenceProfile:
    """A profile of the model under random plans of the density."""
    samples, table = run.samples().limited(PROFILED_TOKENS), run.table()
    plans = [table.plan(choice, "random") for choice in random_choices(table, density, PLANS_PROFILED, run.settings.seed + 1)]
    parts = run.parts_dir("profile")
    return merged([profile(run.model, samples, plan=plan, parts_dir=parts) for plan in plans])


def _slopes(run: Run, density: Mapping[int, float], steps: int) -> np.ndarray:
    """First-order loss of every rule (heads, rules), under plans drawn like those that are predicted."""
    table = run.table()
    chances = chances_of(random_choices(table, density, PLANS_DRAWN, run.settings.seed + 2), len(table.rules))
    return mean_slopes(
        run.model, run.lessons(), table, chances, steps=steps, seed=run.settings.seed, parts_dir=run.parts_dir("slopes"),
        progress=lambda done, total: run.progress("search: slopes", done, total),
    )  # fmt: skip
