"""What a model would compute if nothing routed it: for calls of other threads that meet our functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moa_lab.interface.routes import ELSEWHERE, own_implementation


def own_attention(module: torch.nn.Module, name: str | None = None) -> Callable[..., Any]:
    """The attention function that `module` would call, or that of implementation `name`. Raises RuntimeError where there is none."""
    known = inspect.unwrap(type(module).forward).__globals__
    functions = known.get("ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)
    # "eager" is no entry of the table: every family defines its own beside its attention.
    found: Callable[..., Any] | None = functions.get_interface(
        name or own_implementation(module.config), known.get("eager_attention_forward")
    )
    if found is None:
        raise RuntimeError(ELSEWHERE)
    return found


def own_mask(name: str | None, /, *arguments: Any, **settings: Any) -> torch.Tensor | None:
    """The mask that implementation `name` makes (None: eager); arguments as transformers passes them."""
    make = dict(ALL_MASK_ATTENTION_FUNCTIONS).get(name or "eager")
    made: torch.Tensor | None = make(*arguments, **settings) if make else None
    return made
