"""How likely a model finds the answers of samples, and what it would answer itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from moa_lab.calibration.samples import Sample
from moa_lab.models import geometry_of


@dataclass(frozen=True, eq=False)
class AnswerScore:
    """Score of one answer. loss: mean nats per token. exact: whether greedy decoding gives exactly this answer."""

    loss: float
    exact: bool
    tokens: int


def forward_bytes(model: PreTrainedModel, length: int) -> int:
    """Bytes that a forward pass over `length` tokens takes beyond the weights, at most: a layer that writes its attention scores out."""
    return 8 * geometry_of(model).query_heads * length**2


def answer_logits(
    model: PreTrainedModel, batch: Sequence[Sample], embedded: torch.Tensor | None = None, past: DynamicCache | None = None
) -> list[torch.Tensor]:
    """Logits that predict each sample's answer tokens: per sample (answer tokens, vocabulary).

    batch: samples of one length. embedded: (batch, length, hidden) input embeddings, when a gradient must flow into them. past: K and V
    of the first tokens, fewer than come before the first of those logits; only the other tokens are run, and theirs are added.
    Only the logits that are needed are computed: the vocabulary is by far the widest layer.
    """
    seen = 0 if past is None else int(past.get_seq_length())
    positions = [sample.answer_positions - 1 for sample in batch]
    kept = np.unique(np.concatenate(positions))
    tokens = torch.from_numpy(np.stack([sample.tokens for sample in batch])).to(model.device)
    inputs = {"input_ids": tokens[:, seen:]} if embedded is None else {"inputs_embeds": embedded[:, seen:]}
    wanted = torch.from_numpy(kept - seen).to(model.device)
    logits = model(**inputs, past_key_values=past, use_cache=past is not None, logits_to_keep=wanted).logits
    counts = [len(where) for where in positions]
    rows = np.repeat(np.arange(len(batch)), counts)
    columns = np.searchsorted(kept, np.concatenate(positions))
    # One indexing for the whole batch: the gradient of every indexing is as large as all the logits.
    picked = logits[torch.from_numpy(rows).to(logits.device), torch.from_numpy(columns).to(logits.device)]
    return list(picked.split(counts))


@torch.inference_mode()
def score_answers(model: PreTrainedModel, batch: Sequence[Sample], past: DynamicCache | None = None) -> list[list[AnswerScore]]:
    """Loss and exact match of every answer of every sample, from one forward pass, which goes on over `past` as in `answer_logits`.

    An answer is exact when each of its tokens is the most likely one given everything before it, which is when greedy
    decoding from the same prompt would produce it.
    """
    return [scores_of(*pair) for pair in zip(batch, answer_logits(model, batch, past=past), strict=True)]


@torch.no_grad()
def scores_of(sample: Sample, logits: torch.Tensor) -> list[AnswerScore]:
    """The scores of a sample's answers from its `answer_logits`."""
    targets = torch.from_numpy(sample.tokens[sample.answer_positions]).to(logits.device)
    losses, hits = _told(logits, targets)
    return _scores(sample, losses.cpu().numpy(), hits.cpu().numpy())


@torch.inference_mode()
def answer_greedily(model: PreTrainedModel, batch: Sequence[Sample], never: Sequence[int] = ()) -> list[tuple[Sample, list[AnswerScore]]]:
    """`fill_greedily`, and what `score_answers` says of the samples that it gives: the logits are at hand.

    An answer that would have gone on with a token of `never` is not exact.
    """
    answers = batch[0].answers
    if any(sample.answers != answers or sample.length != batch[0].length for sample in batch):
        raise ValueError("samples that are filled together need the same length and the same answer positions")
    tokens = torch.from_numpy(np.stack([sample.tokens for sample in batch])).to(model.device)
    cache = DynamicCache(config=model.config)
    seen = 0
    told = []
    for start, stop in answers:
        for position in range(start, stop):
            logits = model(input_ids=tokens[:, seen:position], past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
            seen = position
            allowed = logits.index_fill(-1, torch.tensor(list(never), dtype=torch.long, device=logits.device), float("-inf"))
            tokens[:, position] = allowed.argmax(dim=-1)
            told.append(_told(logits, tokens[:, position]))
    filled = tokens.cpu().numpy()
    # (samples, answer tokens).
    losses, hits = (torch.stack(values, dim=-1).cpu().numpy() for values in zip(*told, strict=True))
    samples = [replace(sample, tokens=filled[index]) for index, sample in enumerate(batch)]
    return [(sample, _scores(sample, losses[index], hits[index])) for index, sample in enumerate(samples)]


def fill_greedily(model: PreTrainedModel, batch: Sequence[Sample], never: Sequence[int] = ()) -> list[Sample]:
    """The samples with every answer replaced by the model's own greedy one, of the same number of tokens.

    batch: samples of one length whose answers lie at the same positions. never: token ids that are not generated
    (end of sequence), so that the length stays exact.
    """
    return [sample for sample, _ in answer_greedily(model, batch, never)]


def _told(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Per row of `logits` (rows, vocabulary): the nats of its target, and whether that is the most likely token."""
    losses = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    return losses, logits.argmax(dim=-1) == targets


def _scores(sample: Sample, losses: np.ndarray, hits: np.ndarray) -> list[AnswerScore]:
    """The scores of a sample's answers from those of its answer tokens, in order."""
    scores, at = [], 0
    for first, last in sample.answers:
        part = slice(at, at + last - first)
        scores.append(AnswerScore(float(losses[part].mean()), bool(hits[part].all()), last - first))
        at += last - first
    return scores
