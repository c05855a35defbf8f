"""Settings of an engine that serves under a plan: those that are changed, and those that are refused."""

from __future__ import annotations

import logging
from typing import Any

from moa_lab.serving.page_layout import PAGE_TOKENS
from moa_lab.serving.page_pool import page_shape
from moa_lab.serving.settings import PLAN_VARIABLE, ServedPlan, check_device, check_served
from moa_lab.serving.vllm.shares import deal_heads
from moa_lab.serving.vllm.told import tell, told

logger = logging.getLogger("vllm.moa_lab")

PLAN = "moa_lab_plan"
"""Where an engine's processes are told which plan it was started under, among what a config has for plugins."""


def prepare_engine(arguments: Any) -> None:
    """Set what the user left open, and switch off what a plan cannot do. arguments: vLLM's EngineArgs."""
    if arguments.block_size is None:
        arguments.block_size = PAGE_TOKENS
    if arguments.enable_prefix_caching:
        logger.warning("prefix caching is switched off: under a plan heads overwrite the pages of what they have forgotten")
    arguments.enable_prefix_caching = False


def check_engine(served: ServedPlan, config: Any) -> None:
    """Raise ValueError where a setting or the model rules a plan out; tell what is served. config: vLLM's VllmConfig."""
    import vllm

    model, parallel, cache = config.model_config, config.parallel_config, config.cache_config
    refused = {
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "data parallelism": parallel.data_parallel_size > 1,
        "context parallelism": parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
        "speculative decoding": config.speculative_config is not None,
        "KV transfer": config.kv_transfer_config is not None,
        f"--kv-cache-dtype {cache.cache_dtype}": cache.cache_dtype != "auto",
        "--kv-sharing-fast-prefill": cache.kv_sharing_fast_prefill,
        "latent attention (MLA)": model.use_mla,
        "an encoder": model.is_encoder_decoder,
        "a pooling model": model.runner_type != "generate",
        "images or sound": model.is_multimodal_model,
        "VLLM_USE_V2_MODEL_RUNNER=1": config.use_v2_model_runner,
    }
    for what, is_so in refused.items():
        if is_so:
            raise ValueError(f"{what} cannot be combined with a plan yet")
    check_device(served, config.device_config.device_type, vllm.__version__)
    check_served(served, model.hf_config, model.max_model_len)
    shape = page_shape(served.plan, cache.block_size, model.dtype)
    shares = deal_heads(served, config, shape)
    tell(config, PLAN, served.plan.identity())
    logger.warning("serving under %s", served.told(model.max_model_len, cache.block_size, shares, shape))
    held = " or ".join(str(count) for count in sorted(set(shape.tokens.values())))
    logger.warning("prefix caching is off under a plan; pages of %d bytes hold %s tokens of one head", shape.nbytes, held)


def check_processes(config: Any, kv_cache: Any) -> None:
    """Raise ValueError where an engine was started under a plan that its processes do not know of. kv_cache: vLLM's KVCacheConfig."""
    from moa_lab.serving.vllm.specs import HeadPagesSpec

    plan = told(config, PLAN)
    if plan and not all(isinstance(group.kv_cache_spec, HeadPagesSpec) for group in kv_cache.kv_cache_groups):
        raise ValueError(
            f"the engine was started under plan {plan}, of which not all its processes know: {PLAN_VARIABLE} must be set in each, also "
            f"where a script is imported again"
        )
