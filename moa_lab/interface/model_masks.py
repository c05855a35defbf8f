"""What a model hides, asked of transformers' mask functions and kept as rules, not as a mask of all (query, key) pairs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers.masking_utils import causal_mask_function, sdpa_mask, sliding_window_overlay

from moa_lab.interface.tracing import is_traced
from moa_lab.masks import KeyMask


def key_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
    **settings: Any,
) -> KeyMask:
    """Says what is hidden instead of writing it out, query by key; arguments as transformers passes them to a mask function."""
    device = torch.device(device)
    came = (q_offset if isinstance(q_offset, int) else int(q_offset)) + q_length
    if kv_offset == 0 and came < kv_length and (attention_mask is None or attention_mask.shape[-1] < kv_length):
        # A static cache, with room for tokens to come: its keys beyond those that came are nobody's (see `_dispatch`).
        kv_length = came
    causal, reach = _own_window(settings.get("mask_function", causal_mask_function))
    if causal and kv_offset == 0 and came == kv_length:
        real = None if attention_mask is None else attention_mask[:, :kv_length].to(device, torch.bool)
        return KeyMask(batch_size, q_length, kv_length, device, real=real, reach=reach)
    settings["allow_is_causal_skip"] = settings["allow_is_bidirectional_skip"] = False
    shown = sdpa_mask(batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask=attention_mask, device=device, **settings)
    assert shown is not None, "only a skip leaves the mask out"
    position = torch.arange(kv_length, device=device, dtype=torch.int32) + kv_offset
    if attention_mask is None:
        codes = torch.where(shown[:1], position, -1)
    else:
        own = attention_mask.to(device).int().cumsum(dim=1, dtype=torch.int32)[:, kv_offset : kv_offset + kv_length] - 1
        codes = torch.where(shown, own[:, None, None], -1)
        # A padding query sees nothing; its softmax would be 0/0. It may see everything: nobody reads its output.
        codes = torch.where(codes.amax(dim=-1, keepdim=True) < 0, 0, codes)
    return KeyMask(batch_size, q_length, kv_length, device, explicit=codes)


def _own_window(mask_function: Callable[..., Any]) -> tuple[bool, int | None]:
    """Whether a mask function of transformers is causal and nothing else but for a sliding window, and that window in tokens."""
    if mask_function is causal_mask_function:
        return True, None
    # What `torch.compile` reads has no closures to look into: such a mask is written out.
    if is_traced():
        return False, None
    parts = inspect.getclosurevars(mask_function).nonlocals.get("mask_functions", ())
    others = [part for part in parts if part is not causal_mask_function]
    if len(parts) != 2 or len(others) != 1 or others[0].__code__ is not sliding_window_overlay(1).__code__:
        return False, None
    return True, int(inspect.getclosurevars(others[0]).nonlocals["sliding_window"])
