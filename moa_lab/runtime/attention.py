"""Attention under a plan, by masking: right for every model, and no memory saved."""

from __future__ import annotations

import numpy as np
import torch

from moa_lab.interface import AttentionCall, Handler
from moa_lab.kernels.dispatch import span_attention
from moa_lab.plan import Plan


class MaskedSpans:
    """Attention handlers of a model under `plan`, one per layer, that agree on the length N the spans are taken at.

    n_tokens: N for elastic rules (prompt and new tokens together); None: the length of the newest prompt, kept while
    tokens are generated after it, since a cache that dropped a token cannot bring it back.
    """

    def __init__(self, plan: Plan, n_tokens: int | None = None) -> None:
        self.plan = plan
        self.fixed = n_tokens
        self._windows: dict[int, np.ndarray] = {}
        self._current = n_tokens

    def handler(self, layer: int) -> Handler:
        """The attention of one layer."""

        def attend(call: AttentionCall) -> torch.Tensor:
            if self.fixed is None and (call.is_prefill or self._current is None):
                self._current = call.key.shape[2]
            windows = self._window_tokens()[layer]
            return span_attention(
                call.query, call.key, call.value, call.positions, call.first, self.plan.sink_tokens, windows, call.scale, call.softcap
            )

        return attend

    def _window_tokens(self) -> np.ndarray:
        n = self._current
        assert n is not None
        if n not in self._windows:
            self._windows[n] = self.plan.windows(n)
        return self._windows[n]
