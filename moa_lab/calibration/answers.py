"""How likely a model finds the answers of samples, and what it would answer itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from moa_lab.calibration.samples import Sample


@dataclass(frozen=True, eq=False)
class AnswerScore:
    """Score of one answer. loss: mean nats per token. exact: whether greedy decoding gives exactly this answer."""

    loss: float
    exact: bool
    tokens: int


def answer_logits(model: PreTrainedModel, batch: Sequence[Sample], embedded: torch.Tensor | None = None) -> list[torch.Tensor]:
    """Logits that predict each sample's answer tokens: per sample (answer tokens, vocabulary).

    batch: samples of one length. embedded: (batch, length, hidden) input embeddings, when a gradient must flow into them.
    Only the logits that are needed are computed: the vocabulary is by far the widest layer.
    """
    positions = [sample.answer_positions - 1 for sample in batch]
    kept = np.unique(np.concatenate(positions))
    tokens = torch.from_numpy(np.stack([sample.tokens for sample in batch])).to(model.device)
    inputs = {"input_ids": tokens} if embedded is None else {"inputs_embeds": embedded}
    logits = model(**inputs, use_cache=False, logits_to_keep=torch.from_numpy(kept).to(model.device)).logits
    counts = [len(where) for where in positions]
    rows = np.repeat(np.arange(len(batch)), counts)
    columns = np.searchsorted(kept, np.concatenate(positions))
    # One indexing for the whole batch: the gradient of every indexing is as large as all the logits.
    picked = logits[torch.from_numpy(rows).to(logits.device), torch.from_numpy(columns).to(logits.device)]
    return list(picked.split(counts))


@torch.inference_mode()
def score_answers(model: PreTrainedModel, batch: Sequence[Sample]) -> list[list[AnswerScore]]:
    """Loss and exact match of every answer of every sample, from one forward pass.

    An answer is exact when each of its tokens is the most likely one given everything before it, which is when greedy
    decoding from the same prompt would produce it.
    """
    results = []
    for sample, logits in zip(batch, answer_logits(model, batch), strict=True):
        targets = torch.from_numpy(sample.tokens[sample.answer_positions]).to(logits.device)
        losses = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none").cpu().numpy()
        hits = (logits.argmax(dim=-1) == targets).cpu().numpy()
        scores, start = [], 0
        for first, last in sample.answers:
            part = slice(start, start + last - first)
            scores.append(AnswerScore(float(losses[part].mean()), bool(hits[part].all()), last - first))
            start += last - first
        results.append(scores)
    return results


@torch.inference_mode()
def fill_greedily(model: PreTrainedModel, batch: Sequence[Sample], never: Sequence[int] = ()) -> list[Sample]:
    """The samples with every answer replaced by the model's own greedy one, of the same number of tokens.

    batch: samples of one length whose answers lie at the same positions. never: token ids that are not generated
    (end of sequence), so that the length stays exact.
    """
    answers = batch[0].answers
    if any(sample.answers != answers or sample.length != batch[0].length for sample in batch):
        raise ValueError("samples that are filled together need the same length and the same answer positions")
    tokens = torch.from_numpy(np.stack([sample.tokens for sample in batch])).to(model.device)
    cache = DynamicCache(config=model.config)
    seen = 0
    for start, stop in answers:
        for position in range(start, stop):
            logits = model(input_ids=tokens[:, seen:position], past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
            seen = position
            logits[:, list(never)] = float("-inf")
            tokens[:, position] = logits.argmax(dim=-1)
    filled = tokens.cpu().numpy()
    return [replace(sample, tokens=filled[index]) for index, sample in enumerate(batch)]
