"""Which KV heads each device of an engine holds, and the weights that put them there. config, throughout: vLLM's VllmConfig."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moa_lab.geometry import ModelGeometry
from moa_lab.serving.head_weights import FAMILIES, HeadWeights
from moa_lab.serving.page_layout import PageShape
from moa_lab.serving.settings import ServedPlan
from moa_lab.serving.shares import HeadShares, balanced_shares, natural_shares
from moa_lab.serving.vllm.told import tell, told

CHECKPOINTS = ("auto", "hf", "safetensors", "pt")
"""Ways to load weights whose names are those of transformers."""
ORDER = "moa_lab_head_order"
"""Where the order of heads is told to an engine's processes, among what a config has for plugins."""


def deal_heads(served: ServedPlan, config: Any, shape: PageShape | None = None) -> HeadShares:
    """Decide once, where an engine starts, which heads each device holds: anew where weights can be moved, else in the model's order.

    shape: of the pages, where heads store other bits. Raises ValueError where the heads cannot be dealt to so many devices.
    """
    natural = natural_shares(_geometry(config), config.parallel_config.tensor_parallel_size)
    if natural.count == 1 or not _can_be_moved(config):
        return natural
    page_tokens = config.cache_config.block_size
    lengths = served.lengths(config.model_config.max_model_len, page_tokens)
    found = balanced_shares(served.plan, natural.count, lengths, page_tokens, shape.tokens if shape else None)
    if not found.is_natural:
        tell(config, ORDER, [list(row) for row in found.order])
    return found


def engine_shares(config: Any) -> HeadShares:
    """What was decided, in any process of the engine."""
    natural = natural_shares(_geometry(config), config.parallel_config.tensor_parallel_size)
    order = told(config, ORDER)
    return natural if order is None else HeadShares(tuple(map(tuple, order)), natural.count)


def _geometry(config: Any) -> ModelGeometry:
    return ModelGeometry.from_config(config.model_config.hf_config)


def _can_be_moved(config: Any) -> bool:
    model, formats = config.model_config, (*CHECKPOINTS, "dummy")
    # Adapters and quantised weights are in the model's order.
    plain = model.quantization is None and config.lora_config is None and config.load_config.load_format in formats
    return plain and model.hf_config.model_type in FAMILIES


def load_weights(own: Callable[..., Any], self: Any, model: Any, *arguments: Any, **settings: Any) -> Any:
    """Let a model take its weights, now and later, in the order in which devices hold the heads."""
    from vllm.config import get_current_vllm_config

    config = get_current_vllm_config()
    if told(config, ORDER) is None:
        return own(self, model, *arguments, **settings)
    weights, take = HeadWeights(engine_shares(config).order, _geometry(config)), model.load_weights
    model.load_weights = lambda given, *others, **more: take(weights.reordered(given), *others, **more)
    found = own(self, model, *arguments, **settings)
    weights.check_complete()
    return found
