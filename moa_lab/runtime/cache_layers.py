"""What transformers asks one layer of a cache, answered by the ring cache as a whole: its layers count their tokens together."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


class WholeCache(Cache):
    """A cache whose heads keep different tokens, and what cannot be asked of one."""

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise RuntimeError(
            "a ring cache cannot be pickled or saved: it belongs to the plan in force. Keep the tokens and run them again, "
            "or keep it in memory with copy.deepcopy"
        )

    def __iter__(self) -> NoReturn:
        raise TypeError(
            "a ring cache has no keys and values of equal length to iterate over; for a cache that has, pass past_key_values=DynamicCache()"
        )

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is no end."""
        return -1

    def offload(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused with RuntimeError."""
        raise RuntimeError("a ring cache stays on the model's device; pass past_key_values=DynamicCache(offloading=True) to offload")

    prefetch = offload


class LayerView(CacheLayerMixin):
    """Layer `layer` of `cache`, as `cache.layers[layer]`; holds nothing of its own."""

    is_sliding = False
    is_croppable = True

    def __init__(self, cache: Cache, layer: int) -> None:
        # Not the base class's: it would set keys and values, which there are none of.
        self._cache, self._layer = cache, layer

    @property
    def batch_size(self) -> int:
        return self._cache.batch_size

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]
        return self._cache.get_seq_length() > 0

    @property
    def keys(self) -> NoReturn:  # type: ignore[override]
        raise AttributeError(f"every KV head keeps other tokens: `cache.rings[{self._layer}].held(head)[0]` are those of one")

    @property
    def values(self) -> NoReturn:  # type: ignore[override]
        raise AttributeError(f"every KV head keeps other tokens: `cache.rings[{self._layer}].held(head)[1]` are those of one")

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: a layer is allocated with its first tokens."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return self._cache.update(key_states, value_states, self._layer)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self._cache.get_seq_length()

    def get_max_length(self) -> int:
        return -1

    def _refused(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError(
            "the layers of a ring cache change together: call the method of this name on the cache, not on `cache.layers[i]`"
        )

    reset = crop = reorder_cache = batch_select_indices = batch_repeat_interleave = activate_past_recording = offload = prefetch = _refused
