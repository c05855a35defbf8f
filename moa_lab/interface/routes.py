"""Whose attention a call meets: what its own thread or task put on the model, and nobody else's.

transformers keeps the name of the attention implementation in the model's config, which all threads share. So the name is ours while
any thread routes the model, and what a call does is looked up in a context variable, which every thread and every task has for itself.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, Protocol

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from moa_lab.interface.tracing import WORDS, is_traced, traces_whole

ATTENTION_NAME = "moa_lab"

PREPARE = "_prepare_cache_for_generation"
"""Where `generate` makes its cache; a method of its own, so this is the one name of transformers' that is not public."""

ELSEWHERE = (
    "a plan or profile holds this model in another thread or task: enter `apply_plan` in this one too (`dense_plan` for none), "
    "or wait until the other has left it"
)


COPIED = "this is a copy of a model, made while a plan or profile held that: copy the model before `apply_plan`, or after it was left"
"""Copies take the hooks along, but no block that they were entered by."""


class CacheMaker(Protocol):
    """Makes the caches of a model that is routed."""

    def begin(self, past: Any) -> None:
        """A forward pass begins, over the cache `past` (None: no cache was given). Raises for a cache that it cannot run over."""

    def begin_in_graph(self, *, goes_on: bool) -> None:
        """A layer attends in a compiled graph of one piece, which calls no `begin`; goes_on: over tokens of an earlier pass."""

    def check_generation(self, generation_config: Any, given: Any) -> None:
        """`generate` begins. Raises for a cache, given or asked for, that it cannot run over."""

    def new(self, capacity: int | None = None) -> Cache:
        """An empty cache with room for `capacity` tokens a row."""


@dataclass(eq=False)
class Route:
    """What one `with` block puts on a model, for the thread or task that entered it.

    handlers: by attention module; watcher: takes the calls of modules that have none. caches: makes the cache wherever transformers
    would make one (None: transformers makes its own). own: an attention implementation of transformers' that takes all calls.
    """

    model: PreTrainedModel
    handlers: dict[torch.nn.Module, Any] = field(default_factory=dict)
    watcher: Any = None
    caches: CacheMaker | None = None
    own: str | None = None
    live: bool = True

    def __post_init__(self) -> None:
        self.config = text_config(self.model)
        self.callers = _callers(self.model)


_routes: ContextVar[tuple[Route, ...]] = ContextVar("routes", default=())


@contextlib.contextmanager
def routed(route: Route) -> Iterator[None]:
    """Put `route` in force for this thread or task; blocks may be left in any order."""
    with _lock:
        _install(route)
    _routes.set((*_routes.get(), route))
    try:
        yield
    finally:
        route.live = False
        # Not by a token of the variable: a generator may be closed in another context than the one it was begun in.
        _routes.set(tuple(other for other in _routes.get() if other is not route))
        with _lock:
            _uninstall(route)


def routes() -> Iterator[Route]:
    """The routes of this thread or task, the newest first."""
    return (route for route in reversed(_routes.get()) if route.live)


def own_implementation(config: Any) -> str | None:
    """The attention implementation that the model has when nothing routes it."""
    held = _configs.get(id(config))
    return held.own if held else config._attn_implementation


def is_routed(config: Any) -> bool:
    """True while any thread or task routes a model of this config."""
    return id(config) in _configs


def text_config(model: PreTrainedModel) -> Any:
    """The config of the text decoder, where the attention implementation is read."""
    return model.config.get_text_config(decoder=True)


# --- what is on a model while anyone routes it


@dataclass(eq=False)
class _Held:
    """A config, or a model, that is held by `users` routes."""

    what: Any
    own: Any
    users: int = 0


_lock = threading.RLock()
_configs: dict[int, _Held] = {}
_models: dict[int, _Held] = {}


def _after_fork() -> None:
    # A lock that another thread held at the fork would never be given back in the child.
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _install(route: Route) -> None:
    config = _configs.setdefault(id(route.config), _Held(route.config, route.config._attn_implementation))
    model = _models.setdefault(id(route.model), _Held(route.model, contextlib.ExitStack()))
    config.users, model.users = config.users + 1, model.users + 1
    if model.users == 1:
        for module in route.callers:
            if "past_key_values" in _signature(type(module).forward).parameters:
                model.own.callback(module.register_forward_pre_hook(_before_forward, with_kwargs=True).remove)
            if hasattr(module, PREPARE):
                model.own.enter_context(_shadowed(module))
    route.config._attn_implementation = ATTENTION_NAME


def _uninstall(route: Route) -> None:
    config, model = _configs[id(route.config)], _models[id(route.model)]
    config.users, model.users = config.users - 1, model.users - 1
    if not model.users:
        del _models[id(route.model)]
        model.own.close()
    if not config.users:
        del _configs[id(route.config)]
        route.config._attn_implementation = config.own


@contextlib.contextmanager
def _shadowed(module: PreTrainedModel) -> Iterator[None]:
    before = vars(module).get(PREPARE)
    vars(module)[PREPARE] = partial(_prepare_cache, module, getattr(module, PREPARE))
    try:
        yield
    finally:
        del vars(module)[PREPARE]
        if before is not None:
            vars(module)[PREPARE] = before


def _callers(model: PreTrainedModel) -> tuple[PreTrainedModel, ...]:
    """The model and its decoder, whichever is called: some callers go past the model's own `__call__`."""
    config = text_config(model)
    return tuple(module for module in model.modules() if isinstance(module, PreTrainedModel) and text_config(module) is config)


@cache
def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(forward)


# --- where transformers makes a cache


def _before_forward(
    module: PreTrainedModel, arguments: tuple[Any, ...], settings: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook. It looks the route up in every pass, so that a compiled model that holds it serves every plan."""
    if not is_traced():
        return _begin(module, arguments, settings)
    if not traces_whole():
        return _begin_outside(module, arguments, settings)
    # One graph: a cache that is given is used; else the model makes its own in the graph, and the plan masks it.
    return None


def _begin(module: PreTrainedModel, arguments: tuple[Any, ...], settings: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    route = _route_of(module)
    if route.config._attn_implementation != ATTENTION_NAME:
        raise RuntimeError("the attention implementation was changed while a plan is applied: change it before `apply_plan`")
    if route.caches is None:
        return None
    bound = _signature(type(module).forward).bind_partial(module, *arguments, **settings).arguments
    given = {**bound, **bound.get("kwargs", {})}
    past = given.get("past_key_values")
    route.caches.begin(past)
    use_cache = given.get("use_cache")
    wanted = route.config.use_cache if use_cache is None else use_cache
    # Attention modules that are trained may be run twice (checkpointing), and keep nothing.
    if not wanted or past is not None or module.training:
        return None
    position = list(_signature(type(module).forward).parameters).index("past_key_values") - 1
    made = route.caches.new()
    if len(arguments) > position:
        return (*arguments[:position], made, *arguments[position + 1 :]), settings
    return arguments, {**settings, "past_key_values": made}


_begin_outside = torch.compiler.disable(_begin, reason=WORDS)


def _prepare_cache(
    model: PreTrainedModel,
    prepare: Callable[..., Any],
    generation_config: Any,
    model_kwargs: dict[str, Any],
    *arguments: Any,
    **settings: Any,
) -> Any:
    route = _route_of(model)
    given = model_kwargs.get("past_key_values")
    if route.caches is not None:
        route.caches.check_generation(generation_config, given)
    answer = prepare(generation_config, model_kwargs, *arguments, **settings)
    if route.caches is not None and given is None and type(model_kwargs.get("past_key_values")) is DynamicCache:
        bound = inspect.signature(prepare).bind(generation_config, model_kwargs, *arguments, **settings).arguments
        made: Any = route.caches.new(bound.get("max_cache_length"))
        if generation_config.is_assistant:
            made.activate_past_recording()
        model_kwargs["past_key_values"] = made
    return answer


def _route_of(module: torch.nn.Module) -> Route:
    for route in routes():
        if any(module is caller for caller in route.callers):
            return route
    with _lock:
        held = [caller for model in _models.values() for caller in _callers(model.what)]
    raise RuntimeError(ELSEWHERE if any(module is caller for caller in held) else COPIED)
