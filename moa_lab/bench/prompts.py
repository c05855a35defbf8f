"""Prefill of a whole model, timed: all tokens of a prompt, keys and values stored in a cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from moa_lab.clock import clock
from moa_lab.plan import Plan
from moa_lab.runtime import apply_plan, ring_cache
from moa_lab.runtime.generate import PREFILL_TOKENS


def prompt_rows(length: int) -> int:
    """Prompts of `length` tokens in one prefill."""
    return max(1, PREFILL_TOKENS // length)


def our_prompt_ms(model: PreTrainedModel, plan: Plan, rows: int, length: int, repeats: int) -> list[float]:
    """Milliseconds of `repeats` prefills of `rows` random prompts under `plan`, each into a ring cache; a warm-up comes first."""
    with apply_plan(model, plan, length):
        return _timed(model, lambda: ring_cache(model, length), rows, length, repeats)


def transformers_prompt_ms(model: PreTrainedModel, rows: int, length: int, repeats: int) -> list[float]:
    """The same for transformers' own dense model, each into a DynamicCache."""
    return _timed(model, lambda: DynamicCache(config=model.config), rows, length, repeats)


@torch.no_grad()
def _timed(model: PreTrainedModel, cache: Callable[[], Cache], rows: int, length: int, repeats: int) -> list[float]:
    tokens = torch.randint(model.config.get_text_config(decoder=True).vocab_size, (rows, length), device=model.device)
    found = []
    for _ in range(1 + repeats):
        began = clock(model.device)
        model(input_ids=tokens, past_key_values=cache(), use_cache=True, logits_to_keep=1)
        found.append((clock(model.device) - began) * 1e3)
    return found[1:]
