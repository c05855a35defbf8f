"""What vLLM calls at its start in each of its processes: with MOA_LAB_PLAN set, the engine serves under that plan."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from moa_lab.serving.settings import PLAN_LENGTH_VARIABLE, PLAN_VARIABLE, ServedPlan, served_plan
from moa_lab.text import one_line

COMMANDS = ("vllm", "api_server.py")
"""Programs that serve: `vllm serve`, and `python -m vllm.entrypoints.openai.api_server`."""
SEEN_TO_WORK = ("0.26.", "0.32.")
"""What the versions of vLLM that this was tested with begin with: both on a CPU, the first on a GPU too."""


def register() -> None:
    """Prepare vLLM for the plan that the environment names, now or when an engine starts; an engine without one is vLLM's own.

    May be called again. Raises ValueError for a plan that cannot be served, or is to be by a version of vLLM that was not seen to work;
    under vLLM's own command line that is a line on standard error, and the end. Such a version is left alone without a plan.
    """
    with _in_one_line():
        _register()
    import vllm

    if not vllm.__version__.startswith(SEEN_TO_WORK):
        return
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.core.sched.scheduler import Scheduler

    # vLLM loads plugins once a process, which may start an engine without a plan first; and one that lost the plan is to say so.
    _stand_in(EngineArgs, "create_engine_config", _create_engine_config)
    _stand_in(Scheduler, "__init__", _make_scheduler)


def _served() -> ServedPlan | None:
    """The plan that the environment names, read once an engine: vLLM asks for every layer."""
    return _read(os.environ.get(PLAN_VARIABLE), os.environ.get(PLAN_LENGTH_VARIABLE))


@functools.cache
def _read(path: str | None, length: str | None) -> ServedPlan | None:
    return served_plan({PLAN_VARIABLE: path or "", PLAN_LENGTH_VARIABLE: length or ""})


def _register() -> None:
    _read.cache_clear()
    if _served() is None:
        return
    import vllm

    if not vllm.__version__.startswith(SEEN_TO_WORK):
        known = " and ".join(f"{each}x" for each in SEEN_TO_WORK)
        raise ValueError(f"{PLAN_VARIABLE}: plans are served by vLLM {known}, which were seen to work, and this is {vllm.__version__}")
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
    from vllm.platforms import current_platform
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    from moa_lab.serving.vllm.shares import load_weights
    from moa_lab.serving.vllm.specs import register_specs

    # The second model runner of 0.26 makes block tables of as many columns as a dense cache has; the first asks the spec.
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    register_specs()
    _stand_in(KVCacheManager, "allocate_slots", _allocate_slots)
    _replace(Attention, "__init__", _make_layer)
    _replace(Attention, "get_kv_cache_spec", _kv_cache_spec)
    _stand_in(DefaultModelLoader, "load_weights", load_weights)
    if current_platform.is_cpu():
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner

        _stand_in(GPUModelRunner, "sample_tokens", _sample_tokens)


@contextlib.contextmanager
def _in_one_line() -> Iterator[None]:
    """Spare who serves by vLLM's command line the traceback of what is refused; who calls vLLM from Python may catch it."""
    try:
        yield
    except (ValueError, OSError) as error:
        if Path(sys.argv[0]).name not in COMMANDS:
            raise
        raise SystemExit(f"error: {one_line(error)}") from None


def _stand_in(owner: type, name: str, ours: Callable[..., Any]) -> None:
    """Let `ours(own, self, ...)` stand for a method."""
    own = getattr(owner, name)
    if getattr(own, "stands_for", None) == name:
        return

    @functools.wraps(own)
    def method(self: Any, *arguments: Any, **settings: Any) -> Any:
        return ours(own, self, *arguments, **settings)

    # vLLM wraps some of its methods too, so that `__wrapped__` would not tell.
    method.stands_for = name  # type: ignore[attr-defined]
    setattr(owner, name, method)


def _replace(owner: type, name: str, ours: Callable[..., Any]) -> None:
    """Let `ours(own, served, self, ...)` stand for a method wherever the environment names a plan."""

    def either(own: Callable[..., Any], self: Any, *arguments: Any, **settings: Any) -> Any:
        served = _served()
        return own(self, *arguments, **settings) if served is None else ours(own, served, self, *arguments, **settings)

    _stand_in(owner, name, either)


def _create_engine_config(own: Callable[..., Any], self: Any, *arguments: Any, **settings: Any) -> Any:
    """Read the plan and check an engine's settings as soon as they are known, in the process that the user started."""
    with _in_one_line():
        _register()
    served = _served()
    if served is None:
        return own(self, *arguments, **settings)
    from moa_lab.serving.vllm.engine import check_engine, prepare_engine

    prepare_engine(self)
    config = own(self, *arguments, **settings)
    with _in_one_line():
        check_engine(served, config)
    return config


def _make_scheduler(own: Callable[..., Any], self: Any, *arguments: Any, **settings: Any) -> None:
    """Let no engine start that was to serve under a plan and whose processes do not know of it."""
    from moa_lab.serving.vllm.engine import check_processes

    given = inspect.signature(own).bind(self, *arguments, **settings).arguments
    check_processes(given["vllm_config"], given["kv_cache_config"])
    own(self, *arguments, **settings)


def _make_layer(own: Callable[..., Any], served: ServedPlan, self: Any, *arguments: Any, **settings: Any) -> None:
    """Give an attention layer our backend, and the KV cache of the model's first one."""
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.layers.attention import Attention

    from moa_lab.serving.vllm.attention import PlanBackend

    given = inspect.signature(own).bind(self, *arguments, **settings)
    if given.arguments.get("attn_backend") or given.arguments.get("kv_sharing_target_layer_name"):
        raise ValueError(f"layer {given.arguments.get('prefix')} has attention of its own kind, which no plan is for")
    made = get_current_vllm_config().compilation_config.static_forward_context
    first = next((name for name, layer in made.items() if isinstance(layer, Attention)), None)
    given.arguments.update(attn_backend=PlanBackend, kv_sharing_target_layer_name=first)
    own(*given.args, **given.kwargs)


def _kv_cache_spec(own: Callable[..., Any], served: ServedPlan, self: Any, vllm_config: Any) -> Any:
    from moa_lab.serving.vllm.attention import pool_spec

    return pool_spec(served, self, vllm_config)


def _allocate_slots(own: Callable[..., Any], self: Any, request: Any, *arguments: Any, **settings: Any) -> Any:
    """Tell our manager how long a request may become: its windows are those of that length."""
    from moa_lab.serving.vllm.specs import HeadPagesManager

    n_tokens = min(request.num_prompt_tokens + request.max_tokens, self.max_model_len)
    for manager in self.coordinator.single_type_managers:
        if isinstance(manager, HeadPagesManager):
            manager.expect(request.request_id, n_tokens)
    return own(self, request, *arguments, **settings)


def _sample_tokens(own: Callable[..., Any], self: Any, *arguments: Any, **settings: Any) -> Any:
    """Draw nothing from the generator of a seeded request whose prompt goes on: vLLM takes that back, which on a CPU ends the engine."""
    generators = self.input_batch.generators
    spared = {row: generators.pop(row) for row in list(generators) if self.discard_request_mask.np[row]}
    try:
        return own(self, *arguments, **settings)
    finally:
        generators.update(spared)
