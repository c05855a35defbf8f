"""Samples that only the dense model itself knows the answers of."""

from __future__ import annotations

import numpy as np
import torch
from tiny import VOCABULARY
from transformers import PreTrainedModel

from moa_lab.calibration.samples import Sample, SampleSet

LENGTHS = (320, 448)
DENSITY = 0.6


def own_answers(model: PreTrainedModel, each: int) -> SampleSet:
    """`each` samples of two tasks at two lengths."""
    return SampleSet(
        tuple(own_answer(model, task, n, seed) for n in LENGTHS for task in ("questions", "summaries") for seed in range(each))
    )


def own_answer(model: PreTrainedModel, task: str, n_tokens: int, seed: int) -> Sample:
    """Random tokens whose answers are what the dense model itself finds likeliest: only the dense model knows them best."""
    tokens = np.random.default_rng(seed).integers(5, VOCABULARY, n_tokens)
    with torch.no_grad():
        likeliest = model(input_ids=torch.from_numpy(tokens)[None]).logits[0].argmax(-1).numpy()
    start = n_tokens - 60
    return Sample(task, np.concatenate([tokens[:start], likeliest[start - 1 : -1]]), ((start, n_tokens),))
