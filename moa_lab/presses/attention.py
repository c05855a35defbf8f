"""Attention over a cache that keeps everything, with masks: `apply_plan` for a transformers that it does not support, and kvpress's
masked presses."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moa_lab.masks import visible
from moa_lab.plan import Plan

Attention = Callable[..., tuple[torch.Tensor, Any]]
"""An attention function of transformers: of module, query (1, query_heads, n_queries, head_dim), key and value
(1, kv_heads, n_keys, head_dim), and the model's own mask, which is not looked at. The queries are the last of the keys' tokens: one
sequence without padding, in layers without a window of their own."""


class SpanMask:
    """Shows every KV head its sink and window.

    The plan's rules are taken at `n_tokens`, the whole length. reads_densely: the context's own queries see everything, as they do
    where another method compresses, and spans hold for the tokens after it. `held`: keys that the newest query saw, by layer, summed
    over KV heads.
    """

    def __init__(self, plan: Plan, n_tokens: int, reads_densely: bool = False) -> None:
        self.sink_tokens = plan.sink_tokens
        self.windows = torch.from_numpy(plan.windows(n_tokens))
        self.reads_densely = reads_densely
        self.held: dict[int, torch.Tensor] = {}

    def shown(self, layer: int, n_queries: int, n_keys: int, device: torch.device) -> torch.Tensor:
        """Which keys the last `n_queries` of `n_keys` tokens see: bool (kv_heads, n_queries, n_keys)."""
        position = torch.arange(n_keys, device=device)
        windows = self.windows[layer].to(device)
        return visible(position[n_keys - n_queries :, None], position, self.sink_tokens, windows[:, None, None])

    def __call__(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, Any]:
        """See `Attention`."""
        n_queries, n_keys = query.shape[2], key.shape[2]
        if self.reads_densely and n_queries == n_keys:
            return sdpa_attention_forward(module, query, key, value, None, **kwargs)
        shown = self.shown(module.layer_idx, n_queries, n_keys, query.device)
        self.held[module.layer_idx] = shown[:, -1].sum()
        return _over_shown(module, query, key, value, shown, **kwargs)


def without_masked_keys(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, Any]:
    """Hides the entries that a press of kvpress has written to `module.masked_key_indices`: (batch, head, key) of each.

    kvpress itself overwrites them with keys that all queries reject, where it finds such a key; where it finds none it gives up. See
    `Attention`.
    """
    n_queries, n_keys = query.shape[2], key.shape[2]
    if n_queries == n_keys:
        # A new context, as kvpress has it.
        module.masked_key_indices = None
        return sdpa_attention_forward(module, query, key, value, None, **kwargs)
    shown = torch.ones(key.shape[1], n_queries, n_keys, dtype=torch.bool, device=query.device).tril(n_keys - n_queries)
    hidden = getattr(module, "masked_key_indices", None)
    if hidden is not None:
        _, heads, keys = (indices.to(query.device) for indices in hidden)
        shown[heads, :, keys] = False
    return _over_shown(module, query, key, value, shown, **kwargs)


@contextlib.contextmanager
def attending(model: PreTrainedModel, attention: Attention, name: str) -> Iterator[None]:
    """Send the model's attention through `attention`, known to transformers by `name`; the model is as before on exit, also after an
    exception."""
    before = model.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS[name] = attention
    try:
        model.config._attn_implementation = name
        yield
    finally:
        model.config._attn_implementation = before
        del ALL_ATTENTION_FUNCTIONS[name]


def _over_shown(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, shown: torch.Tensor, **kwargs: Any
) -> tuple[torch.Tensor, Any]:
    """shown: bool (kv_heads, n_queries, n_keys)."""
    group = query.shape[1] // len(shown)
    return sdpa_attention_forward(module, query, key, value, shown.repeat_interleave(group, dim=0)[None], **kwargs)
