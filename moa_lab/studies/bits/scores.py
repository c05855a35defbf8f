"""Measured scores of models with quantised caches and weights, kept out of the store of the unquantised model's scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from moa_lab.calibration.answers import AnswerScore, score_answers
from moa_lab.calibration.samples import Sample, group_by_shape
from moa_lab.evaluate.compare import difference, spearman
from moa_lab.evaluate.scoring import GPU_BATCH_TOKENS, mean_losses, score_rows
from moa_lab.plan import UNTOUCHED, Plan, dense_plan
from moa_lab.records import Measurement
from moa_lab.studies.bits.quantise import quantised_cache, quantised_weights
from moa_lab.studies.bits.widths import Effects, allocate, below_untouched, kv_bytes, predicted, random_choices


@dataclass(frozen=True)
class Variant:
    """A quantised model: its plan, the bits of K and V, int (layers, kv_heads, 2), and the bits of its weights, by module."""

    name: str
    plan: Plan
    kv: np.ndarray
    weights: Mapping[str, int] = field(default_factory=dict)

    def kv_share(self, length: int) -> float:
        """Bytes of K and V at a length, with steps and smallest values, as a share of the dense plan's in 16 bits."""
        return kv_bytes(self.plan, length, self.kv) / dense_plan(self.plan.geometry).kv_bytes(length)

    def told(self) -> dict[str, Any]:
        """What is needed to repeat it, as JSON values: plan and widths."""
        return {"plan": self.plan.identity(), "kv": self.kv.tolist(), "weights": dict(self.weights)}


def untouched(plan: Plan) -> np.ndarray:
    """16 bits for K and V of every head: int64 (layers, kv_heads, 2)."""
    return np.full((plan.geometry.layers, plan.geometry.kv_heads, 2), UNTOUCHED)


def score_variant(model: PreTrainedModel, variant: Variant, samples: Sequence[Sample]) -> list[list[AnswerScore]]:
    """Loss and exact match of every answer of every sample, in order, as `evaluate.scoring.score_samples` takes them.

    Every variant runs the same attention code, so that two differ only in their values.
    """
    found: dict[int, list[AnswerScore]] = {}
    with quantised_weights(model, variant.weights):
        for (_, length), group in group_by_shape(samples).items():
            size = 1 if model.device.type == "cpu" else max(1, GPU_BATCH_TOKENS // length)
            with quantised_cache(model, variant.kv, variant.plan, length):
                for start in range(0, len(group), size):
                    batch = group[start : start + size]
                    found.update(zip(map(id, batch), score_answers(model, batch), strict=True))
    return [found[id(sample)] for sample in samples]


def variant_rows(model: PreTrainedModel, variant: Variant, sets: Sequence[Sequence[Sample]]) -> list[Measurement]:
    """Rows of a variant on sets of samples, each of one task and length; density is the share of the dense 16-bit KV bytes."""
    rows = []
    for samples in sets:
        for row in score_rows(variant.plan.renamed(variant.name), samples, score_variant(model, variant, samples)):
            rows.append(replace(row, density=variant.kv_share(row.length)))
    return rows


@dataclass(frozen=True)
class Side:
    """What is quantised: "kv" or "weights". effects: of its items; costs: (limits, items, widths) bytes; make: name, widths -> variant.

    The widths that `make` takes are bits, int (items,).
    """

    label: str
    effects: Effects
    costs: np.ndarray
    make: Callable[[str, np.ndarray], Variant]

    def variant(self, name: str, choice: np.ndarray) -> Variant:
        """The variant of a choice: an index into the effects' widths for each item."""
        return self.make(name, np.array(self.effects.widths)[choice])

    def uniform(self, bits: int) -> np.ndarray:
        """The choice of `bits` bits everywhere."""
        return np.full(self.costs.shape[1], self.effects.widths.index(bits))

    def cost(self, choice: np.ndarray) -> np.ndarray:
        """Bytes of a choice, (limits,)."""
        spent: np.ndarray = self.costs[:, np.arange(len(choice)), choice].sum(axis=1)
        return spent

    def mixed(self, budgets: np.ndarray, predictor: str) -> np.ndarray:
        """The choice with the least predicted loss within `budgets`, (limits,) bytes."""
        return allocate(predicted(self.effects, predictor), self.costs, budgets)

    def random(self, bits: int, count: int, seed: int) -> np.ndarray:
        """Random choices (count, items) with the bytes of `bits` bits everywhere; no item stays in 16 bits."""
        kept = below_untouched(self.effects.widths)
        return random_choices(self.costs[:, :, :kept], self.cost(self.uniform(bits)), count, seed)


def rank_rows(
    model: PreTrainedModel,
    side: Side,
    choices: np.ndarray,
    samples: Sequence[Sample],
    predictors: Sequence[str],
    progress: Callable[[int, int], None] | None = None,
) -> list[Measurement]:
    """Rank correlation of the predicted and the measured losses of `choices` (count, items) on `samples`.

    The measured loss is the mean over (task, length) of nats per answer token. One row per predictor, with all losses in its detail.
    """
    measured = []
    for done, choice in enumerate(choices):
        scores = score_variant(model, side.variant("random", choice), samples)
        measured.append(float(np.mean(list(mean_losses(samples, scores).values()))))
        if progress:
            progress(done + 1, len(choices))
    rows = []
    for predictor in predictors:
        losses = predicted(side.effects, predictor)
        guessed = [float(np.take_along_axis(losses, choice[:, None], axis=1).sum()) for choice in choices]
        found = spearman(guessed, measured)
        share = side.variant("random", choices[0]).kv_share(samples[0].length)
        detail = {"predicted": guessed, "measured": measured}
        rows.append(Measurement(predictor, "rank_correlation", side.label, 0, *found, share, detail))
    return rows


def difference_rows(rows: Sequence[Measurement], plan: str, against: str) -> list[Measurement]:
    """Paired differences `plan` - `against`: one row per task, over all lengths (length 0)."""
    found = []
    for task in dict.fromkeys(row.task for row in rows if row.plan == plan):
        ours, theirs = (_pooled(rows, name, task) for name in (plan, against))
        pairs = difference(ours, theirs)
        detail = {"against": against, "density_against": theirs.density}
        found.append(Measurement(plan, f"{ours.metric}_difference", task, 0, *pairs, ours.density, detail))
    return found


def _pooled(rows: Sequence[Measurement], plan: str, task: str) -> Measurement:
    """One row with the samples of all lengths; its density is that at the longest."""
    of_task = sorted((row for row in rows if (row.plan, row.task) == (plan, task)), key=lambda row: row.length)
    return replace(of_task[-1], length=0, detail={"per_sample": [value for row in of_task for value in row.detail["per_sample"]]})
