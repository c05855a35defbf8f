"""What vLLM calls at its start in each of its processes: with MOA_LAB_PLAN set, the engine serves under that plan."""

from __future__ import annotations

import functools
import inspect
import logging
from typing import Any

from moa_lab.serving.settings import PLAN_VARIABLE, ServedPlan, served_plan

SEEN_TO_WORK = "0.32."
"""What the versions of vLLM that this was tested with begin with."""
logger = logging.getLogger("vllm.moa_lab")


def register() -> None:
    """Prepare vLLM for the plan that the environment names; without one nothing is touched.

    Raises ValueError for a plan that cannot be served, or another version of vLLM.
    """
    served = served_plan()
    if served is None:
        return
    import vllm

    if not vllm.__version__.startswith(SEEN_TO_WORK):
        raise ValueError(f"{PLAN_VARIABLE}: plans are served by vLLM {SEEN_TO_WORK}x, and this is {vllm.__version__}")
    from moa_lab.serving.vllm.specs import register_specs

    register_specs()
    _prepare_arguments(served)
    _prepare_layers()


def _prepare_arguments(served: ServedPlan) -> None:
    """Check an engine's settings as soon as they are known, in the process that the user started."""
    from vllm.engine.arg_utils import EngineArgs

    from moa_lab.serving.vllm.engine import check_engine, prepare_engine

    own = EngineArgs.create_engine_config
    if hasattr(own, "__wrapped__"):
        return

    @functools.wraps(own)
    def create_engine_config(self: Any, *arguments: Any, **settings: Any) -> Any:
        prepare_engine(self)
        config = own(self, *arguments, **settings)
        check_engine(served, config)
        return config

    EngineArgs.create_engine_config = create_engine_config


def _prepare_layers() -> None:
    """Give every attention layer that is made our backend, and all of them the KV cache of the first one."""
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.layers.attention import Attention

    from moa_lab.serving.vllm.attention import PlanBackend, pool_spec

    own = Attention.__init__
    if hasattr(own, "__wrapped__"):
        return
    signature = inspect.signature(own)

    @functools.wraps(own)
    def __init__(self: Any, *arguments: Any, **settings: Any) -> None:
        given = signature.bind(self, *arguments, **settings)
        made = get_current_vllm_config().compilation_config.static_forward_context
        first = next((name for name, layer in made.items() if isinstance(layer, Attention)), None)
        if given.arguments.get("attn_backend") or given.arguments.get("kv_sharing_target_layer_name"):
            raise ValueError(
                f"layer {given.arguments.get('prefix')} has attention of its own kind; its model cannot be served under a plan"
            )
        given.arguments.update(attn_backend=PlanBackend, kv_sharing_target_layer_name=first)
        own(*given.args, **given.kwargs)

    Attention.__init__ = __init__
    Attention.get_kv_cache_spec = pool_spec
