"""Measured importance of heads under a plan: the change of the loss when one head is cut to the floor, made whole, or stored in other
bits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel

from moa_lab import processes
from moa_lab.calibration.samples import SampleSet
from moa_lab.evaluate.scoring import mean_losses, score_samples
from moa_lab.geometry.wrappers import plain_model
from moa_lab.models import weights_fingerprint
from moa_lab.plan import Plan
from moa_lab.records import LossTable, ProfileKey
from moa_lab.storage import RecordError, parse, read_json, write_json

LOSSES_SCHEMA = "moa-lab/plan-losses/1"

Progress = Callable[[int, int], None]
"""Called with (plans measured, plans in all)."""


class MeasuredLosses:
    """Losses of plans on `samples`: a call gives nats per answer token by (task, length), as `mean_losses` does.

    Each plan is measured once. folder: keeps the losses, a small file per plan, for later runs with the same samples.
    """

    def __init__(self, model: PreTrainedModel, samples: SampleSet, folder: str | Path | None = None) -> None:
        self._model, self._samples = plain_model(model), list(samples)
        self._known: dict[str, dict[ProfileKey, float]] = {}
        self._folder = Path(folder) if folder else None
        self._setting = f"{weights_fingerprint(model)}-{samples.identity}"

    def __call__(self, plan: Plan) -> dict[ProfileKey, float]:
        identity = plan.identity()
        if identity not in self._known:
            self._known[identity] = self._kept_or_measured(plan, identity)
        return self._known[identity]

    def _kept_or_measured(self, plan: Plan, identity: str) -> dict[ProfileKey, float]:
        path = self._folder / f"{identity}-{self._setting}.json" if self._folder else None
        if path is not None and (kept := processes.from_first(lambda: _read(path))) is not None:
            return kept
        losses = mean_losses(self._samples, score_samples(self._model, plan, self._samples))
        if path is not None and processes.is_first():
            write_json(path, {"schema": LOSSES_SCHEMA, "losses": [[task, length, loss] for (task, length), loss in losses.items()]})
        return losses


@dataclass(frozen=True)
class HeadEffects:
    """Changes of the loss in nats when one head changes. spans: (2, layers, kv_heads), when it is cut to the fewest tokens and when it is
    made whole, in the bits that it has. bits: (mixes, layers, kv_heads), when it is stored in each mix of the table, with the rule that
    it has. 0 where there is nothing to change, and for heads that were not measured."""

    spans: np.ndarray
    bits: np.ndarray


def head_effects(
    measured: MeasuredLosses,
    table: LossTable,
    choice: np.ndarray,
    heads: Iterable[tuple[int, int]],
    *,
    progress: Progress | None = None,
) -> dict[ProfileKey, HeadEffects]:
    """How the loss changes by (task, length) when one head changes and all others keep to `choice`, int (layers, kv_heads).

    heads: (layer, kv_head) to measure. Of each two plans are measured, or one if it already has the cheapest or longest rule; and one for
    every other mix of bits in the table, which must hold the heads' rules in all of them.
    """
    spans = np.sum([table.span_tokens(length) for length in table.lengths], axis=0)
    place = {known: at for at, known in enumerate(table.choices)}
    mixes = table.mixes
    here = measured(table.plan(choice, "here"))
    effects = {key: HeadEffects(np.zeros((2, *choice.shape)), np.zeros((len(mixes), *choice.shape))) for key in here}
    wanted: list[tuple[str, int, int, int, int]] = []
    for layer, head in heads:
        own = int(choice[layer, head])
        rule, mix = table.choices[own]
        alike = np.array([at for at, (_, other) in enumerate(table.choices) if other == mix])
        ends = [int(alike[spans[layer, alike].argmin()]), int(alike[spans[layer, alike].argmax()])]
        wanted += [("spans", end, layer, head, to) for end, to in enumerate(ends) if to != own]
        wanted += [("bits", at, layer, head, place[rule, other]) for at, other in enumerate(mixes) if other != mix]
    for done, (part, at, layer, head, to) in enumerate(wanted):
        if progress:
            progress(done, len(wanted))
        changed = choice.copy()
        changed[layer, head] = to
        for key, loss in measured(table.plan(changed, "changed")).items():
            getattr(effects[key], part)[at, layer, head] = loss - here[key]
    if progress:
        progress(len(wanted), len(wanted))
    return effects


def _read(path: Path) -> dict[ProfileKey, float] | None:
    try:
        rows = parse(list[tuple[str, int, float]], read_json(path, LOSSES_SCHEMA)["losses"], path)
    except (RecordError, KeyError):
        return None
    return {(task, length): loss for task, length, loss in rows}
