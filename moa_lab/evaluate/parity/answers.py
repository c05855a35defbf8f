"""Needles answered with the ring cache and the kernels, compared with the reference: the same answers, the same loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from moa_lab.calibration.answers import answer_logits
from moa_lab.calibration.samples import Sample, group_by_shape
from moa_lab.evaluate.parity.bench import Bench
from moa_lab.evaluate.parity.record import ParityRow
from moa_lab.evaluate.scoring import GPU_BATCH_TOKENS
from moa_lab.runtime import Sampling, apply_plan, ring_cache
from moa_lab.runtime.decoding import Decoder
from moa_lab.runtime.generate import prefill

SAME_ANSWERS = 0.98
"""Share of needles that must be answered alike: another order of summation may change an answer between two close tokens."""
LOSS_TOLERANCE = 0.01
"""Relative, of the mean loss of the answers."""


@torch.no_grad()
def answered(bench: Bench, samples: Sequence[Sample]) -> ParityRow:
    """The first answer of every sample, by our decode loop and by the reference; and the loss of both on the right answer.

    The spans are those of each sample's own length. An answer is the same if each of its tokens is the reference's likeliest one
    given the tokens before it.
    """
    same, hits, losses = 0, [0, 0], []
    for batch in _batches(samples):
        length, (first, last) = batch[0].length, batch[0].answers[0]
        right = np.stack([sample.tokens[first:last] for sample in batch])
        said = _said(bench, batch)
        with apply_plan(bench.model, bench.plan, length):
            ours = answer_logits(bench.model, batch)
        with bench.masked(length):
            reference = answer_logits(bench.model, batch)
            # The reference's predictions after each token of our answers (teacher forcing).
            after = answer_logits(bench.model, [_answering(sample, row) for sample, row in zip(batch, said, strict=True)])
        for row in range(len(batch)):
            same += np.array_equal(_likeliest(after[row]), said[row])
            hits[0] += np.array_equal(said[row], right[row])
            hits[1] += np.array_equal(_likeliest(reference[row]), right[row])
            losses.append([_loss(logits[row], right[row]) for logits in (ours, reference)])
    ours_loss, reference_loss = np.mean(losses, axis=0)
    difference, agreement = abs(ours_loss / reference_loss - 1), same / len(samples)
    lengths = ", ".join(map(str, sorted({sample.length for sample in samples})))
    compared = f"needles in {lengths} tokens: {hits[0]} right, reference {hits[1]}; loss {ours_loss:.4f}, reference {reference_loss:.4f}"
    passed = agreement >= SAME_ANSWERS and difference <= LOSS_TOLERANCE
    finite = float(difference) if np.isfinite(difference) else None
    return ParityRow("needles", compared, len(samples), finite, agreement, len(samples), LOSS_TOLERANCE, bool(passed))


def _batches(samples: Sequence[Sample]) -> Iterator[list[Sample]]:
    """Batches of samples with only their first answer, which is at the same place in all samples of a batch."""
    first = [replace(sample, answers=sample.answers[:1]) for sample in samples]
    for (_, length), alike in group_by_shape(first).items():
        size = max(1, GPU_BATCH_TOKENS // length)
        for place in sorted({sample.answers for sample in alike}):
            group = [sample for sample in alike if sample.answers == place]
            yield from (group[start : start + size] for start in range(0, len(group), size))


def _said(bench: Bench, batch: Sequence[Sample]) -> np.ndarray:
    """Tokens that our decode loop generates from the prompts, as many as the answers have: int64 (batch, tokens)."""
    length, (first, last) = batch[0].length, batch[0].answers[0]
    with apply_plan(bench.model, bench.plan, length):
        cache = ring_cache(bench.model, length)
        logits, lengths = prefill(bench.model, cache, [sample.tokens[:first].tolist() for sample in batch], GPU_BATCH_TOKENS)
        decoder = Decoder(bench.model, cache, lengths, Sampling(), (), last - first)
        decoder.first(logits)
        decoder.run()
    return np.array(decoder.tokens())


def _answering(sample: Sample, said: np.ndarray) -> Sample:
    first, last = sample.answers[0]
    return replace(sample, tokens=np.concatenate([sample.tokens[:first], said, sample.tokens[last:]]))


def _likeliest(logits: torch.Tensor) -> np.ndarray:
    return logits.argmax(dim=-1).cpu().numpy()


def _loss(logits: torch.Tensor, right: np.ndarray) -> float:
    """Mean nats per token."""
    return float(torch.nn.functional.cross_entropy(logits.float(), torch.from_numpy(right).to(logits.device)))
