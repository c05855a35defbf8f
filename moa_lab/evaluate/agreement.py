"""How far a plan's next-token predictions are from the dense model's, whatever the right answer is."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from moa_lab.calibration.answers import answer_logits
from moa_lab.calibration.origin import check_vocabulary
from moa_lab.calibration.samples import Sample, SampleSet, distinct, group_by_shape
from moa_lab.evaluate.intervals import mean, mean_share
from moa_lab.evaluate.scoring import GPU_BATCH_TOKENS, Progress
from moa_lab.geometry.wrappers import plain_model
from moa_lab.plan import Plan
from moa_lab.records import Measurement
from moa_lab.runtime import apply_plan

KL, TOKEN_MATCH = "kl", "token_match"
METRICS = (KL, TOKEN_MATCH)

# Dense log-probabilities that are kept while the plans are run: 0.5 GB in float32.
KEPT_LOGITS = 2**27


def agreement_rows(
    model: PreTrainedModel, plans: Sequence[Plan], samples: Sequence[Sample], progress: Progress | None = None
) -> list[Measurement]:
    """Two rows per (task, length) and plan, with a 95% interval over the samples; their values are in the detail, as `per_sample`.

    kl: Kullback-Leibler divergence of the plan's next token from the dense model's, KL(dense || plan), mean nats per answer token,
    over the whole vocabulary. token_match: share of the answer's tokens where both find the same token most likely.
    Every token is predicted from the sample's own previous tokens (teacher forcing). The dense model runs once for all plans.
    progress: called with (samples done, samples in all).
    """
    model = plain_model(model)
    rows = []
    done = 0
    samples = distinct(samples)
    check_vocabulary(samples, model)
    for (task, length), group in group_by_shape(samples).items():
        found: dict[tuple[int, str], list[float]] = {(index, metric): [] for index in range(len(plans)) for metric in METRICS}
        size, which = _batch(model, group), SampleSet(tuple(group)).identity
        for start in range(0, len(group), size):
            batch = group[start : start + size]
            for index, pairs in enumerate(_compared(model, plans, batch)):
                for metric, values in zip(METRICS, zip(*pairs, strict=True), strict=True):
                    found[index, metric] += values
            done += len(batch)
            if progress:
                progress(done, len(samples))
        for (index, metric), per_sample in found.items():
            plan = plans[index]
            interval = mean_share(per_sample) if metric == TOKEN_MATCH else mean(per_sample)
            detail = {"per_sample": per_sample, "samples": which}
            rows.append(Measurement(plan.name, metric, task, length, *interval, plan.density(length), detail))
    return rows


def divergence(dense: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(dense || other) in nats, from log-probabilities (..., vocabulary): (...)."""
    return (dense.exp() * (dense - other)).sum(dim=-1)


@torch.inference_mode()
def _compared(model: PreTrainedModel, plans: Sequence[Plan], batch: Sequence[Sample]) -> list[list[tuple[float, float]]]:
    """Per plan and sample: (mean divergence, share of equal tokens)."""
    dense = [logits.float().log_softmax(dim=-1) for logits in answer_logits(model, batch)]
    compared = []
    for plan in plans:
        # The dense plan needs no mask.
        with contextlib.nullcontext() if plan.is_dense else apply_plan(model, plan, batch[0].length):
            found = answer_logits(model, batch)
        pairs = []
        for expected, logits in zip(dense, found, strict=True):
            nats = divergence(expected, logits.float().log_softmax(dim=-1)).mean()
            match = (expected.argmax(dim=-1) == logits.argmax(dim=-1)).float().mean()
            pairs.append((float(nats), float(match)))
        compared.append(pairs)
    return compared


def _batch(model: PreTrainedModel, group: Sequence[Sample]) -> int:
    """Samples in one forward pass."""
    if model.device.type == "cpu":
        return 1
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    tokens = max(len(sample.answer_positions) for sample in group)
    return max(1, min(GPU_BATCH_TOKENS // group[0].length, KEPT_LOGITS // (tokens * vocabulary)))
