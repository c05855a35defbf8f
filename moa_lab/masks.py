"""Which keys a query sees: the one expression that masks, kernels, cache and density are tested against."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch

Array = TypeVar("Array", torch.Tensor, np.ndarray)


def visible(query: Array, key: Array, sink_tokens: int, window_tokens: Array | int) -> Array:
    """A query at position i sees key j iff `j <= i and (j < sink_tokens or i - j < window_tokens)`.

    Arguments broadcast; the result is boolean. Every mask in the project is this expression.
    """
    return (key <= query) & ((key < sink_tokens) | (query - key < window_tokens))


@dataclass(frozen=True)
class KeyMask:
    """The model's own mask, the same for all heads of a layer: it hides the future, padding, and keys beyond a sliding window.

    The queries are the last n_queries of n_keys tokens. real: bool (batch, n_keys), False for padding (None: no padding).
    reach: the model's own sliding window in tokens (None: unlimited). explicit: a full mask (batch or 1, 1, n_queries, n_keys) that
    replaces `real` and `reach`: int32 `positions`, boolean, or additive (very negative where a key is hidden).
    """

    batch: int
    n_queries: int
    n_keys: int
    device: torch.device
    real: torch.Tensor | None = None
    reach: int | None = None
    explicit: torch.Tensor | None = None

    @cached_property
    def positions(self) -> torch.Tensor:
        """The key's position in its own sequence, padding not counted, or -1 where the model hides the key.

        int32 (batch or 1, 1, n_queries, n_keys). A padding query may see all keys: with none its softmax would be 0/0.
        """
        if self.explicit is not None:
            return _positions_of(self.explicit)
        index = torch.arange(self.n_keys, device=self.device, dtype=torch.int32)
        back = index[self.n_keys - self.n_queries :, None] - index
        shown = back >= 0 if self.reach is None else (back >= 0) & (back < self.reach)
        if self.real is None:
            return torch.where(shown, index, -1)[None, None]
        own = (self.real.cumsum(dim=1, dtype=torch.int32) - 1)[:, None, None]
        positions = torch.where(shown & self.real[:, None, None], own, -1)
        asks = self.real[:, None, self.n_keys - self.n_queries :, None]
        return torch.where(asks, positions, own.clamp(min=0))

    @property
    def hides_the_future_alone(self) -> bool:
        """True where queries see all that came before them."""
        return self.real is None and self.reach is None and self.explicit is None

    @property
    def is_causal(self) -> bool:
        """True where a whole sequence hides the future from its queries, and nothing else."""
        return self.hides_the_future_alone and self.n_queries == self.n_keys

    @cached_property
    def is_plain(self) -> bool:
        """`is_causal`, also where a mask was given that hides no token of any row."""
        pads_nothing = self.real is None or bool(self.real.all())
        return self.explicit is None and self.reach is None and self.n_queries == self.n_keys and pads_nothing

    @cached_property
    def first(self) -> torch.Tensor | None:
        """Index of each row's first token under left padding, int32 (batch,); None for other padding or an explicit mask."""
        if self.explicit is not None:
            return None
        if self.real is None:
            return torch.zeros(self.batch, device=self.device, dtype=torch.int32)
        return self.real.int().argmax(dim=1).to(torch.int32) if self.padded_on_the_left else None

    @cached_property
    def padded_on_the_left(self) -> bool:
        """True where no padding follows a token in any row; False for an explicit mask."""
        return self.explicit is None and (self.real is None or not bool((self.real[:, :-1] & ~self.real[:, 1:]).any()))


def _positions_of(explicit: torch.Tensor) -> torch.Tensor:
    if explicit.dtype == torch.int32:
        return explicit
    shown = explicit if explicit.dtype == torch.bool else explicit > torch.finfo(explicit.dtype).min / 2
    return torch.where(shown, torch.arange(shown.shape[-1], device=shown.device, dtype=torch.int32), -1)


def dense_mask(n_tokens: int, sink_tokens: int, windows: torch.Tensor) -> torch.Tensor:
    """Boolean mask (heads, n_tokens, n_tokens) of a prefill, for `windows` (heads,) in tokens; for tests and pictures."""
    position = torch.arange(n_tokens, device=windows.device)
    return visible(position[:, None], position[None, :], sink_tokens, windows[:, None, None])


def causal_work(n_tokens: int, sink_tokens: int, window_tokens: int) -> int:
    """Number of (query, key) pairs that a prefill of `n_tokens` computes for one head: the work of its causal triangle."""
    # A query at i sees min(i + 1, window) recent keys, and of the sink what lies outside the window.
    query = np.arange(n_tokens)
    recent = np.minimum(query + 1, window_tokens)
    sink = np.clip(query + 1 - window_tokens, 0, sink_tokens)
    return int((recent + sink).sum())


def work_density(n_tokens: int, sink_tokens: int, windows: np.ndarray) -> float:
    """Prefill work of heads with `windows` tokens, as a fraction of the dense causal triangle."""
    pairs = [causal_work(n_tokens, sink_tokens, int(window)) for window in np.asarray(windows).ravel()]
    return sum(pairs) / (len(pairs) * n_tokens * (n_tokens + 1) / 2)
