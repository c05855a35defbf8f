"""Slopes: what every rule of every head would have changed in drawn plans, to first order; the model's side of learning."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from moa_lab import processes
from moa_lab.cache.storage import heads_as_stored
from moa_lab.calibration.answers import answer_logits
from moa_lab.calibration.samples import Sample, SampleSet
from moa_lab.geometry.wrappers import plain_model
from moa_lab.interface import AttentionCall, Handler, route_attention
from moa_lab.interface.compiled import compiled_layers
from moa_lab.kernels.dispatch import drawn_attention
from moa_lab.kernels.mixture import BLOCK
from moa_lab.learning.batches import Batches, batch_tokens
from moa_lab.learning.checkpoint import Checkpoint, course_of
from moa_lab.learning.roundings import Widths, drawn_widths, widths_of
from moa_lab.plan import WHOLE_BITS, Bits
from moa_lab.profiling.backward import checkpointed
from moa_lab.profiling.estimate import SAFETY, Estimate, estimate_cost
from moa_lab.profiling.inputs import check_inputs
from moa_lab.provenance import digest
from moa_lab.records import LossTable

LONG_ANSWERS = 0.125
"""Share of a sample's tokens from which on its answers are long: half of a plain text counts, of a question a few tokens."""
FREE_SHARE = 0.5
"""Share of the free memory for what autograd saves; logits and the kernels' sums come on top."""

Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""


@dataclass(frozen=True)
class DrawnSlope:
    """divergence: of the answers from the dense model's, by task, in nats per token. slope: float64 (heads, rules), of the tasks'
    weighted sum; of the table's choices of a rule and bits, where it has several mixes of bits."""

    divergence: dict[str, float]
    slope: np.ndarray


class SlopeSampler:
    """Runs samples of one length under plans drawn from chances, one plan per sample.

    A rule's window is rounded to whole blocks of 64 tokens, up or down at random so that its mean is right. Where the table knows in which
    bits its choices are stored, these are drawn with the rule. tokens_in_flight: tokens run at once, at least one sample. checkpoint:
    recompute a layer's activations in the backward pass. weights: of the tasks in the slope, 1 where not given. stands_for: see
    `block_windows`. bits: of the K and V of all heads, for other tables; every query sees them as they are stored. rng: what the next
    draws depend on.
    """

    def __init__(
        self, model: PreTrainedModel, table: LossTable, seed: int, tokens_in_flight: int = 0, checkpoint: bool = False,
        weights: Mapping[str, float] | None = None, stands_for: int | None = None, bits: Bits = WHOLE_BITS,
    ) -> None:  # fmt: skip
        self._bits, self._widths = bits, widths_of(table.mixes) if table.stored else None
        self._model, self._table, self._weights, self._stands_for = model, table, dict(weights or {}), stands_for
        self._tokens, self._checkpoint = tokens_in_flight, checkpoint
        self.rng = np.random.default_rng(seed)

    @classmethod
    def fitting(
        cls, model: PreTrainedModel, table: LossTable, samples: SampleSet, seed: int, weights: Mapping[str, float] | None = None,
        stands_for: int | None = None, bits: Bits = WHOLE_BITS,
    ) -> SlopeSampler:  # fmt: skip
        """A sampler that runs as much of a batch of `samples` at once as fits in memory; on a CPU, where batches are no faster, one.

        Raises ValueError where not even one sample fits with its activations recomputed.
        """
        longest = max(samples, key=lambda sample: sample.length)
        estimate = estimate_cost(model, [longest], sink_tokens=table.sink_tokens)
        estimate.require_fit()
        if model.device.type == "cpu":
            return cls(model, table, seed, weights=weights, stands_for=stands_for, bits=bits)
        tokens = processes.from_first(lambda: tokens_at_once(estimate))
        return cls(model, table, seed, tokens, checkpoint=tokens < longest.length, weights=weights, stands_for=stands_for, bits=bits)

    def __call__(self, batch: Sequence[Sample], chances: np.ndarray) -> DrawnSlope:
        """chances: (heads, rules). Raises ValueError as `route_attention` does."""
        table, length = self._table, batch[0].length
        geometry = table.geometry
        windows = block_windows(table, length, self._stands_for)
        choices = self._choices(chances, len(batch))
        counts = self._counts(windows, choices).to(self._model.device)
        stored = torch.from_numpy(np.array(table.stored)[choices]).to(self._model.device) if table.stored else None
        share = Counter(sample.task for sample in batch)
        divergence = dict.fromkeys(share, 0.0)
        blocks = -(-length // BLOCK)
        by_window = np.zeros((geometry.layers, geometry.kv_heads, blocks))
        by_width = [np.zeros((geometry.layers, geometry.kv_heads, len(widths))) for widths in self._widths or ()]

        def run(places: list[int]) -> tuple[list[float], np.ndarray, list[np.ndarray]]:
            part = [batch[at] for at in places]
            weights = [self._weights.get(sample.task, 1.0) / share[sample.task] for sample in part]
            drawn = None if stored is None or self._widths is None else (stored[:, places], self._widths)
            return drawn_slopes(
                self._model, part, counts[:, places], weights, table.sink_tokens, checkpoint=self._checkpoint, bits=self._bits, drawn=drawn
            )

        parts = list(passes(batch, self._at_once(length, len(batch))))
        found = processes.shared_out(lambda mine: [run(places) for places in mine], parts)
        for places, (lost, slope, moved) in zip(parts, found, strict=True):
            by_window += slope
            for total, own in zip(by_width, moved, strict=True):
                total += own
            for at, value in zip(places, lost, strict=True):
                divergence[batch[at].task] += value / share[batch[at].task]
        by_rule = np.stack([layer @ _shares(own, blocks).T for layer, own in zip(by_window, windows, strict=True)])
        for part, (total, widths) in enumerate(zip(by_width, self._widths or (), strict=True)):
            by_rule += total[..., [widths.index(mix[part]) for mix in table.stored]]
        return DrawnSlope(divergence, by_rule.reshape(len(chances), -1))

    def _at_once(self, length: int, batch: int) -> int:
        """Samples of a pass: as many as fit, and few enough that every process has some with long answers and some without."""
        fitting, count = max(1, self._tokens // length), processes.sharing()
        return fitting if count == 1 else max(1, min(fitting, batch // (2 * count)))

    def _choices(self, chances: np.ndarray, count: int) -> np.ndarray:
        """What each head draws: int (layers, count, kv_heads), places in `chances` (heads, rules)."""
        geometry = self._table.geometry
        ends = np.cumsum(chances, axis=1)
        drawn = (self.rng.random((count, len(chances), 1)) * ends[:, -1:] > ends).sum(axis=-1)
        return np.asarray(drawn.reshape(count, geometry.layers, geometry.kv_heads).transpose(1, 0, 2))

    def _counts(self, windows: np.ndarray, choices: np.ndarray) -> torch.Tensor:
        """Blocks that each head sees under `choices`: int32 (layers, count, kv_heads)."""
        wanted = windows[np.arange(len(windows))[:, None, None], choices]
        # By sample, then layer.
        beyond = self.rng.random(wanted.swapaxes(0, 1).shape).swapaxes(0, 1)
        return torch.from_numpy(np.floor(wanted + beyond).astype(np.int32))


def tokens_at_once(estimate: Estimate) -> int:
    """Tokens whose activations fit in the memory that is free beside what `estimate` was made with; fewer than a sample: recompute."""
    return int(FREE_SHARE * estimate.free_bytes / (SAFETY * estimate.bytes_per_token))


def drawn_slopes(
    model: PreTrainedModel, batch: Sequence[Sample], counts: torch.Tensor, weights: Sequence[float], sink_tokens: int, *,
    checkpoint: bool = False, bits: Bits = WHOLE_BITS, drawn: tuple[torch.Tensor, Widths] | None = None,
) -> tuple[list[float], np.ndarray, list[np.ndarray]]:  # fmt: skip
    """Divergence of every sample, and the slope of their weighted sum in windows of 1, 2, .. blocks: (layers, kv_heads, blocks).

    batch: samples of one length. counts: int32 (layers, batch, kv_heads), blocks that each head sees. weights: of the samples.
    checkpoint: recompute a layer's activations in the backward pass. bits: of K and V of all heads under the plans. drawn: instead of
    them, those of each head, int (layers, batch, kv_heads, 2), and the widths among which K and V are drawn; then the slopes in these
    come as well, of K and of V, (layers, kv_heads, widths) each (see `roundings`).
    """
    stored = None if bits == WHOLE_BITS else (bits,) * counts.shape[2]
    blocks = -(-batch[0].length // BLOCK)
    device = counts.device
    shift = torch.zeros(*counts.shape, blocks, device=device, requires_grad=True)
    moves = [torch.zeros(*counts.shape, len(known), device=device, requires_grad=True) for known in (drawn[1] if drawn else ())]

    def handler(layer: int) -> Handler:
        def rounded(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
            if drawn is None:
                return heads_as_stored(call.key, call.value, stored)
            here = call.key.device
            (keys, values), (wide_keys, wide_values) = (move[layer].to(here) for move in moves), drawn[0][layer].to(here).unbind(-1)
            return drawn_widths(call.key, keys, wide_keys, drawn[1][0]), drawn_widths(call.value, values, wide_values, drawn[1][1])

        def attend(call: AttentionCall) -> torch.Tensor:
            key, value = rounded(call)
            # A model's layers may lie on several devices.
            own_shift, own_counts = (x[layer].to(key.device) for x in (shift, counts))
            return drawn_attention(
                call.query, key, value, call.mask, own_shift, own_counts, sink_tokens, call.scale, call.softcap, call.sink_logits
            )

        return attend

    with torch.no_grad():
        wanted = _log_probabilities(model, batch)
    with torch.enable_grad(), checkpointed(model, checkpoint), route_attention(model, handler):
        found = _log_probabilities(model, batch)
        lost = torch.stack(
            [
                torch.nn.functional.kl_div(ours, dense, reduction="batchmean", log_target=True)
                for ours, dense in zip(found, wanted, strict=True)
            ]
        )
        slope, *moved = torch.autograd.grad((lost * lost.new_tensor(weights)).sum(), [shift, *moves])
    return lost.tolist(), _over_samples(slope), [_over_samples(part) for part in moved]


def _over_samples(slope: torch.Tensor) -> np.ndarray:
    """The sum over a batch: (layers, batch, kv_heads, n) to float64 (layers, kv_heads, n)."""
    return np.asarray(slope.sum(dim=1).double().cpu().numpy())


def mean_slopes(
    model: PreTrainedModel,
    samples: SampleSet,
    table: LossTable,
    chances: np.ndarray,
    *,
    steps: int,
    seed: int = 0,
    stands_for: int | None = None,
    parts_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> np.ndarray:
    """Mean slope of every rule of every head over `steps` batches, under plans drawn from `chances` (heads, rules).

    stands_for: a length that the samples stand for, for instance one that is too long to be run: every rule has the span there, scaled
    with the length. parts_dir: keeps the sum every half a minute, from which the same call goes on after a kill. float64 (heads, rules),
    in nats per answer token, summed over tasks; only differences between a head's rules matter.
    Raises ValueError for samples or a table of another model, a task that lacks a length, and for samples that do not fit in memory.
    """
    model = plain_model(model)
    check_inputs(model, samples, table)
    batches, sampler = Batches(samples, batch_tokens(model), seed), SlopeSampler.fitting(model, table, samples, seed, stands_for=stands_for)
    generators = (batches.rng, sampler.rng)
    course = {"chances": digest(np.ascontiguousarray(chances).tobytes()), "steps": steps, "seed": seed, "stands_for": stands_for}
    checkpoint = Checkpoint(parts_dir, "slopes", {**course_of(model, samples, table), **course})
    total, done = np.zeros(chances.shape), 0
    if saved := processes.from_first(checkpoint.load):
        total, done = saved[0]["total"], saved[1]["steps"]
        for generator, state in zip(generators, saved[1]["generators"], strict=True):
            generator.bit_generator.state = state
    with compiled_layers(model, (steps - done) * batch_tokens(model)):
        for step in range(done, steps):
            if progress:
                progress(step, steps)
            total = total + sampler(batches.draw(), chances).slope
            state = {"steps": step + 1, "generators": [rng.bit_generator.state for rng in generators]}
            checkpoint.save({"total": total}, state, last=step + 1 == steps)
    if progress:
        progress(steps, steps)
    return total / steps


def block_windows(table: LossTable, length: int, stands_for: int | None = None) -> np.ndarray:
    """Windows of the rules in blocks: float64 (layers, rules), from 1 to all blocks of `length`.

    n blocks hold 64 (n - 1) to 64 n tokens, by where in its block a query is: half a block fewer on the mean. stands_for: the length at
    which rules have their spans, of which `length` sees the same share; a layer's own window is as long at every length.
    """
    blocks = -(-length // BLOCK)
    n = stands_for or length
    spans = table.span_tokens(n).astype(np.float64)
    whole = np.array([table.geometry.dense_span_tokens(layer, n) for layer in range(table.geometry.layers)])
    spans[whole == n] *= length / n
    whole = np.where(whole == n, length, whole)
    windows = np.clip((spans - table.sink_tokens) / BLOCK + 0.5, 1, blocks)
    return np.where(spans >= whole[:, None], float(blocks), windows)


def passes(batch: Sequence[Sample], size: int) -> Iterator[list[int]]:
    """Places in `batch` of samples that run at once, at most `size`: those with long answers apart from the others, since a pass computes
    logits of all its samples wherever one of them has an answer."""
    for long in (False, True):
        places = [at for at, sample in enumerate(batch) if (len(sample.answer_positions) > LONG_ANSWERS * sample.length) == long]
        yield from (places[start : start + size] for start in range(0, len(places), size))


def _shares(windows: np.ndarray, blocks: int) -> np.ndarray:
    """How each of `windows` (rules,) divides between the whole blocks below and above it: (rules, blocks), for 1, 2, .. blocks."""
    return np.maximum(1 - np.abs(windows[:, None] - np.arange(1, blocks + 1)), 0)


def _log_probabilities(model: PreTrainedModel, batch: Sequence[Sample]) -> list[torch.Tensor]:
    """Of every answer token of every sample: float32 (answer tokens, vocabulary)."""
    return [logits.float().log_softmax(dim=-1) for logits in answer_logits(model, batch)]
