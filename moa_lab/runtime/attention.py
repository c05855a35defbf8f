"""Attention under a plan: over the tokens of one pass, over a cache that shrinks, or, masked, over one that does not."""

from __future__ import annotations

import threading
from typing import Protocol

import numpy as np
import torch
from transformers.cache_utils import Cache

from moa_lab.interface import AttentionCall, Handler
from moa_lab.interface.tracing import WORDS, handed, is_traced
from moa_lab.kernels.dispatch import heads_as_stored, span_attention
from moa_lab.plan import Plan

LENGTH = "_moa_lab_n_tokens"
"""Where a cache that keeps everything carries the length N its spans are taken at: copies of the cache take it along."""
ELSEWHERE = (
    "this cache is used where its plan is not in force: by another model, or inside another `apply_plan`; "
    "make a cache there with `ring_cache(model)`, or run the prompt again"
)


class SpanCache(Protocol):
    """A cache that keeps what a plan's heads will see."""

    @property
    def is_decoding(self) -> bool:
        """True where every pass does the same to it, so that a pass can be one graph."""

    def attend(self, layer: int, call: AttentionCall) -> torch.Tensor:
        """Attention of one layer over the cache and the new tokens."""


class _Pass(threading.local):
    """The forward pass that is under way in this thread: the cache it runs over, its length N, and what the cache handed over."""

    past: Cache | None = None
    n_tokens: int | None = None
    arrived: tuple[SpanCache, torch.Tensor] | None = None


class SpanAttention:
    """Attention handlers of a model under `plan`, one per layer, that agree on the length N the spans are taken at.

    n_tokens: N for elastic rules (prompt and new tokens together); None: the length of the first prompt in the cache, kept while
    tokens are generated after it, since a cache that dropped a token cannot bring it back.
    Threads may run passes of their own at the same time.
    """

    def __init__(self, plan: Plan, n_tokens: int | None = None) -> None:
        self.plan = plan
        self.fixed = n_tokens
        self.active = True
        self._windows: dict[int, np.ndarray] = {}
        self._pass = _Pass()

    def arrive(self, cache: SpanCache, key: torch.Tensor, layer: int) -> None:
        """Told by a cache that gives nothing but the new tokens' `key` to the attention of `layer`, which comes next."""
        self.check_active()
        if not is_traced():
            self._arrive(cache, key)
        elif cache.is_decoding:
            handed.cache, handed.layer = cache, layer
        else:
            _arrive_outside(self, cache, key)

    def _arrive(self, cache: SpanCache, key: torch.Tensor) -> None:
        if self._pass.arrived is not None:
            # The layer before handed its keys over, and its attention was another's: it saw nothing but the new tokens.
            self._pass.arrived = None
            raise RuntimeError(ELSEWHERE)
        self._pass.arrived = (cache, key)

    def check_active(self) -> None:
        """Raises RuntimeError where the plan is no longer applied."""
        if not self.active:
            raise RuntimeError("this cache belongs to a plan that is no longer applied: use it within the same `apply_plan`")

    def begin(self, past: Cache | None) -> None:
        """A new forward pass begins, over the cache `past`: what an earlier one left when it failed is void."""
        self._pass.arrived = None
        if self.fixed is None:
            self._pass.past, self._pass.n_tokens = past, getattr(past, LENGTH, None)

    def handler(self, layer: int) -> Handler:
        """The attention of one layer."""

        def attend(call: AttentionCall) -> torch.Tensor:
            arrived, self._pass.arrived = self._pass.arrived, None
            if arrived is not None:
                cache, key = arrived
                if key is not call.key:
                    raise ValueError("the model changes keys between its cache and its attention: pass past_key_values=DynamicCache()")
                return cache.attend(layer, call)
            if call.key.shape[2] < call.mask.n_keys:
                raise RuntimeError(ELSEWHERE)
            if self.fixed is None and (call.is_prefill or self._pass.n_tokens is None):
                self._settle(call)
            windows = self.windows(self._pass.n_tokens or call.mask.n_keys)[layer]
            seen = self.as_stored(layer, call.key, call.value)
            return span_attention(call.query, *seen, call.mask, self.plan.sink_tokens, windows, call.scale, call.softcap, call.sink_logits)

        return attend

    def _settle(self, call: AttentionCall) -> None:
        """Take the tokens that there are for N. A cache tells them: layers hand out fewer keys, or room that is yet to be filled."""
        past = self._pass.past
        there = 0 if past is None else int(past.get_seq_length())
        self._pass.n_tokens = call.mask.n_keys if call.is_prefill else there or call.mask.n_keys
        # The cache of an earlier pass, if this one went round the model's own door, has nothing to do with it.
        if past is not None and there == self._pass.n_tokens:
            setattr(past, LENGTH, self._pass.n_tokens)

    def as_stored(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V (batch, kv_heads, tokens, head_dim) of a layer as the plan's bits leave them."""
        return heads_as_stored(key, value, self.plan.bits_of(layer))

    def windows(self, n_tokens: int) -> np.ndarray:
        """Window tokens at length N, or at `n_tokens` where no N is fixed: int64 (layers, kv_heads)."""
        n = self.fixed or n_tokens
        if n not in self._windows:
            self._windows[n] = self.plan.windows(n)
        return self._windows[n]


_arrive_outside = torch.compiler.disable(SpanAttention._arrive, reason=WORDS)
