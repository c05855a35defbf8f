"""The one door to transformers: a registered attention function that hands every call to a handler of ours.

`route_attention(model, make_handler)` swaps the handlers in and out; profiling and plans are two kinds of handler.
No model family is named anywhere: which modules attend is found by running the model on a few tokens.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import causal_mask_function, sdpa_mask

from moa_lab.geometry import ModelGeometry
from moa_lab.kernels.reference import masked_attention
from moa_lab.models import geometry_of

ATTENTION_NAME = "moa_lab"

# Arguments that change the scores or the softmax in ways a (query, key, value, mask, scale, softcap) call cannot express.
UNSUPPORTED_ARGUMENTS = ("s_aux", "position_bias", "sinks", "attention_bias", "head_mask")


@dataclass(frozen=True)
class AttentionCall:
    """One layer's attention, as transformers asks for it.

    query: (batch, query_heads, query_tokens, head_dim); key, value: (batch, kv_heads, key_tokens, head_dim).
    positions: int32 (batch or 1, 1, query_tokens, key_tokens): the key's position in its own sequence (left padding
    not counted), or -1 where the model itself hides the key (future, padding, its own sliding window).
    first: int32 (batch,), each row's first key that is not padding, where the model hides the future and left padding and nothing
    else; None where it hides more, or where that is not known: `positions` tell all.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    positions: torch.Tensor
    scale: float
    softcap: float | None
    first: torch.Tensor | None = None

    @property
    def is_prefill(self) -> bool:
        """True when the call starts a sequence: no key lies before the first query."""
        return self.query.shape[2] == self.key.shape[2]

    @property
    def query_positions(self) -> torch.Tensor:
        """Position of every query, (batch or 1, 1, query_tokens, 1): a query always sees itself, the newest key it may see."""
        return self.positions.amax(dim=-1, keepdim=True)


Handler = Callable[[AttentionCall], torch.Tensor]
"""Takes a call, returns the attention output: (batch, query_heads, query_tokens, head_dim)."""

Watcher = Callable[[torch.nn.Module, AttentionCall], torch.Tensor]
"""Takes the calls of modules that have no handler of their own."""


@dataclass(frozen=True)
class AttentionSite:
    """A module that attends, and the shapes it was seen with."""

    module: torch.nn.Module
    layer: int
    query_heads: int
    kv_heads: int
    head_dim: int


_handlers: weakref.WeakKeyDictionary[torch.nn.Module, Handler] = weakref.WeakKeyDictionary()
_watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)
_sites: weakref.WeakKeyDictionary[torch.nn.Module, tuple[AttentionSite, ...]] = weakref.WeakKeyDictionary()
# What `AttentionCall.first` is for the masks that hide nothing else. A model that copies its mask loses this, and only this.
_firsts: WeakIdKeyDictionary = WeakIdKeyDictionary()


@contextlib.contextmanager
def route_attention(model: PreTrainedModel, make_handler: Callable[[int], Handler]) -> Iterator[None]:
    """Send every attention call of layer `l` to `make_handler(l)`; the model is as before on exit, also after an exception.

    Raises ValueError, naming what is missing, for a model whose attention cannot be routed.
    """
    handlers = {site.module: make_handler(site.layer) for site in attention_sites(model)}
    with _routed(model, handlers):
        yield


@torch.no_grad()
def attention_sites(model: PreTrainedModel) -> tuple[AttentionSite, ...]:
    """Find the attention module of every layer by running the model on a few tokens, once per model.

    Raises ValueError naming the reason when a layer's attention cannot be routed: it does not use transformers'
    attention interface, has other shapes than the config says, or computes something else than masked softmax attention
    (its output through our route differs from its own).
    """
    if model not in _sites:
        _sites[model] = _find_sites(model, geometry_of(model))
    return _sites[model]


def position_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
    **settings: Any,
) -> torch.Tensor:
    """Mask function for transformers: `AttentionCall.positions` instead of a boolean mask.

    Carrying the positions makes one small tensor say everything: what the model hides, where each row's sequence
    starts, and how far back every key lies.
    """
    settings["allow_is_causal_skip"] = False
    shown = sdpa_mask(batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask=attention_mask, device=device, **settings)
    assert shown is not None, "only a causal skip leaves the mask out"
    position = torch.arange(kv_length, device=device, dtype=torch.int32) + kv_offset
    first = torch.zeros(batch_size, device=device, dtype=torch.int32)
    if attention_mask is None:
        codes = torch.where(shown[:1], position, -1)
    else:
        first = attention_mask.to(device).int().argmax(dim=1).to(torch.int32)
        codes = torch.where(shown, position - first[:, None, None, None], -1)
        # A padding query sees nothing; its softmax would be 0/0. It may see everything: nobody reads its output.
        codes = torch.where(codes.amax(dim=-1, keepdim=True) < 0, 0, codes)
    newest_last = kv_offset == 0 and q_offset + q_length == kv_length
    if settings.get("mask_function") is causal_mask_function and newest_last and _padded_on_the_left(attention_mask):
        _firsts[codes] = first
    return codes


def _padded_on_the_left(attention_mask: torch.Tensor | None) -> bool:
    """True where no padding follows a token in any row."""
    return attention_mask is None or not bool((attention_mask[:, 1:].int() < attention_mask[:, :-1].int()).any())


def _dispatch(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """The function registered with transformers; output (batch, query_tokens, query_heads, head_dim)."""
    for name in UNSUPPORTED_ARGUMENTS:
        if settings.get(name) is not None:
            raise ValueError(f"{type(module).__name__} passes {name} to its attention, which moa_lab cannot represent")
    scale = settings.get("scaling")
    call = AttentionCall(
        query, key, value,
        positions=_positions(attention_mask, query, key),
        scale=float(scale) if scale is not None else query.shape[-1] ** -0.5,
        softcap=settings.get("softcap"),
        first=_first(attention_mask, query),
    )  # fmt: skip
    handler = _handlers.get(module)
    if handler is not None:
        return handler(call).transpose(1, 2), None
    watcher = _watcher.get()
    if watcher is None:
        raise ValueError(f"{type(module).__name__} attended, but was not seen when the model was first inspected")
    return watcher(module, call).transpose(1, 2), None


def _first(attention_mask: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor | None:
    if attention_mask is None:
        return torch.zeros(len(query), device=query.device, dtype=torch.int32)
    found: torch.Tensor | None = _firsts.get(attention_mask)
    return found


def _positions(attention_mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    key_tokens = key.shape[2]
    if attention_mask is not None and attention_mask.dtype == torch.int32:
        return attention_mask[..., :key_tokens]
    position = torch.arange(key_tokens, device=query.device, dtype=torch.int32)
    if attention_mask is None:
        asked = position[key_tokens - query.shape[2] :, None]
        return torch.where(position <= asked, position, -1)[None, None]
    # A 4-d mask of the user's own: boolean, or additive with very negative numbers where a key is hidden.
    mask = attention_mask[..., :key_tokens]
    shown = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return torch.where(shown, position, -1)


AttentionInterface.register(ATTENTION_NAME, _dispatch)
AttentionMaskInterface.register(ATTENTION_NAME, position_mask)


@contextlib.contextmanager
def _routed(model: PreTrainedModel, handlers: dict[torch.nn.Module, Handler], watcher: Watcher | None = None) -> Iterator[None]:
    token = _watcher.set(watcher)
    before = {module: _handlers[module] for module in handlers if module in _handlers}
    _handlers.update(handlers)
    try:
        with _implementation(model, ATTENTION_NAME):
            yield
    finally:
        _watcher.reset(token)
        for module in handlers:
            _handlers.pop(module, None)
        _handlers.update(before)


@contextlib.contextmanager
def _implementation(model: PreTrainedModel, name: str) -> Iterator[None]:
    config = _attention_config(model)
    before, config._attn_implementation = config._attn_implementation, name
    try:
        yield
    finally:
        config._attn_implementation = before


def _attention_config(model: PreTrainedModel) -> Any:
    return model.config.get_text_config(decoder=True)


def _find_sites(model: PreTrainedModel, geometry: ModelGeometry) -> tuple[AttentionSite, ...]:
    name = type(model).__name__
    seen: list[tuple[torch.nn.Module, AttentionCall]] = []

    def watch(module: torch.nn.Module, call: AttentionCall) -> torch.Tensor:
        seen.append((module, call))
        return masked_attention(call.query, call.key, call.value, call.positions >= 0, call.scale, call.softcap)

    # From the middle of the vocabulary: special tokens drive some models to activations that half precision cannot repeat.
    vocabulary = _attention_config(model).vocab_size
    tokens = (torch.arange(8, device=model.device)[None] * 37 + vocabulary // 2) % vocabulary
    with _routed(model, {}, watch):
        ours = model(input_ids=tokens, use_cache=False).logits
    # transformers' sdpa leaves out soft-capping without a word; eager is what such a family defines itself.
    capped = any(call.softcap is not None for _, call in seen)
    with _implementation(model, "eager" if capped else _attention_config(model)._attn_implementation):
        own = model(input_ids=tokens, use_cache=False).logits
    if not seen:
        raise ValueError(f"{name} does not use transformers' attention interface: its attention cannot be routed")
    sites = []
    for layer, (module, call) in enumerate(seen):
        shape = (call.query.shape[1], call.key.shape[1], call.query.shape[3])
        if shape != (geometry.query_heads, geometry.kv_heads, geometry.head_dim) or call.value.shape != call.key.shape:
            raise ValueError(
                f"{name} layer {layer} attends with {shape[0]} query heads, {shape[1]} KV heads of {shape[2]} "
                f"(values {call.value.shape[1]} x {call.value.shape[3]}); its config says {geometry}"
            )
        sites.append(AttentionSite(module, getattr(module, "layer_idx", layer), *shape))
    if [site.layer for site in sites] != list(range(geometry.layers)):
        raise ValueError(f"{name}: {len(sites)} attention calls for {geometry.layers} layers; every layer must attend exactly once")
    difference = (own.float() - ours.float()).norm() / own.float().norm().clamp(min=1e-6)
    # In half precision two right orders of summation drift apart over the layers; another formula is still further off.
    if not difference < (0.02 if own.dtype.itemsize >= 4 else 0.5):
        raise ValueError(f"{name}: its attention is not plain masked softmax attention (logits differ by {difference:.0%}); not supported")
    return tuple(sites)
