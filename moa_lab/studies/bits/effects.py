"""First-order effects of quantised KV values and weights on the loss: one backward pass per sample gives all widths."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from transformers import PreTrainedModel

from moa_lab.calibration.answers import answer_logits
from moa_lab.calibration.samples import Sample, group_by_shape
from moa_lab.interface import AttentionCall, Handler, route_attention
from moa_lab.kernels.dispatch import span_attention
from moa_lab.models import geometry_of
from moa_lab.plan import Plan, dense_plan
from moa_lab.studies.bits.quantise import WEIGHT_GROUP, fake_quantise, linear_modules
from moa_lab.studies.bits.widths import Effects

Progress = Callable[[int, int], None]
"""Called with (samples done, samples in all)."""


def bit_effects(
    model: PreTrainedModel,
    samples: Sequence[Sample],
    kv_widths: tuple[int, ...],
    weight_widths: tuple[int, ...] = (),
    *,
    plan: Plan | None = None,
    progress: Progress | None = None,
) -> tuple[Effects, Effects]:
    """Effects of these widths on K and V of every head, and on every linear module's weight, under `plan` (None: the dense model).

    Items of the first: (layer, kv_head, K or V), in that order; of the second: `linear_modules` (none without weight_widths). A
    sample's loss is the mean over its answer tokens; every (task, length) has the same weight. The model is restored on exit, also
    after an exception.
    """
    geometry = geometry_of(model)
    plan = plan or dense_plan(geometry)
    modules = list(linear_modules(model).values()) if weight_widths else []
    kv_bits, weight_bits = (torch.tensor(widths, device=model.device) for widths in (kv_widths, weight_widths))
    kv_parts, weight_parts = [], []
    with _asking_for_gradients(module.weight for module in modules):
        for done, sample in enumerate(samples):
            seen: dict[tuple[int, int], torch.Tensor] = {}
            gradients = _backward(model, sample, plan, [module.weight for module in modules], partial(_kv_seen, seen, kv_bits))
            kv_parts.append(torch.cat([seen[layer, part] for layer in range(geometry.layers) for part in range(2)], dim=1))
            if modules:
                found = [_weight_effect(m.weight, g, weight_bits) for m, g in zip(modules, gradients, strict=True)]
                weight_parts.append(torch.stack(found, dim=1))
            if progress:
                progress(done + 1, len(samples))
    # Each layer gave K of all heads, then V of all heads.
    kv = torch.stack(kv_parts, dim=1).unflatten(2, (geometry.layers, 2, geometry.kv_heads)).transpose(3, 4).flatten(2, 4)
    weights = torch.stack(weight_parts, dim=1) if modules else kv.new_zeros(3, len(samples), 0, 0)
    shares = _shares(samples)
    return Effects.of(kv_widths, kv.cpu().numpy(), shares), Effects.of(weight_widths, weights.cpu().numpy(), shares)


def _backward(
    model: PreTrainedModel,
    sample: Sample,
    plan: Plan,
    weights: list[torch.Tensor],
    receive: Callable[[int, int, torch.Tensor, torch.Tensor], None],
) -> tuple[torch.Tensor, ...]:
    """One pass: `receive` gets (layer, 0 for K and 1 for V, values, gradient); returns the gradients of `weights`."""
    windows = plan.windows(sample.length)

    def handler(layer: int) -> Handler:
        def attend(call: AttentionCall) -> torch.Tensor:
            for part, values in enumerate((call.key, call.value)):
                values.register_hook(partial(receive, layer, part, values.detach()))
            return span_attention(
                call.query, call.key, call.value, call.mask, plan.sink_tokens, windows[layer], call.scale, call.softcap, call.sink_logits
            )

        return attend

    tokens = torch.from_numpy(sample.tokens)[None].to(model.device)
    embedded = model.get_input_embeddings()(tokens).detach().requires_grad_(True)
    with torch.enable_grad(), route_attention(model, handler):
        logits = answer_logits(model, [sample], embedded)[0]
        targets = torch.from_numpy(sample.tokens[sample.answer_positions]).to(logits.device)
        loss = torch.nn.functional.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets)
        # A module that this sample did not use (an expert) has no gradient: zeros.
        return torch.autograd.grad(loss, [*weights, embedded], materialize_grads=True)[: len(weights)]


def _kv_seen(
    seen: dict[tuple[int, int], torch.Tensor], bits: torch.Tensor, layer: int, part: int, values: torch.Tensor, gradient: torch.Tensor
) -> None:
    """Store the effect of K or V of one layer: (3, kv_heads, widths)."""
    heads = values[0, :, None]
    seen[layer, part] = _effect(heads, fake_quantise(heads, bits[:, None, None]), gradient[0, :, None], (-2, -1))


def _weight_effect(weight: torch.Tensor, gradient: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """The effect of one matrix: (3, widths)."""
    weight = weight.detach()
    return _effect(weight, fake_quantise(weight, bits[:, None, None], WEIGHT_GROUP), gradient, (-2, -1))


def _effect(values: torch.Tensor, quantised: torch.Tensor, gradient: torch.Tensor, summed: tuple[int, ...]) -> torch.Tensor:
    """`Effects.signed`, `squared` and `error`, stacked along a new first dimension and summed over the dimensions `summed`."""
    dtype = torch.promote_types(values.dtype, torch.float32)
    change = quantised.to(dtype) - values.to(dtype)
    each = change * gradient.to(dtype)
    # float64: sums of millions of numbers of both signs.
    parts = [part.sum(dim=summed, dtype=torch.float64) for part in (each, each.square(), change.square(), values.to(dtype).square())]
    signed, squared, error, whole = torch.broadcast_tensors(*parts)
    return torch.stack([signed, squared, error / whole.clamp(min=torch.finfo(torch.float64).tiny)])


@contextlib.contextmanager
def _asking_for_gradients(parameters: Iterable[torch.Tensor]) -> Iterator[None]:
    before = [(parameter, parameter.requires_grad) for parameter in parameters]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, wanted in before:
            parameter.requires_grad_(wanted)


def _shares(samples: Sequence[Sample]) -> np.ndarray:
    groups = group_by_shape(samples)
    return np.array([1 / (len(groups) * len(groups[sample.task, sample.length])) for sample in samples])
