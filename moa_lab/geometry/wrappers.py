"""The transformers model inside what others wrap around it."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

PEFT_CLASSES = ("PeftModel", "PeftMixedModel")


def plain_model(model: Any) -> PreTrainedModel:
    """The transformers model that `model` is or wraps; it computes what the wrapper does.

    Looked through: `torch.compile`, DistributedDataParallel, DataParallel on one device, and PEFT adapters that change layers in place
    (LoRA). Raises ValueError, in one line that names the cure, for every other wrapper and for adapters that add tokens to the prompt,
    and TypeError for what is no model.
    """
    if isinstance(model, PreTrainedModel):
        return model
    if not isinstance(model, torch.nn.Module):
        held = getattr(model, "model", None)
        cure = "pass its .model" if isinstance(held, torch.nn.Module) else "load one with moa_lab.load_model"
        raise TypeError(f"a transformers model is needed, got {type(model).__name__}: {cure}")
    # Of torch.compile; its class is not asked for, since that would load the compiler.
    if isinstance(getattr(model, "_orig_mod", None), torch.nn.Module):
        return plain_model(model._orig_mod)
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        return plain_model(model.module)
    if isinstance(model, torch.nn.DataParallel):
        if len(model.device_ids) > 1:
            raise ValueError("DataParallel copies the model in every pass, and a plan holds for one: pass model.module")
        return plain_model(model.module)
    if any(kind.__name__ in PEFT_CLASSES for kind in type(model).__mro__):
        return _adapted(model)
    raise ValueError(f"{type(model).__name__} is no transformers model: {_cure(model)}")


def is_split(model: PreTrainedModel) -> bool:
    """Whether a model's layers lie on several devices, as a `device_map` deals them out."""
    return len(set(getattr(model, "hf_device_map", {}).values())) > 1


def _adapted(model: Any) -> PreTrainedModel:
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError(f"{type(model).__name__}: its adapter puts virtual tokens before the prompt, which no span counts; use LoRA")
    return plain_model(model.base_model.model)


def _cure(model: torch.nn.Module) -> str:
    for path, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            return f"pass the one inside it, .{path}; what is applied to that holds inside the wrapper too"
    return "load one with moa_lab.load_model"
