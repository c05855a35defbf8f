"""Choosing by measurement: the front's plans are run on validation samples, and the one that loses least is kept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moa_lab.calibration.answers import AnswerScore
from moa_lab.calibration.origin import same_weights
from moa_lab.calibration.samples import Sample, distinct
from moa_lab.evaluate.prefer import Losses, kind_of, losses_of, preference_scores
from moa_lab.evaluate.scoring import Progress, loss_rows, mean_losses, retrieval_rows, score_plans
from moa_lab.evaluate.store import ScoreStore
from moa_lab.evaluate.testsets import document_samples, needle_samples, own_answer_samples
from moa_lab.geometry.wrappers import plain_model
from moa_lab.models import geometry_of, model_name, weights_fingerprint
from moa_lab.plan import Plan, check_names, dense_plan
from moa_lab.presets import DEFAULT_PREFERENCE, NEEDLES, Preference
from moa_lab.records import Front, Measurement, Measurements
from moa_lab.search.plain import SIMPLE
from moa_lab.storage import to_json


@dataclass(frozen=True)
class Validation:
    """The chosen plan (its card holds its measured scores), every candidate's losses by name, and all rows.

    excess: mean over (task, length), nats per answer token over the dense model. losses: by kind. scores: what the plan was chosen by,
    the least (see `preference_scores`).
    """

    best: Plan
    excess: dict[str, float]
    measurements: Measurements
    losses: dict[str, Losses]
    scores: dict[str, float]


def choose(
    model: PreTrainedModel,
    front: Front,
    samples: Sequence[Sample],
    *,
    name: str = "moa",
    prefer: str = DEFAULT_PREFERENCE,
    store: ScoreStore | None = None,
    progress: Progress | None = None,
) -> Validation:
    """Measure every plan of `front` on `samples` and keep the one that loses least by what is preferred, under `name`.

    A plan's losses of needles and of words, against the dense model, are weighed by `prefer` (see `Preference.parse`), each in units of
    what a uniform plan of the front loses. The predictor alone does not separate good plans from lucky ones.
    progress: called with (scores done, scores in all), one for a sample under a plan. Raises ValueError for an empty front, no samples,
    an unknown preference, or different plans of one name.
    """
    model, wanted = plain_model(model), Preference.parse(prefer)
    if not len(front) or not samples:
        raise ValueError("validation needs at least one plan and one sample")
    samples = distinct(samples)
    dense = dense_plan(front.points[0].plan.geometry)
    plans = [dense, *(point.plan for point in front)]
    check_names(plans)
    rows: list[Measurement] = []
    losses: dict[str, Losses] = {}
    excess: dict[str, float] = {}
    reference: list[list[AnswerScore]] = []
    for plan, scores in zip(plans, score_plans(model, plans, samples, store=store, progress=progress), strict=True):
        rows += loss_rows(plan, samples, scores)
        asked = [index for index, sample in enumerate(samples) if kind_of(sample) == NEEDLES]
        rows += retrieval_rows(plan, [samples[i] for i in asked], [scores[i] for i in asked])
        if plan is dense:
            reference = scores
            continue
        losses[plan.name] = losses_of(samples, scores, reference)
        ours, theirs = (mean_losses(samples, some) for some in (scores, reference))
        excess[plan.name] = float(np.mean([ours[key] - theirs[key] for key in ours]))
    uniform = next((point.plan.name for point in front if point.origin == "uniform"), None)
    score = preference_scores(losses, uniform, wanted)
    best = min(front, key=lambda point: score[point.plan.name])
    told = {
        "candidate": best.plan.name, "origin": best.origin, "predicted": best.predicted, "excess_loss": excess[best.plan.name],
        "prefer": prefer, "losses": to_json(losses[best.plan.name]), "score": score[best.plan.name],
    }  # fmt: skip
    simple = min((point for point in front if point.origin in SIMPLE), key=lambda point: score[point.plan.name], default=None)
    if simple:
        named = simple.plan.name
        told["best_simple"] = {"candidate": named, "origin": simple.origin, "losses": to_json(losses[named]), "score": score[named]}
    found = best.plan
    scores_of_best = {f"validation {row.task}@{row.length} {row.metric}": row.score() for row in rows if row.plan == found.name}
    chosen = replace(found, name=name, search={**found.search, **told}, scores=scores_of_best)
    origin = front.provenance
    if not same_weights(origin, model):
        # The scores are of this model, also where the plans were made on another.
        origin = replace(origin, model=model_name(model), weights=weights_fingerprint(model))
    settings = {
        "excess_loss": excess, "chosen": found.name, "prefer": prefer, "scores": score,
        "losses": {name: to_json(found) for name, found in losses.items()},
        "origins": {point.plan.name: point.origin for point in front},
    }  # fmt: skip
    return Validation(chosen, excess, Measurements(tuple(rows), settings, origin), losses, score)


def validate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    front: Front,
    *,
    length: int,
    questions: int = 32,
    summaries: int = 8,
    texts: int = 0,
    prefer: str = DEFAULT_PREFERENCE,
    seed: int = 0,
    progress: Progress | None = None,
) -> Plan:
    """The plan of `front` that loses least on validation samples of `length` tokens, best a length beyond the profiled ones.

    questions: needles in validation wordings; summaries: the dense model's own answers; texts: plain ones. prefer: as in `choose`.
    Its card holds its scores. Raises ValueError for a length beyond the model, an unknown preference, and plans of another geometry.
    """
    Preference.parse(prefer)
    model = plain_model(model)
    geometry = geometry_of(model)
    geometry.check_length(length)
    for point in front:
        point.plan.check_model(geometry)
    check_names([dense_plan(geometry), *(point.plan for point in front)])
    samples = needle_samples(tokenizer, length, questions, split="validation", seed=seed) if questions else []
    if summaries:
        samples += own_answer_samples(model, tokenizer, length, summaries, split="validation", seed=seed)
    if texts:
        samples += document_samples(tokenizer, length, texts, split="validation", seed=seed)
    return replace(choose(model, front, samples, prefer=prefer, progress=progress).best, lengths=(length,))


def validation_length(lengths: Sequence[int], max_length: int, used: Iterable[int] = ()) -> int:
    """A length beyond the profiled `lengths`: the longest of `used`, else twice the longest profiled one, within the model's maximum.

    There, rules have spans that no profile saw. Where the model reaches no further: half-way between the two longest profiled ones (or
    3/4 of the only one), a multiple of 64.
    """
    ordered = sorted({n for n in lengths if n <= max_length})
    if not ordered:
        raise ValueError(f"lengths must hold one of at most {max_length} tokens, got {sorted(lengths)}")
    beyond = [n for n in used if ordered[-1] < n <= max_length] or [min(2 * ordered[-1], max_length)]
    if max(beyond) > ordered[-1]:
        return max(beyond)
    below = ordered[-2] if len(ordered) > 1 else ordered[-1] // 2
    middle = (ordered[-1] + below) // 2
    rounded = middle // 64 * 64
    return rounded if below < rounded < ordered[-1] else max(middle, 1)
