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
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from moa_lab.geometry import ModelGeometry
from moa_lab.geometry.of_model import geometry_of
from moa_lab.interface.model_masks import key_mask
from moa_lab.kernels.reference import masked_attention
from moa_lab.masks import KeyMask

ATTENTION_NAME = "moa_lab"

# Arguments that change the scores or the softmax in ways a (query, key, value, mask, scale, softcap) call cannot express.
UNSUPPORTED_ARGUMENTS = ("position_bias", "sinks", "attention_bias", "head_mask")


@dataclass(frozen=True)
class AttentionCall:
    """One layer's attention, as transformers asks for it.

    query: (batch, query_heads, query_tokens, head_dim); key, value: (batch, kv_heads, key_tokens, head_dim). mask: what the model
    hides. Over a cache that hands out nothing but the new tokens' keys, the mask still counts all tokens. sink_logits: (query_heads, 1, 1),
    the score of one more key per query head, which every query sees and which has no value (gpt-oss, there called `s_aux`); None: there
    is none.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: KeyMask
    scale: float
    softcap: float | None
    sink_logits: torch.Tensor | None = None

    @property
    def positions(self) -> torch.Tensor:
        """`KeyMask.positions`."""
        return self.mask.positions

    @property
    def is_prefill(self) -> bool:
        """True when the call starts a sequence: no key lies before the first query."""
        return self.mask.n_queries == self.mask.n_keys

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
    attention interface, has other shapes or another window than the config says, does not attend causally, or computes something
    else than masked softmax attention (its output through our route differs from its own).
    """
    if model not in _sites:
        _sites[model] = _find_sites(model, geometry_of(model))
    return _sites[model]


def _dispatch(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: KeyMask | torch.Tensor | None,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """The function registered with transformers; output (batch, query_tokens, query_heads, head_dim)."""
    for name in UNSUPPORTED_ARGUMENTS:
        if settings.get(name) is not None:
            raise ValueError(f"{type(module).__name__} passes {name} to its attention, which moa_lab cannot represent")
    scale = settings.get("scaling")
    mask = _mask(attention_mask, query, key)
    if key.shape[2] > mask.n_keys:
        key, value = key[:, :, : mask.n_keys], value[:, :, : mask.n_keys]
    call = AttentionCall(
        query, key, value,
        mask=mask,
        scale=float(scale) if scale is not None else query.shape[-1] ** -0.5,
        softcap=settings.get("softcap"),
        sink_logits=_sink_logits(module, settings.get("s_aux"), query.shape[1]),
    )  # fmt: skip
    handler = _handlers.get(module)
    if handler is not None:
        return handler(call).transpose(1, 2), None
    watcher = _watcher.get()
    if watcher is None:
        raise ValueError(f"{type(module).__name__} attended, but was not seen when the model was first inspected")
    return watcher(module, call).transpose(1, 2), None


def _sink_logits(module: torch.nn.Module, logits: torch.Tensor | None, query_heads: int) -> torch.Tensor | None:
    if logits is None:
        return None
    if logits.shape != (query_heads,):
        raise ValueError(
            f"{type(module).__name__} passes s_aux of shape {tuple(logits.shape)} to its attention; one logit for each of its "
            f"{query_heads} query heads is supported"
        )
    return logits[:, None, None]


def _mask(attention_mask: KeyMask | torch.Tensor | None, query: torch.Tensor, key: torch.Tensor) -> KeyMask:
    if isinstance(attention_mask, KeyMask):
        return attention_mask
    batch, n_queries, n_keys = query.shape[0], query.shape[2], key.shape[2]
    explicit = None if attention_mask is None else attention_mask[..., :n_keys]
    return KeyMask(batch, n_queries, n_keys, query.device, explicit=explicit)


AttentionInterface.register(ATTENTION_NAME, _dispatch)
AttentionMaskInterface.register(ATTENTION_NAME, key_mask)


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
        return masked_attention(call.query, call.key, call.value, call.positions >= 0, call.scale, call.softcap, call.sink_logits)

    with _in_evaluation(model):
        try:
            own = _probe_logits(model)
        except Exception as error:  # whatever the model raises
            raise ValueError(f"{name} does not run on tokens alone: {' '.join(str(error).split()):.200}") from error
        try:
            with _routed(model, {}, watch):
                ours = _probe_logits(model)
        except (ValueError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a layer of its own kind that takes our mask for a tensor
            raise ValueError(_unrouted(name)) from error
        if any(call.softcap is not None or call.sink_logits is not None for _, call in seen):
            # transformers' sdpa leaves these out without a word; eager is what such a family defines itself.
            with _implementation(model, "eager"):
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
    vocabulary = _attention_config(model).vocab_size
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
