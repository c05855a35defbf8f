"""The functions registered with transformers: every mask and every attention call meets the route that is in force for it."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from moa_lab.interface.calls import AttentionCall
from moa_lab.interface.model_masks import key_mask
from moa_lab.interface.own_attention import own_attention, own_mask
from moa_lab.interface.routes import ATTENTION_NAME, ELSEWHERE, Route, own_implementation, routes
from moa_lab.interface.tracing import WORDS, handed, is_traced, traces_whole
from moa_lab.masks import KeyMask

# Arguments that change the scores or the softmax in ways a (query, key, value, mask, scale, softcap) call cannot express.
UNSUPPORTED_ARGUMENTS = ("position_bias", "sinks", "attention_bias", "head_mask")

_numbered: weakref.WeakValueDictionary[int, torch.nn.Module] = weakref.WeakValueDictionary()
_next_number = itertools.count()


def number(modules: Iterable[torch.nn.Module]) -> None:
    """Give attention modules the numbers by which a compiled graph names them."""
    for module in modules:
        at = next(_next_number)
        vars(module)["_moa_lab_number"] = at
        _numbered[at] = module


# --- attention


def _dispatch(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: KeyMask | torch.Tensor | None,
    **settings: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The function registered with transformers; output (batch, query_tokens, query_heads, head_dim)."""
    if not is_traced():
        return _attend(module, query, key, value, attention_mask, **settings)
    if handed.cache is not None:
        cache, layer, handed.cache = handed.cache, handed.layer, None
        return cache.attend(layer, _call(module, query, key, value, attention_mask, settings)).transpose(1, 2), None
    logits = settings.get("s_aux")
    wants_gradient = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (query, key, value, logits))
    if wants_gradient or not traces_whole():
        return _attend_outside(module, query, key, value, attention_mask, **settings)
    call = _call(module, query, key, value, attention_mask, settings)
    mask, at = call.mask, getattr(module, "_moa_lab_number", -1)
    found = _attend_as_operator(
        query, call.key, call.value, mask.real, mask.explicit, logits, mask.reach, mask.n_keys, at, call.scale, call.softcap
    )
    return found, None


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: KeyMask | torch.Tensor | None,
    **settings: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    made_by = attention_mask.route if isinstance(attention_mask, _RoutedMask) else None
    route = _route_of(module, made_by)
    if route is None and not isinstance(attention_mask, KeyMask) and not _in_backward_pass():
        # A pass that was under way in another thread when the model was routed.
        return own_attention(module)(module, query, key, value, attention_mask, **settings)
    if route is None and made_by is not None and made_by.live:
        raise ValueError(
            f"{type(module).__name__} attended, but was not seen when the model was first inspected; a model that shares its config with "
            "one under a plan needs a copy of the config, or a plan of its own"
        )
    if route is None:
        raise RuntimeError(ELSEWHERE)
    if route.own is not None:
        return own_attention(module, route.own)(module, query, key, value, attention_mask, **settings)
    call = _call(module, query, key, value, attention_mask, settings)
    handler = route.handlers.get(module)
    return (handler(call) if handler else route.watcher(module, call)).transpose(1, 2), None


_attend_outside = torch.compiler.disable(_attend, reason=WORDS)


@torch.library.custom_op("moa_lab::attend", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _attend_as_operator(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    real: torch.Tensor | None, explicit: torch.Tensor | None, sink_logits: torch.Tensor | None,
    reach: int | None, n_keys: int, at: int, scale: float, softcap: float | None,
) -> torch.Tensor:  # fmt: skip
    """`_dispatch` as one operator of a compiled graph; module number `at` meets the route that is in force when the graph runs."""
    module = _numbered.get(at)
    if module is None:
        raise RuntimeError("a compiled attention layer is not the one that was inspected: enter `apply_plan` for this model, not a copy")
    route = _route_of(module, None)
    if route is not None and route.caches is not None:
        route.caches.begin_in_graph(goes_on=query.shape[2] < n_keys)
    mask = KeyMask(query.shape[0], query.shape[2], n_keys, query.device, real=real, reach=reach, explicit=explicit)
    return _attend(module, query, key, value, mask, scaling=scale, softcap=softcap, s_aux=sink_logits)[0].contiguous()


@_attend_as_operator.register_fake
def _attended_shape(query: torch.Tensor, *_: Any) -> torch.Tensor:
    batch, heads, tokens, width = query.shape
    return query.new_empty(batch, tokens, heads, width)


def _route_of(module: torch.nn.Module, made_by: Route | None) -> Route | None:
    """The route that takes this module's call: the one that made its mask, which backward passes in other threads know it by."""
    known = [made_by] if made_by is not None and made_by.live else []
    return next((route for route in [*known, *routes()] if module in route.handlers or route.watcher or route.own), None)


def _in_backward_pass() -> bool:
    """Checkpointing runs layers again, on a GPU in a thread of autograd's."""
    return torch._C._current_graph_task_id() != -1


# --- what transformers passes, as a call of ours


def _call(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, settings: dict[str, Any]
) -> AttentionCall:
    for name in UNSUPPORTED_ARGUMENTS:
        if settings.get(name) is not None:
            raise ValueError(f"{type(module).__name__} passes {name} to its attention, which moa_lab cannot represent")
    scale = settings.get("scaling")
    mask = _mask(attention_mask, query, key)
    if key.shape[2] > mask.n_keys:
        key, value = key[:, :, : mask.n_keys], value[:, :, : mask.n_keys]
    return AttentionCall(
        query, key, value,
        mask=mask,
        scale=float(scale) if scale is not None else query.shape[-1] ** -0.5,
        softcap=settings.get("softcap"),
        sink_logits=_sink_logits(module, settings.get("s_aux"), query.shape[1]),
    )  # fmt: skip


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


# --- masks


@dataclass(frozen=True)
class _RoutedMask(KeyMask):
    """A mask that knows the route it was made for."""

    route: Route | None = None


def _mask_function(*arguments: Any, **settings: Any) -> KeyMask | torch.Tensor | None:
    """The mask function registered with transformers."""
    if not is_traced():
        return _routed_mask(*arguments, **settings)
    # A static cache that holds tokens counts them in a tensor, and a mask's size is a number: no graph of one piece has it.
    if isinstance(settings.get("q_offset"), torch.Tensor) or not traces_whole():
        return _mask_outside(*arguments, **settings)
    return key_mask(*arguments, **settings)


def _routed_mask(*arguments: Any, **settings: Any) -> KeyMask | torch.Tensor | None:
    config = settings["config"]
    route = next((route for route in routes() if route.config is config), None)
    if route is not None and route.own is None:
        mask = key_mask(*arguments, **settings)
        return _RoutedMask(**{part.name: getattr(mask, part.name) for part in fields(KeyMask)}, route=route)
    return own_mask(route.own if route else own_implementation(config), *arguments, **settings)


_mask_outside = torch.compiler.disable(_routed_mask, reason=WORDS)

AttentionInterface.register(ATTENTION_NAME, _dispatch)
AttentionMaskInterface.register(ATTENTION_NAME, _mask_function)
