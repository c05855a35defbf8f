"""Needles and words: the two kinds of loss that a plan is chosen by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moa_lab.calibration.answers import AnswerScore
from moa_lab.calibration.samples import Sample
from moa_lab.evaluate.scoring import mean_losses
from moa_lab.presets import NEEDLES, WORDS, Preference

LEAST_NATS, LEAST_LOST = 0.005, 0.02
"""What uniform spans lose at least, as the unit of a loss (nats a token, share of facts): less is noise, and nothing to divide by."""

Scores = Sequence[Sequence[AnswerScore]]
"""Of samples, in their order: the score of every answer."""


@dataclass(frozen=True)
class Losses:
    """What a plan loses against the dense model, means over (task, length): nats per answer token by kind (needles, words; those that
    were measured), and the share of planted facts that are no longer found, 0 where none were asked for."""

    nats: dict[str, float]
    facts: float


def kind_of(sample: Sample) -> str:
    """Whether a sample asks for planted facts or for text."""
    return NEEDLES if "facts" in sample.detail else WORDS


def losses_of(samples: Sequence[Sample], scores: Scores, dense: Scores) -> Losses:
    """Losses of a plan from its scores and the dense model's of the same samples."""
    ours, theirs = (mean_losses(samples, some) for some in (scores, dense))
    kinds = {(sample.task, sample.length): kind_of(sample) for sample in samples}
    nats = {
        kind: float(np.mean([ours[key] - theirs[key] for key, own in kinds.items() if own == kind])) for kind in sorted(set(kinds.values()))
    }
    found, known = (_found(samples, some) for some in (scores, dense))
    return Losses(nats, float(np.mean([known[key] - found[key] for key in known])) if known else 0.0)


def preference_scores(losses: Mapping[str, Losses], uniform: str | None, wanted: Preference) -> dict[str, float]:
    """What plans are chosen by, the least: their losses in units of what the plan named `uniform` loses, weighed by kind.

    1 is as bad as uniform spans. A needle counts half by its nats and half by whether it is found: nats tell plans apart where few are
    asked for, and what is found is what users see. Without a uniform plan the unit is the mean size of all losses.
    """
    unit = losses[uniform] if uniform is not None else _mean_size(list(losses.values()))
    return {name: _score(found, unit, wanted) for name, found in losses.items()}


def _score(found: Losses, unit: Losses, wanted: Preference) -> float:
    shares = {kind: nats / max(unit.nats[kind], LEAST_NATS) for kind, nats in found.nats.items()}
    if NEEDLES in shares:
        shares[NEEDLES] = (shares[NEEDLES] + found.facts / max(unit.facts, LEAST_LOST)) / 2
    weights = {kind: wanted.weight(kind) for kind in shares}
    return sum(weight * shares[kind] for kind, weight in weights.items()) / sum(weights.values())


def _mean_size(every: Sequence[Losses]) -> Losses:
    nats = {kind: float(np.mean([abs(one.nats[kind]) for one in every])) for kind in every[0].nats}
    return Losses(nats, float(np.mean([abs(one.facts) for one in every])))


def _found(samples: Sequence[Sample], scores: Scores) -> dict[tuple[str, int], float]:
    """Share of planted facts whose answer is exact, by (task, length)."""
    hits: dict[tuple[str, int], list[bool]] = {}
    for sample, answers in zip(samples, scores, strict=True):
        if kind_of(sample) == NEEDLES:
            hits.setdefault((sample.task, sample.length), []).extend(answer.exact for answer in answers)
    return {key: float(np.mean(found)) for key, found in hits.items()}
