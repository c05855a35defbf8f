"""Trained gates between a head's full attention and its sink and window (DuoAttention: Xiao et al., 2024, arXiv 2410.10819).

Influence is a gradient of the dense model. Gates are trained while the others close too, so that of heads which can replace one
another not all stay open.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from transformers import PreTrainedModel

from moa_lab.calibration.answers import answer_logits
from moa_lab.calibration.origin import check_origin, check_vocabulary
from moa_lab.calibration.samples import Sample, SampleSet, group_by_shape
from moa_lab.geometry.wrappers import plain_model
from moa_lab.interface import AttentionCall, Handler, route_attention
from moa_lab.kernels.reference import masked_attention, windowed_attention
from moa_lab.models import geometry_of
from moa_lab.plan import MIN_SPAN, SINK_TOKENS

BATCH_TOKENS = {"cpu": 1024, "cuda": 16_384}
LEARNING_RATE = 0.02
PENALTY = 0.5

Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""


def train_gates(
    model: PreTrainedModel,
    samples: SampleSet,
    *,
    span_tokens: int = MIN_SPAN,
    sink_tokens: int = SINK_TOKENS,
    steps: int = 100,
    penalty: float = PENALTY,
    learning_rate: float = LEARNING_RATE,
    seed: int = 0,
    progress: Progress | None = None,
) -> np.ndarray:
    """How far each head stays open: float64 (layers, kv_heads) in [0, 1].

    A head's output is `gate * (all it may see) + (1 - gate) * (sink and window)`; the loss is the divergence of the answers from the
    dense model's, in nats per token, plus `penalty` times the mean gate. All gates start at 1. The weights of `model` stay as they are.
    span_tokens: what a closed head keeps. Raises ValueError for fewer than one step, or no samples.
    """
    model = plain_model(model)
    if steps < 1 or not len(samples):
        raise ValueError(f"gates need at least one step and one sample, got {steps} and {len(samples)}")
    check_origin(samples.provenance, model, "samples")
    check_vocabulary(samples, model)
    geometry = geometry_of(model)
    gates = torch.ones(geometry.layers, geometry.kv_heads, device=model.device, requires_grad=True)
    optimizer = torch.optim.Adam([gates], lr=learning_rate)
    windows = np.full(geometry.kv_heads, span_tokens - sink_tokens)
    batches = _batches(samples, model.device.type)
    rng = np.random.default_rng(seed)
    for step in range(steps):
        if progress:
            progress(step, steps)
        batch = batches[int(rng.integers(len(batches)))]
        with torch.no_grad():
            wanted = _log_probabilities(model, batch)
        with torch.enable_grad(), route_attention(model, lambda layer: _gated(gates[layer], sink_tokens, windows)):
            found = _log_probabilities(model, batch)
            divergence = torch.nn.functional.kl_div(found, wanted, reduction="batchmean", log_target=True)
            (gates.grad,) = torch.autograd.grad(divergence + penalty * gates.mean(), gates)
        optimizer.step()
        with torch.no_grad():
            gates.clamp_(0, 1)
    if progress:
        progress(steps, steps)
    return gates.detach().double().cpu().numpy()


def _gated(gates: torch.Tensor, sink_tokens: int, windows: np.ndarray) -> Handler:
    """The attention of one layer; gates: (kv_heads,)."""

    def attend(call: AttentionCall) -> torch.Tensor:
        whole = masked_attention(call.query, call.key, call.value, call.positions >= 0, call.scale, call.softcap, call.sink_logits)
        near = windowed_attention(
            call.query,
            call.key,
            call.value,
            call.query_positions,
            call.positions,
            sink_tokens,
            windows,
            call.scale,
            call.softcap,
            sink_logits=call.sink_logits,
        )
        group = call.query.shape[1] // call.key.shape[1]
        return torch.lerp(near, whole, gates.repeat_interleave(group)[None, :, None, None].to(whole))

    return attend


def _log_probabilities(model: PreTrainedModel, batch: list[Sample]) -> torch.Tensor:
    """Of every answer token of the batch: float32 (answer tokens, vocabulary)."""
    return torch.cat(answer_logits(model, batch)).float().log_softmax(dim=-1)


def _batches(samples: SampleSet, device: str) -> list[list[Sample]]:
    batches = []
    for (_, length), group in group_by_shape(samples).items():
        size = max(1, BATCH_TOKENS.get(device, BATCH_TOKENS["cpu"]) // length)
        batches += [group[start : start + size] for start in range(0, len(group), size)]
    return batches
