"""One attention call of a model, and who takes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from moa_lab.masks import KeyMask


@dataclass(frozen=True)
class AttentionCall:
    """One layer's attention, as transformers asks for it.

    query: (batch, query_heads, query_tokens, head_dim); key, value: (batch, kv_heads, key_tokens, head_dim). mask: what the model
    hides. Over a cache that hands out nothing but the new tokens' keys, the mask still counts all tokens. sink_logits: (query_heads, 1, 1),
    the score of one more key per query head, which every query sees and which has no value (gpt-oss, there called `s_aux`); None: there
    is none.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: KeyMask
    scale: float
    softcap: float | None
    sink_logits: torch.Tensor | None = None

    @property
    def positions(self) -> torch.Tensor:
        """`KeyMask.positions`."""
        return self.mask.positions

    @property
    def is_prefill(self) -> bool:
        """True when the call starts a sequence: no key lies before the first query."""
        return self.mask.n_queries == self.mask.n_keys

    @property
    def query_positions(self) -> torch.Tensor:
        """Position of every query, (batch or 1, 1, query_tokens, 1): a query always sees itself, the newest key it may see."""
        return self.positions.amax(dim=-1, keepdim=True)


Handler = Callable[[AttentionCall], torch.Tensor]
"""Takes a call, returns the attention output: (batch, query_heads, query_tokens, head_dim)."""

Watcher = Callable[[torch.nn.Module, AttentionCall], torch.Tensor]
"""Takes the calls of modules that have no handler of their own."""


@dataclass(frozen=True)
class AttentionSite:
    """A module that attends, and the shapes it was seen with."""

    module: torch.nn.Module
    layer: int
    query_heads: int
    kv_heads: int
    head_dim: int
