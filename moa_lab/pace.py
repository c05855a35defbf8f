"""The pace of a model on this machine: what each kind of pass takes, measured on short ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from transformers import DynamicCache, PreTrainedModel

from moa_lab.calibration.answers import forward_bytes
from moa_lab.calibration.dataset import Request
from moa_lab.calibration.samples import Sample
from moa_lab.calibration.tasks import Questions, Summaries
from moa_lab.clock import clock
from moa_lab.evaluate.scoring import GPU_BATCH_TOKENS
from moa_lab.interface.compiled import compiled_layers
from moa_lab.kernels.mixture import BLOCK
from moa_lab.learning.slopes import drawn_slopes, passes, tokens_at_once
from moa_lab.models import geometry_of
from moa_lab.profiling.estimate import Estimate, Seconds, far_apart
from moa_lab.side_by_side import on_one_core, workers

PROBE_TOKENS = {"cpu": (128, 512), "cuda": (1024, 4096)}
TOKENS = 8
"""Tokens generated to time one."""


@dataclass(frozen=True)
class Pace:
    """Seconds of one sample by its length: a forward pass, one with the way back for a profile, and one for learning (dense, then drawn
    with the way back); seconds of a generated token; samples at once."""

    forward: Seconds
    backward: Seconds
    drawn: Seconds
    token: float
    at_once: int

    @classmethod
    def of(cls, model: PreTrainedModel, cost: Estimate, answer_batch: int, tokens: int, learns: bool, sink_tokens: int) -> Pace:
        """Measured on `model`, whose answers are written `answer_batch` at once, as it runs when it has run `tokens` tokens.

        cost: of a profile of the longest sample. learns: whether `drawn` is measured at all.
        """
        probed = far_apart(PROBE_TOKENS.get(model.device.type, PROBE_TOKENS["cpu"]), geometry_of(model).max_length)
        with compiled_layers(model, tokens):
            forward = on_one_core(lambda: [_steady(model, _forward, n) for n in probed], model.device)
            drawn = [_steady(model, partial(_drawn, cost=cost, sink_tokens=sink_tokens), n) if learns else 0.0 for n in probed]
        token = on_one_core(lambda: _token_s(model, answer_batch), model.device)
        at_once = workers(2**16, model.device, forward_bytes(model, cost.longest_tokens))
        return cls(Seconds.through(probed, forward), cost.seconds_each, Seconds.through(probed, drawn), token, at_once)

    def answers(self, wanted: Sequence[Request], lengths: Sequence[int], examining: Seconds) -> float:
        """Samples of every request at every length. examining: of drafts that the model is to get right."""
        seconds = 0.0
        for request in wanted:
            for n in lengths:
                if isinstance(request.task, Questions):
                    seconds += request.count * examining(n)
                elif isinstance(request.task, Summaries):
                    seconds += request.count * (self.forward(n) + request.task.answer_tokens * self.token)
        return seconds


def _steady(model: PreTrainedModel, run: Callable[[PreTrainedModel, int], int], n: int) -> float:
    """Seconds of a sample of n tokens in what `run` runs, which tells how many; on a GPU it runs once before, when kernels are made."""
    if model.device.type == "cuda":
        run(model, n)
    began = clock(model.device)
    count = run(model, n)
    return (clock(model.device) - began) / count


def _forward(model: PreTrainedModel, n: int) -> int:
    """A dense pass over samples of n tokens, as many as are run at once."""
    size = 1 if model.device.type == "cpu" else max(1, GPU_BATCH_TOKENS // n)
    with torch.inference_mode():
        model(input_ids=_tokens(model, n).expand(size, n), use_cache=False, logits_to_keep=1)
    return size


def _drawn(model: PreTrainedModel, n: int, cost: Estimate, sink_tokens: int) -> int:
    """The passes of learning from samples of n tokens, one in four of which is a text whose second half counts."""
    size = 1 if model.device.type == "cpu" else max(1, min(GPU_BATCH_TOKENS, tokens_at_once(cost)) // n)
    tokens, geometry = _tokens(model, n).cpu().numpy(), geometry_of(model)
    batch = [Sample("probe", tokens, ((n // 2 if at % 4 == 3 else n - 1, n),)) for at in range(size)]
    half = torch.full((geometry.layers, size, geometry.kv_heads), max(1, n // BLOCK // 2), dtype=torch.int32, device=model.device)
    for places in passes(batch, size):
        part, weights = [batch[at] for at in places], [1.0] * len(places)
        drawn_slopes(model, part, half[:, places], weights, sink_tokens, checkpoint=tokens_at_once(cost) < n)
    return size


def _tokens(model: PreTrainedModel, n: int) -> torch.Tensor:
    return torch.arange(n, device=model.device).remainder(model.config.get_text_config().vocab_size)


def _token_s(model: PreTrainedModel, batch: int) -> float:
    """Seconds of a generated token of one of `batch` samples."""
    tokens = torch.zeros(batch, 1, dtype=torch.long, device=model.device)
    cache = DynamicCache(config=model.config)

    def generate() -> None:
        for _ in range(TOKENS):
            model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)

    with torch.inference_mode():
        generate()
        began = clock(model.device)
        generate()
        return (clock(model.device) - began) / TOKENS / batch
