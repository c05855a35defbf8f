"""The backward pass behind every profile, and recomputation of activations that would not fit in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from transformers import PreTrainedModel

from moa_lab.calibration.answers import answer_logits, scores_of
from moa_lab.calibration.dataset import Keep
from moa_lab.calibration.samples import Sample
from moa_lab.interface import Handler, route_attention
from moa_lab.profiling.capture import Receiver, capturing


def backward_pass(
    model: PreTrainedModel,
    batch: list[Sample],
    receive: Receiver,
    sink_tokens: int,
    windows: np.ndarray | None = None,
    keep: Keep | None = None,
    rounding: bool = False,
) -> list[Sample | None]:
    """One forward and backward pass over samples of one length; `receive` gets every layer's influence.

    The loss of a sample is the mean over its answer tokens; the batch's loss is the sum over samples, so that every
    sample's influence is the one it would have alone. windows: int (layers, kv_heads), tokens, of a plan that the model runs
    under; None: the dense model. Gradients start at the embeddings, so parameters need none. keep: decides after the forward pass which
    answers count; returned is what it kept of each sample. `receive` gets nothing where that is nothing at all. rounding: as in `profile`.
    """
    tokens = torch.tensor(np.stack([sample.tokens for sample in batch]), device=model.device)
    embedded = model.get_input_embeddings()(tokens).detach().requires_grad_(True)

    def handler(layer: int) -> Handler:
        return capturing(layer, receive, sink_tokens, None if windows is None else windows[layer], rounding)

    with _without_denormals(), torch.enable_grad(), route_attention(model, handler):
        losses, counted = [], []
        for sample, logits in zip(batch, answer_logits(model, batch, embedded), strict=True):
            kept = keep(sample, scores_of(sample, logits)) if keep else sample
            counted.append(kept)
            if kept is not None:
                # The gradient of an indexing is as large as all the logits: none where all answers count.
                wanted = np.isin(sample.answer_positions, kept.answer_positions)
                logits = logits if wanted.all() else logits[torch.from_numpy(wanted).to(logits.device)]
                targets = torch.from_numpy(kept.tokens[kept.answer_positions]).to(logits.device)
                losses.append(torch.nn.functional.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets))
        if losses:
            # Not loss.backward(), which would also fill .grad of every parameter that requires one.
            torch.autograd.grad(torch.stack(losses).sum(), embedded)
    return counted


@contextlib.contextmanager
def _without_denormals() -> Iterator[None]:
    # Products of small weights and small gradients are denormal numbers, which a CPU multiplies some ten times slower.
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@contextlib.contextmanager
def checkpointed(model: PreTrainedModel, enabled: bool) -> Iterator[None]:
    """Recompute activations layer by layer in backward, without switching dropout on; restored on exit."""
    if not enabled:
        yield
        return
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # transformers checkpoints only layers in training mode; their children stay in evaluation mode, so nothing drops out.
    switched = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    before = [module.training for module in switched]
    for module in switched:
        module.training = True
    try:
        yield
    finally:
        for module, training in zip(switched, before, strict=True):
            module.training = training
        model.gradient_checkpointing_disable()
