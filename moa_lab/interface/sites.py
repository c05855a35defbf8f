"""Which modules of a model attend, found by running it on a few tokens, and whether a plan can be applied to them."""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from moa_lab.geometry import ModelGeometry
from moa_lab.geometry.of_model import geometry_of
from moa_lab.geometry.wrappers import plain_model
from moa_lab.interface.calls import AttentionCall, AttentionSite
from moa_lab.interface.dispatch import number
from moa_lab.interface.routes import Route, is_routed, own_implementation, routed, text_config
from moa_lab.kernels.reference import masked_attention

logger = logging.getLogger(__name__)

_sites: weakref.WeakKeyDictionary[torch.nn.Module, tuple[AttentionSite, ...]] = weakref.WeakKeyDictionary()
_inspecting = threading.RLock()


@torch.no_grad()
def attention_sites(model: PreTrainedModel) -> tuple[AttentionSite, ...]:
    """Find the attention module of every layer by running the model on a few tokens, once per model.

    Raises ValueError naming the reason when a layer's attention cannot be routed: it does not use transformers'
    attention interface, has other shapes or another window than the config says, does not attend causally, or computes something
    else than masked softmax attention (its output through our route differs from its own).
    """
    model = plain_model(model)
    if model.device.type == "meta":
        raise ValueError(f"{type(model).__name__}: its weights are offloaded; load it without offloading (a device_map of GPUs, or none)")
    if any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        raise ValueError(
            f"{type(model).__name__}: its weights are split among processes (tensor parallel), each of which sees some heads; load it with "
            "device_map instead, or start processes that hold all of it (torchrun -m moa_lab run)"
        )
    with _inspecting:
        if model not in _sites:
            # What is compiled runs as it is written: inspection must see every call.
            with torch.compiler.set_stance("force_eager"):
                _sites[model] = _find_sites(model, geometry_of(model))
            number(site.module for site in _sites[model])
    return _sites[model]


def _find_sites(model: PreTrainedModel, geometry: ModelGeometry) -> tuple[AttentionSite, ...]:
    name = type(model).__name__
    seen: list[tuple[torch.nn.Module, AttentionCall]] = []

    def watch(module: torch.nn.Module, call: AttentionCall) -> torch.Tensor:
        seen.append((module, call))
        return masked_attention(call.query, call.key, call.value, call.positions >= 0, call.scale, call.softcap, call.sink_logits)

    with _in_evaluation(model):
        try:
            with _own_attention(model):
                own = _probe_logits(model)
        except Exception as error:  # whatever the model raises
            raise ValueError(f"{name} does not run on tokens alone: {' '.join(str(error).split()):.200}") from error
        try:
            with routed(Route(model, watcher=watch)):
                ours = _probe_logits(model)
        except (ValueError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a layer of its own kind that takes our mask for a tensor
            raise ValueError(_unrouted(name)) from error
        if any(call.softcap is not None or call.sink_logits is not None for _, call in seen):
            # transformers' sdpa leaves these out without a word; eager is what such a family defines itself.
            if own_implementation(text_config(model)) == "sdpa":
                logger.warning(
                    "%s attends by 'sdpa', which leaves out what bounds its scores: without a plan it is another model than under one; "
                    "call set_attn_implementation('eager')", name,
                )  # fmt: skip
            with _own_attention(model, "eager"):
                own = _probe_logits(model)
    if not seen:
        raise ValueError(_unrouted(name))
    sites = tuple(_site(name, at, module, call, geometry) for at, (module, call) in enumerate(seen))
    if [site.layer for site in sites] != list(range(geometry.layers)):
        raise ValueError(f"{name}: {len(sites)} attention calls for {geometry.layers} layers; every layer must attend exactly once")
    for window, (_, call) in zip(geometry.layer_windows, seen, strict=True):
        _check_mask(name, call, window)
    difference = (own.float() - ours.float()).norm() / own.float().norm().clamp(min=1e-6)
    # In half precision two right orders of summation drift apart over the layers; another formula is still further off.
    if not difference < (0.02 if own.dtype.itemsize >= 4 else 0.5):
        raise ValueError(f"{name}: its attention is not plain masked softmax attention (logits differ by {difference:.0%}); not supported")
    return sites


def _unrouted(name: str) -> str:
    return f"{name} does not use transformers' attention interface: its attention cannot be routed"


def _probe_logits(model: PreTrainedModel) -> torch.Tensor:
    # From the middle of the vocabulary: special tokens drive some models to activations that half precision cannot repeat.
    vocabulary = text_config(model).vocab_size
    tokens = (torch.arange(8, device=model.device)[None] * 37 + vocabulary // 2) % vocabulary
    logits: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits


@contextlib.contextmanager
def _in_evaluation(model: PreTrainedModel) -> Iterator[None]:
    """Without dropout, which would make two runs differ; every module as it was on exit."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _site(name: str, at: int, module: torch.nn.Module, call: AttentionCall, geometry: ModelGeometry) -> AttentionSite:
    shape = (call.query.shape[1], call.key.shape[1], call.query.shape[3])
    if shape != (geometry.query_heads, geometry.kv_heads, geometry.head_dim) or call.value.shape != call.key.shape:
        raise ValueError(
            f"{name} layer {at} attends with {shape[0]} query heads, {shape[1]} KV heads of {shape[2]} "
            f"(values {call.value.shape[1]} x {call.value.shape[3]}); its config says {geometry}"
        )
    return AttentionSite(module, getattr(module, "layer_idx", at), *shape)


def _check_mask(name: str, call: AttentionCall, window: int | None) -> None:
    """A cache that drops tokens must know what a layer will still see: all before the query, or its window of the config."""
    if call.mask.explicit is not None:
        raise ValueError(f"{name} does not attend causally, to all tokens before a query or to a window of them; not supported")
    if call.mask.reach != window:
        found, said = (f"a window of {tokens} tokens" if tokens else "all tokens before a query" for tokens in (call.mask.reach, window))
        raise ValueError(f"{name} attends to {found}, its config says {said}; not supported")


def _own_attention(model: PreTrainedModel, name: str | None = None) -> contextlib.AbstractContextManager[None]:
    """The model's own attention, or implementation `name`, for this thread or task alone."""
    config = text_config(model)
    if name is None and not is_routed(config):
        return contextlib.nullcontext()
    return routed(Route(model, own=name or own_implementation(config)))
