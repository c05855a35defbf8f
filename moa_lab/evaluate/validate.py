"""Choosing by measurement: the front's plans are run on validation samples, and the one that loses least is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moa_lab.calibration.origin import same_weights
from moa_lab.calibration.samples import Sample, distinct
from moa_lab.evaluate.scoring import Progress, loss_rows, mean_losses, retrieval_rows, score_samples
from moa_lab.evaluate.store import ScoreStore
from moa_lab.evaluate.testsets import needle_samples, own_answer_samples
from moa_lab.geometry.wrappers import plain_model
from moa_lab.models import geometry_of, model_name, weights_fingerprint
from moa_lab.plan import Plan, dense_plan
from moa_lab.records import Front, Measurement, Measurements


@dataclass(frozen=True)
class Validation:
    """The chosen plan (its card holds its measured scores), every candidate's excess loss by name, and all rows."""

    best: Plan
    excess: dict[str, float]
    measurements: Measurements


def choose(
    model: PreTrainedModel,
    front: Front,
    samples: Sequence[Sample],
    *,
    name: str = "moa",
    store: ScoreStore | None = None,
    progress: Progress | None = None,
) -> Validation:
    """Measure every plan of `front` on `samples` and keep the one with the lowest excess loss, under `name`.

    The excess loss of a plan is the mean over (task, length) of its measured loss less the dense model's, in nats per
    answer token, so that every task counts alike. The predictor alone does not separate good plans from lucky ones.
    progress: called with (plans done, plans in all). Raises ValueError for an empty front or no samples.
    """
    model = plain_model(model)
    if not len(front) or not samples:
        raise ValueError("validation needs at least one plan and one sample")
    samples = distinct(samples)
    dense = dense_plan(front.points[0].plan.geometry)
    plans = [dense, *(point.plan for point in front)]
    rows: list[Measurement] = []
    losses: dict[str, dict[tuple[str, int], float]] = {}
    for done, plan in enumerate(plans):
        if progress:
            progress(done, len(plans))
        scores = score_samples(model, plan, samples, store=store)
        losses[plan.name] = mean_losses(samples, scores)
        rows += loss_rows(plan, samples, scores)
        asked = [index for index, sample in enumerate(samples) if "facts" in sample.detail]
        rows += retrieval_rows(plan, [samples[i] for i in asked], [scores[i] for i in asked])
    if progress:
        progress(len(plans), len(plans))
    excess = {
        plan.name: float(np.mean([losses[plan.name][key] - losses[dense.name][key] for key in losses[dense.name]])) for plan in plans[1:]
    }
    best = min(front, key=lambda point: excess[point.plan.name])
    found = best.plan
    scores_of_best = {f"validation {row.task}@{row.length} {row.metric}": row.score() for row in rows if row.plan == found.name}
    told = {"candidate": found.name, "origin": best.origin, "predicted": best.predicted, "excess_loss": excess[found.name]}
    chosen = replace(found, name=name, search={**found.search, **told}, scores=scores_of_best)
    origin = front.provenance
    if not same_weights(origin, model):
        # The scores are of this model, also where the plans were made on another.
        origin = replace(origin, model=model_name(model), weights=weights_fingerprint(model))
    return Validation(chosen, excess, Measurements(tuple(rows), {"excess_loss": excess, "chosen": found.name}, origin))


def validate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    front: Front,
    *,
    length: int,
    questions: int = 32,
    summaries: int = 8,
    seed: int = 0,
    progress: Progress | None = None,
) -> Plan:
    """The plan of `front` that loses least on validation samples of `length` tokens, a length that was not profiled.

    questions: needles in validation wordings; summaries: the dense model's own answers. Its card holds its scores.
    Raises ValueError for a length beyond the model and for plans of another geometry.
    """
    model = plain_model(model)
    geometry = geometry_of(model)
    if not 1 <= length <= geometry.max_length:
        raise ValueError(f"length {length} is beyond the model's maximum of {geometry.max_length} tokens")
    for point in front:
        point.plan.check_model(geometry)
    samples = needle_samples(tokenizer, length, questions, split="validation", seed=seed) if questions else []
    if summaries:
        samples += own_answer_samples(model, tokenizer, length, summaries, split="validation", seed=seed)
    return replace(choose(model, front, samples, progress=progress).best, lengths=(length,))


def validation_length(lengths: Sequence[int], max_length: int) -> int:
    """A length that was not profiled: half-way between the two longest profiled ones (or 3/4 of the only one), a multiple of 64.

    There, elastic rules have spans that no profile saw, and samples cost no more than at the longest length.
    """
    ordered = sorted({n for n in lengths if n <= max_length})
    if not ordered:
        raise ValueError(f"lengths must hold one of at most {max_length} tokens, got {sorted(lengths)}")
    below = ordered[-2] if len(ordered) > 1 else ordered[-1] // 2
    middle = (ordered[-1] + below) // 2
    rounded = middle // 64 * 64
    return rounded if below < rounded < ordered[-1] else max(middle, 1)
