"""What every rule of every head would have changed, under plans that are drawn: the model's side of learning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from moa_lab.calibration.answers import answer_logits
from moa_lab.calibration.samples import Sample, SampleSet
from moa_lab.interface import AttentionCall, Handler, route_attention
from moa_lab.kernels.dispatch import drawn_attention
from moa_lab.kernels.mixture import BLOCK
from moa_lab.learning.batches import Batches, batch_tokens
from moa_lab.records import LossTable

Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""


@dataclass(frozen=True)
class DrawnSlope:
    """divergence: of the answers from the dense model's, by task, in nats a token. slope: float64 (heads, rules), of the tasks' sum."""

    divergence: dict[str, float]
    slope: np.ndarray


class SlopeSampler:
    """Runs samples of one length under plans drawn from chances, a plan for each sample.

    A rule's window is taken in whole blocks of 64 tokens, rounded up or down by chance so that its mean is right.
    """

    def __init__(self, model: PreTrainedModel, table: LossTable, seed: int) -> None:
        self._model, self._table = model, table
        self._rng = np.random.default_rng(seed)

    def __call__(self, batch: Sequence[Sample], chances: np.ndarray) -> DrawnSlope:
        """chances: (heads, rules). Raises ValueError as `route_attention` does."""
        table, length = self._table, batch[0].length
        geometry = table.geometry
        windows = block_windows(table, length)
        counts = self._drawn(windows, chances, len(batch)).to(self._model.device)
        blocks = -(-length // BLOCK)
        shift = torch.zeros(geometry.layers, len(batch), geometry.kv_heads, blocks, device=self._model.device, requires_grad=True)

        def handler(layer: int) -> Handler:
            def attend(call: AttentionCall) -> torch.Tensor:
                return drawn_attention(
                    call.query, call.key, call.value, call.mask, shift[layer], counts[layer], table.sink_tokens, call.scale, call.softcap
                )

            return attend

        with torch.no_grad():
            wanted = _log_probabilities(self._model, batch)
        with torch.enable_grad(), route_attention(self._model, handler):
            found = _log_probabilities(self._model, batch)
            lost: dict[str, list[torch.Tensor]] = {}
            for sample, ours, dense in zip(batch, found, wanted, strict=True):
                divergence = torch.nn.functional.kl_div(ours, dense, reduction="batchmean", log_target=True)
                lost.setdefault(sample.task, []).append(divergence)
            means = {task: torch.stack(values).mean() for task, values in lost.items()}
            (slope,) = torch.autograd.grad(torch.stack(list(means.values())).sum(), shift)
        by_window = slope.sum(dim=1).double().cpu().numpy()
        by_rule = np.stack([layer @ _shares(own, blocks).T for layer, own in zip(by_window, windows, strict=True)])
        return DrawnSlope({task: float(mean.detach()) for task, mean in means.items()}, by_rule.reshape(len(chances), -1))

    def _drawn(self, windows: np.ndarray, chances: np.ndarray, count: int) -> torch.Tensor:
        """Blocks that each head sees: int32 (layers, count, kv_heads)."""
        geometry = self._table.geometry
        ends = np.cumsum(chances, axis=1)
        rules = (self._rng.random((count, len(chances), 1)) * ends[:, -1:] > ends).sum(axis=-1)
        wanted = windows[np.arange(len(chances)) // geometry.kv_heads, rules]
        whole = np.floor(wanted + self._rng.random(wanted.shape)).astype(np.int32)
        return torch.from_numpy(whole.reshape(count, geometry.layers, geometry.kv_heads).transpose(1, 0, 2).copy())


def mean_slopes(
    model: PreTrainedModel,
    samples: SampleSet,
    table: LossTable,
    chances: np.ndarray,
    *,
    steps: int,
    seed: int = 0,
    progress: Progress | None = None,
) -> np.ndarray:
    """What every rule of every head loses under plans drawn from `chances` (heads, rules), to first order, as a mean of `steps` batches.

    float64 (heads, rules), in nats per answer token, summed over tasks; only differences within a head count. Raises ValueError for a
    task that lacks a length.
    """
    batches, sampler = Batches(samples, batch_tokens(model), seed), SlopeSampler(model, table, seed)
    total = np.zeros(chances.shape)
    for step in range(steps):
        if progress:
            progress(step, steps)
        total += sampler(batches.draw(), chances).slope
    if progress:
        progress(steps, steps)
    return total / steps


def block_windows(table: LossTable, length: int) -> np.ndarray:
    """Windows of the rules in blocks: float64 (layers, rules), from 1 to all blocks of `length`.

    n blocks hold 64 (n - 1) to 64 n tokens, by where in its block a query is: half a block fewer on the mean.
    """
    blocks = -(-length // BLOCK)
    spans = table.span_tokens(length)
    whole = np.array([table.geometry.dense_span_tokens(layer, length) for layer in range(table.geometry.layers)])
    windows = np.clip((spans - table.sink_tokens) / BLOCK + 0.5, 1, blocks)
    return np.where(spans >= whole[:, None], float(blocks), windows)


def _shares(windows: np.ndarray, blocks: int) -> np.ndarray:
    """How each of `windows` (rules,) divides between the whole blocks below and above it: (rules, blocks), for 1, 2, .. blocks."""
    return np.maximum(1 - np.abs(windows[:, None] - np.arange(1, blocks + 1)), 0)


def _log_probabilities(model: PreTrainedModel, batch: Sequence[Sample]) -> list[torch.Tensor]:
    """Of every answer token of every sample: float32 (answer tokens, vocabulary)."""
    return [logits.float().log_softmax(dim=-1) for logits in answer_logits(model, batch)]
