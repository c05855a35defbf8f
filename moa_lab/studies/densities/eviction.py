"""Content-aware eviction at a given density, as a reference: H2O and SnapKV choose keys by the attention of the prompt.

Small reference implementations of the two ideas, not the authors' code:

- h2o (Zhang et al., 2023, arXiv 2306.14048): half of the budget to the keys with the most attention, summed over all queries of the
  prompt (heavy hitters), half to the newest. The authors drop keys while they decode; here it happens once, after the prompt.
- snapkv (Li et al., 2024, arXiv 2404.14469): the newest `OBSERVED` tokens, and the keys that these attend to most, averaged over
  `KERNEL` neighbours: wide enough to keep seven one-digit tokens together, which the published widths of 5 and 7 are not.

Attention is averaged over the query heads of a KV head, and every KV head keeps the same number of keys of its own.

Both have two advantages over a plan: the prefill is dense (which saves no prefill work and no peak memory), and it includes the
question, so that what is kept can depend on what is asked. The dense pass does not answer, though: the prompt's last token, which
predicts the answer's first, already sees only the keys that are left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from moa_lab.calibration.answers import AnswerScore
from moa_lab.calibration.samples import Sample
from moa_lab.evaluate.scoring import score_rows
from moa_lab.geometry import ModelGeometry
from moa_lab.interface import AttentionCall, Handler, route_attention
from moa_lab.kernels.dispatch import span_attention
from moa_lab.kernels.reference import masked_attention, softmax_with_sink
from moa_lab.pipeline import Run
from moa_lab.plan import check_density, dense_plan
from moa_lab.records import Measurement
from moa_lab.studies.plans import LINES, NEEDLES, SUMMARIES, name_of

Method = Literal["h2o", "snapkv"]
METHODS: tuple[Method, ...] = get_args(Method)

OBSERVED = 32
KERNEL = 13
# No mask is materialised, so batches may be larger than for a plan's scores; the short tails are bound by kernel launches.
BATCH_TOKENS = 65_536
# Attention weights in memory at once: 0.5 GB in float32.
BLOCK_WEIGHTS = 2**27


@dataclass(frozen=True)
class Eviction:
    """An eviction method and the share of the prompt's keys that every KV head keeps. Raises ValueError for another method or density."""

    method: Method
    density: float

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        check_density(self.density)

    @property
    def name(self) -> str:
        """For instance `snapkv-25`."""
        return name_of(self.method, self.density)

    def kept_tokens(self, prompt: int) -> int:
        """Keys that a head keeps of `prompt` tokens, including the last one, which cannot be dropped."""
        return max(1, round(self.density * prompt))

    def share(self, geometry: ModelGeometry, sample: Sample) -> float:
        """KV cache kept of prompt and answer when the answer is complete, as a share of the dense one.

        A layer with a window of its own keeps it.
        """
        ((start, stop),) = sample.answers
        kept = self.kept_tokens(start) + stop - start
        dense = [geometry.dense_span_tokens(layer, stop) for layer in range(geometry.layers)]
        return sum(min(kept, span) if window is None else span for span, window in zip(dense, geometry.layer_windows, strict=True)) / sum(
            dense
        )


@dataclass(frozen=True)
class Prefix:
    """One layer's cache of the prompt without its last token. key, value: (batch, kv_heads, tokens, head_dim).

    sums: by method, the attention that every key got, (batch, kv_heads, tokens); empty in a layer with a window of its own.
    """

    key: torch.Tensor
    value: torch.Tensor
    sums: Mapping[Method, torch.Tensor]


def scores_after(
    model: PreTrainedModel, samples: Sequence[Sample], evictions: Sequence[Eviction], progress: Callable[[int, int], None] | None = None
) -> dict[Eviction, list[list[AnswerScore]]]:
    """Loss and exact match of every sample's answer after keys are dropped, as `evaluate.scoring.score_samples` gives them, in the order
    of the samples: the prompts are read once for all evictions.

    Raises ValueError for a sample with several answers, or with a prompt of one token.
    """
    groups: dict[tuple[int, tuple[tuple[int, int], ...]], list[int]] = {}
    for index, sample in enumerate(samples):
        if len(sample.answers) != 1 or sample.answers[0][0] < 2:
            raise ValueError(
                f"eviction needs samples of one answer after a prompt of at least 2 tokens, got one of {sample.task!r} "
                f"with answers at {sample.answers}"
            )
        groups.setdefault((sample.length, sample.answers), []).append(index)
    scores: dict[Eviction, list[list[AnswerScore]]] = {eviction: [[] for _ in samples] for eviction in evictions}
    done = 0
    for (length, _), members in groups.items():
        size = 1 if model.device.type == "cpu" else max(1, BATCH_TOKENS // length)
        for first in range(0, len(members), size):
            batch = members[first : first + size]
            for eviction, found in _scored(model, [samples[index] for index in batch], evictions).items():
                for index, score in zip(batch, found, strict=True):
                    scores[eviction][index] = [score]
            done += len(batch)
            if progress:
                progress(done, len(samples))
    return scores


def eviction_rows(run: Run, densities: Iterable[float], *, tasks: Sequence[str] = (NEEDLES, LINES, SUMMARIES)) -> list[Measurement]:
    """Rows of `h2o-25`, `snapkv-25` and so on, on the test samples of `run`; `density` is the share of the cache that is left."""
    evictions = [Eviction(method, density) for density in densities for method in METHODS]
    sets = [found for n in run.test_lengths for found in run.suites.test(n, tasks)]
    every = [sample for found in sets for sample in found]
    scores = scores_after(run.model, every, evictions, lambda done, total: run.progress("evict", done, total))
    rows = []
    for eviction in evictions:
        left = iter(scores[eviction])
        for found in sets:
            # Only the name of this plan is used; the density depends on the answer and is set below.
            stand_in = dense_plan(run.geometry).renamed(eviction.name)
            share = float(np.mean([eviction.share(run.geometry, sample) for sample in found]))
            rows += [replace(row, density=share) for row in score_rows(stand_in, found, [next(left) for _ in found])]
    return rows


def attention_sums(
    query: torch.Tensor, key: torch.Tensor, scale: float, softcap: float | None = None, first: int = 0,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Causal attention that each key gets from the queries at `first` and after, summed over them and averaged over a group's heads.

    query: (batch, query_heads, tokens, head_dim); key: (batch, kv_heads, tokens, head_dim). float32 (batch, kv_heads, tokens).
    """
    batch, heads, tokens, width = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    sums = torch.zeros(batch, kv_heads, tokens, device=key.device)
    rows = max(1, BLOCK_WEIGHTS // (batch * heads * tokens))
    for start in range(first, tokens, rows):
        stop = min(start + rows, tokens)
        asked = (query[:, :, start:stop].float() * scale).reshape(batch, kv_heads, -1, width)
        scores = asked @ key[:, :, :stop].float().transpose(-1, -2)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.view(batch, kv_heads, group, stop - start, stop)
        # Only the block's own keys can lie after a query.
        future = torch.ones(stop - start, stop - start, dtype=torch.bool, device=key.device).triu(1)
        scores[..., start:].masked_fill_(future, float("-inf"))
        if sink_logits is None:
            weights = scores.softmax(dim=-1)
        else:
            weights, _ = softmax_with_sink(scores, sink_logits.reshape(kv_heads, group, 1, 1))
        sums[..., :stop] += weights.sum(dim=(2, 3)) / group
    return sums


def kept_positions(method: Method, sums: torch.Tensor, kept: int) -> torch.Tensor:
    """Which `kept` of the keys stay: int64 (batch, kv_heads, kept), ascending. sums: `Prefix.sums` of the method."""
    tokens = sums.shape[-1]
    newest = kept // 2 if method == "h2o" else min(OBSERVED, kept)
    old = sums[..., : tokens - newest]
    if method == "snapkv" and old.shape[-1]:
        old = F.avg_pool1d(old, KERNEL, stride=1, padding=KERNEL // 2)
    heavy = old.topk(kept - newest, dim=-1).indices
    recent = torch.arange(tokens - newest, tokens, device=sums.device).expand(*sums.shape[:2], newest)
    return torch.cat([heavy, recent], dim=-1).sort(dim=-1).values


def tail_attention(call: AttentionCall, prefix: Prefix, kept: torch.Tensor) -> torch.Tensor:
    """Attention of the tokens that follow the prefix over its `kept` keys, (batch, kv_heads, keys), and over one another."""
    where = kept[..., None].expand(-1, -1, -1, call.key.shape[-1])
    key = torch.cat([prefix.key.gather(2, where), call.key], dim=2)
    value = torch.cat([prefix.value.gather(2, where), call.value], dim=2)
    tokens, before = call.query.shape[2], prefix.key.shape[2]
    own = torch.arange(before, before + tokens, device=kept.device)
    positions = torch.cat([kept, own.expand(*kept.shape[:2], tokens)], dim=-1)[:, :, None]
    shown = positions <= own[:, None]
    if call.mask.reach is not None:
        shown &= own[:, None] - positions < call.mask.reach
    shown = shown.repeat_interleave(call.query.shape[1] // kept.shape[1], dim=1)
    return masked_attention(call.query, key, value, shown, call.scale, call.softcap, call.sink_logits)


@torch.inference_mode()
def _scored(model: PreTrainedModel, batch: Sequence[Sample], evictions: Sequence[Eviction]) -> dict[Eviction, list[AnswerScore]]:
    """Scores of samples of one shape."""
    ((start, stop),) = batch[0].answers
    tokens = torch.from_numpy(np.stack([sample.tokens for sample in batch])).to(model.device)
    prefixes: dict[int, Prefix] = {}
    methods = tuple(dict.fromkeys(eviction.method for eviction in evictions))
    with route_attention(model, partial(_reader, prefixes=prefixes, methods=methods)):
        model(input_ids=tokens[:, : start - 1], use_cache=False, logits_to_keep=1)
    own = torch.arange(start - 1, stop - 1, device=model.device)[None]
    targets = tokens[:, start:stop]
    scores = {}
    for eviction in evictions:
        # The prompt's last token is in the tail already.
        kept = eviction.kept_tokens(start) - 1
        with route_attention(model, partial(_answerer, prefixes=prefixes, method=eviction.method, kept=kept)):
            logits = model(input_ids=tokens[:, start - 1 : stop - 1], position_ids=own, use_cache=False).logits
        losses = F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none").mean(dim=1)
        exact = (logits.argmax(dim=-1) == targets).all(dim=1)
        scores[eviction] = [AnswerScore(loss, hit, stop - start) for loss, hit in zip(losses.tolist(), exact.tolist(), strict=True)]
    return scores


def _reader(layer: int, prefixes: dict[int, Prefix], methods: Sequence[Method]) -> Handler:
    """Dense attention that stores its keys, values and attention sums in `prefixes`."""

    def attend(call: AttentionCall) -> torch.Tensor:
        if call.mask.explicit is not None:
            raise ValueError(f"layer {layer} has an attention mask of its own: eviction is not defined for it")
        tokens = call.key.shape[2]
        sums = {}
        if call.mask.reach is None:
            first: dict[Method, int] = {"h2o": 0, "snapkv": max(0, tokens - OBSERVED)}
            sums = {
                method: attention_sums(call.query, call.key, call.scale, call.softcap, first[method], call.sink_logits)
                for method in methods
            }
        prefixes[layer] = Prefix(call.key, call.value, sums)
        windows = np.full(call.key.shape[1], tokens)
        return span_attention(call.query, call.key, call.value, call.mask, 0, windows, call.scale, call.softcap, call.sink_logits)

    return attend


def _answerer(layer: int, prefixes: Mapping[int, Prefix], method: Method, kept: int) -> Handler:
    """Attention over what is left of a prefix; a layer with a window of its own drops nothing more."""
    prefix = prefixes[layer]
    if prefix.sums:
        positions = kept_positions(method, prefix.sums[method], kept)
    else:
        batch, heads, tokens = prefix.key.shape[:3]
        positions = torch.arange(tokens, device=prefix.key.device).expand(batch, heads, tokens)
    return lambda call: tail_attention(call, prefix, positions)
