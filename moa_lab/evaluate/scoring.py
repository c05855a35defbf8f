"""Scores of samples under a plan, and measurements made of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from moa_lab import processes
from moa_lab.calibration.answers import AnswerScore, forward_bytes, score_answers
from moa_lab.calibration.origin import check_vocabulary
from moa_lab.calibration.samples import Sample, SampleSet, distinct, group_by_shape
from moa_lab.evaluate.intervals import Interval, mean, proportion
from moa_lab.evaluate.store import ScoreStore
from moa_lab.geometry.wrappers import plain_model
from moa_lab.interface.compiled import compiled_layers
from moa_lab.plan import Plan
from moa_lab.records import Measurement
from moa_lab.runtime import apply_plan
from moa_lab.side_by_side import side_by_side

DEPTH_BINS = 10
# Tokens in one forward pass on a GPU: enough to fill it, few enough for masks (batch, heads, N, N) to fit in memory.
GPU_BATCH_TOKENS = 32_768

Progress = Callable[[int, int], None]
"""Called with (samples done, samples in all)."""
_Scored = tuple[int, list[list[AnswerScore]]]
"""The number of a plan, and the scores of the samples of a batch under it."""


def score_samples(
    model: PreTrainedModel,
    plan: Plan,
    samples: Sequence[Sample],
    *,
    store: ScoreStore | None = None,
    progress: Progress | None = None,
) -> list[list[AnswerScore]]:
    """Loss and exact match of every answer of every sample, in order, with `plan` applied.

    The plan's rules are evaluated at each sample's own length, prompt and answers together. One forward pass per batch:
    prefill and decoding see the same keys under a plan, so this equals generating the answers token by token. A repeated sample is run
    once. store: where known scores are read and new ones kept.
    """
    return score_plans(model, [plan], samples, store=store, progress=progress)[0]


def score_plans(
    model: PreTrainedModel,
    plans: Sequence[Plan],
    samples: Sequence[Sample],
    *,
    store: ScoreStore | None = None,
    progress: Progress | None = None,
) -> list[list[list[AnswerScore]]]:
    """`score_samples` under every plan. All plans of a sample are run in turn: what they have in common is run once on a CPU.

    progress: counts a sample under a plan as one.
    """
    model = plain_model(model)
    check_vocabulary(samples, model)
    known = processes.from_first(
        lambda: {sample.identity: [store.get(plan, sample) if store else None for plan in plans] for sample in samples}
    )
    total = len(known) * len(plans)
    done = sum(found is not None for row in known.values() for found in row)

    def score(work: _Work) -> tuple[_Work, list[_Scored]]:
        return work, list(_scores_under(model, {at: plans[at] for at in work.plans}, work.batch))

    def take(found: tuple[_Work, list[_Scored]]) -> None:
        nonlocal done
        work, scored = found
        for at, results in scored:
            for sample, result in zip(work.batch, results, strict=True):
                known[sample.identity][at] = result
                if store and processes.is_first():
                    store.put(plans[at], sample, result)
        done += len(work.batch) * len(work.plans)
        if progress:
            progress(done, total)

    works = _works(samples, known, model.device)
    longest = max((work.batch[0].length for work in works), default=0)
    tokens = sum(len(work.plans) * sum(sample.length for sample in work.batch) for work in works)
    with compiled_layers(model, tokens):
        side_by_side(score, works, model.device, bytes_each=forward_bytes(model, longest), after=take)
    return [[found for sample in samples if (found := known[sample.identity][at]) is not None] for at in range(len(plans))]


@dataclass(frozen=True)
class _Work:
    """Samples of one length that share a forward pass, and the numbers of the plans that they are to be scored under."""

    batch: list[Sample]
    plans: tuple[int, ...]


def _works(samples: Sequence[Sample], known: Mapping[str, Sequence[list[AnswerScore] | None]], device: torch.device) -> list[_Work]:
    """All that is missing, every sample once."""
    groups: dict[tuple[int, ...], dict[str, Sample]] = {}
    for sample in samples:
        missing = tuple(at for at, found in enumerate(known[sample.identity]) if found is None)
        groups.setdefault(missing, {})[sample.identity] = sample
    return [_Work(batch, missing) for missing, group in groups.items() if missing for batch in _batches(list(group.values()), device)]


def _scores_under(model: PreTrainedModel, plans: Mapping[int, Plan], batch: list[Sample]) -> Iterator[_Scored]:
    """The scores of a batch under every plan, by the plan's number.

    Up to its least span, a token's past is whole under a plan, and so are the pasts of all tokens that it sees: their K and V are the
    same under every plan of larger spans. The largest comes first, and the others go on from its K and V.
    """
    length = batch[0].length
    # On a GPU a batch's K and V would take the room of other samples.
    sharing = len(plans) > 1 and model.device.type == "cpu"
    before_answers = min(sample.answers[0][0] for sample in batch) - 1
    kept: DynamicCache | None = None
    for at, plan in sorted(plans.items(), key=lambda item: -_least_span(item[1], length)):
        past = _first_tokens(kept, min(_least_span(plan, length), before_answers)) if sharing else None
        # The dense plan needs no mask; what is shared comes from one attention (transformers' sdpa leaves out a soft cap).
        with contextlib.nullcontext() if plan.is_dense and not sharing else apply_plan(model, plan, length):
            found = score_answers(model, batch, past)
        yield at, found
        kept = past if kept is None else kept


def _least_span(plan: Plan, n_tokens: int) -> int:
    """Tokens that every head keeps at least as they are, the model's own windows aside."""
    return 0 if plan.bits else min(plan.sink_tokens + int(plan.windows(n_tokens).min()), n_tokens)


def _first_tokens(cache: DynamicCache | None, count: int) -> DynamicCache:
    """A cache of its own with the K and V of the first `count` tokens of `cache`; empty where there is none."""
    # Without a config no layer drops what its own window has left behind.
    if cache is None or not count:
        return DynamicCache()
    return DynamicCache([(keys[:, :, :count], values[:, :, :count]) for keys, values, *_ in cache])


def retrieval_rows(plan: Plan, samples: Sequence[Sample], scores: Sequence[Sequence[AnswerScore]]) -> list[Measurement]:
    """One row of exact match per (task, length); its detail holds every hit and the accuracy by depth and by wording."""
    rows = []
    for (task, length), group in _groups(samples, scores).items():
        facts = [(fact, score.exact) for sample, result in group for fact, score in zip(_asked(sample), result, strict=True)]
        total = _share(exact for _, exact in facts)
        by_depth = {
            f"{(depth + 0.5) / DEPTH_BINS:.2f}": _share_detail(exact for fact, exact in facts if _depth_bin(fact["depth"]) == depth)
            for depth in sorted({_depth_bin(fact["depth"]) for fact, _ in facts})
        }
        by_wording = {
            wording: _share_detail(exact for fact, exact in facts if fact["wording"] == wording)
            for wording in sorted({fact["wording"] for fact, _ in facts})
        }
        hits = [int(exact) for _, exact in facts]
        detail = {"by_depth": by_depth, "by_wording": by_wording, "contexts": len(group), "per_sample": hits, "samples": _which(group)}
        rows.append(Measurement(plan.name, "retrieval", task, length, *total, plan.density(length), detail))
    return rows


def loss_rows(plan: Plan, samples: Sequence[Sample], scores: Sequence[Sequence[AnswerScore]]) -> list[Measurement]:
    """Cross-entropy of the answers per (task, length), in nats per token; the observations are samples."""
    rows = []
    for (task, length), group in _groups(samples, scores).items():
        per_sample = [sample_loss(result) for _, result in group]
        detail = {"perplexity": float(np.exp(np.mean(per_sample))), "per_sample": per_sample, "samples": _which(group)}
        rows.append(Measurement(plan.name, "cross_entropy", task, length, *mean(per_sample), plan.density(length), detail))
    return rows


def score_rows(plan: Plan, samples: Sequence[Sample], scores: Sequence[Sequence[AnswerScore]]) -> list[Measurement]:
    """`retrieval_rows` of samples with planted facts, `loss_rows` of others; `samples` are all of one kind."""
    make = retrieval_rows if samples and "facts" in samples[0].detail else loss_rows
    return make(plan, samples, scores)


def sample_loss(scores: Sequence[AnswerScore]) -> float:
    """Mean nats per answer token of one sample."""
    return sum(score.loss * score.tokens for score in scores) / sum(score.tokens for score in scores)


def mean_losses(samples: Sequence[Sample], scores: Sequence[Sequence[AnswerScore]]) -> dict[tuple[str, int], float]:
    """Mean nats per answer token, by (task, length); every sample counts alike."""
    grouped = _groups(samples, scores).items()
    return {key: float(np.mean([sample_loss(result) for _, result in group])) for key, group in grouped}


def _batches(samples: Sequence[Sample], device: torch.device) -> list[list[Sample]]:
    """Samples that share a forward pass, one length after the other."""
    groups = group_by_shape(samples)
    batches = []
    for length in dict.fromkeys(length for _, length in groups):
        size = 1 if device.type == "cpu" else max(1, GPU_BATCH_TOKENS // length)
        for group in (group for (_, n), group in groups.items() if n == length):
            batches += [group[start : start + size] for start in range(0, len(group), size)]
    return batches


def _asked(sample: Sample) -> list[dict[str, Any]]:
    """The facts that the answers of a sample are about: calibration leaves out those that the dense model gets wrong."""
    facts = sample.detail["facts"]
    return [fact for fact, right in zip(facts, sample.detail.get("right", [True] * len(facts)), strict=True) if right]


def _groups(
    samples: Sequence[Sample], scores: Sequence[Sequence[AnswerScore]]
) -> dict[tuple[str, int], list[tuple[Sample, Sequence[AnswerScore]]]]:
    """Samples with their scores by (task, length); a repeated sample counts once."""
    groups: dict[tuple[str, int], list[tuple[Sample, Sequence[AnswerScore]]]] = {}
    result_of = {sample.identity: result for sample, result in zip(samples, scores, strict=True)}
    for sample in distinct(samples):
        groups.setdefault((sample.task, sample.length), []).append((sample, result_of[sample.identity]))
    return groups


def _which(group: Sequence[tuple[Sample, Sequence[AnswerScore]]]) -> str:
    """Hash of a row's samples: only rows over the same samples are compared in pairs."""
    return SampleSet(tuple(sample for sample, _ in group)).identity


def _share(hits: Iterable[bool]) -> Interval:
    found = list(hits)
    return proportion(sum(found), len(found))


def _share_detail(hits: Iterable[bool]) -> dict[str, float]:
    share = _share(hits)
    return {"value": share.value, "n": share.n}


def _depth_bin(depth: float) -> int:
    return min(int(depth * DEPTH_BINS), DEPTH_BINS - 1)
