"""A transformers cache over the rings: what no head of the plan will see again is not kept, and not allocated."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from moa_lab.cache import LayerLayout, RingLayer, layer_layouts
from moa_lab.interface import AttentionCall
from moa_lab.kernels.dispatch import new_schedule, ring_attention, ring_write, span_attention
from moa_lab.kernels.schedule import DecodeSchedule
from moa_lab.masks import KeyMask
from moa_lab.runtime.attention import SpanAttention

ROOM = 256
"""Tokens that there is room for beyond what came, where nothing says how many will come."""


class RingCache(Cache):
    """The KV cache of one batch under a plan; made inside `apply_plan` wherever transformers would make a cache, or by `ring_cache`.

    spans: the plan in force. capacity: tokens that rows will reach, prompt and new; more are taken, and
    cost a copy. Spans of elastic rules are those of the plan's length N, or else of the first prompt's, and stay.

    Rows may be padded anywhere: padding is never stored, so a row holds what it would alone. Raises RuntimeError when used outside
    the plan that made it, ValueError when it goes on after a mask of one's own, or with one.
    """

    def __init__(self, spans: SpanAttention, capacity: int | None = None) -> None:
        self._spans = spans
        self._capacity = capacity or 0
        self.rings: list[RingLayer] = []
        self.lengths = torch.zeros(0, dtype=torch.int32)
        self._schedules: dict[tuple[int, ...], DecodeSchedule | None] = {}
        self._dealt: list[DecodeSchedule | None] = []
        self._padding = torch.zeros(0, dtype=torch.int32)
        self._order: torch.Tensor | None = None
        self._layouts: list[LayerLayout] = []
        self._is_first, self._is_void, self._counts = True, False, True
        self._recorded: list[tuple[torch.Tensor, torch.Tensor]] | None = None
        self._seen = 0
        super().__init__(layers=[_Layer(self, layer) for layer in range(spans.plan.geometry.layers)])

    @property
    def allocated_bytes(self) -> int:
        """Bytes of K and V that are allocated, all layers and rows."""
        return sum(ring.allocated_bytes for ring in self.rings)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of tokens that came so far, padding counted."""
        return self._seen

    @contextlib.contextmanager
    def decoding(self) -> Iterator[None]:
        """Within this, every pass brings one token to every row, and the host counts nothing: what a pass does is the same each time,
        whatever its mask.

        The tokens must fit in the room there is; `came` tells afterwards how many there were.
        """
        self._padding = torch.zeros_like(self.lengths)
        self._dealt = [self._schedule_of(layer) for layer in range(len(self.rings))]
        self._order, self._is_first, self._counts = None, False, False
        try:
            yield
        finally:
            self._counts = True

    def came(self, columns: int) -> None:
        """Count the columns that came while decoding."""
        self._seen += columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is no end."""
        return -1

    @property
    def batch_size(self) -> int:
        """Rows; -1 before the first tokens came."""
        return len(self.lengths) or -1

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hands the new tokens' keys and values on to the attention, which finds the others here."""
        self._spans.arrive(self, key_states)
        return key_states, value_states

    def attend(self, layer: int, call: AttentionCall) -> torch.Tensor:
        """Attention of one layer to all that its heads keep and to the new tokens, which are kept from here on."""
        tokens = call.query.shape[2]
        if layer == 0:
            self._begin(call, tokens)
        if self._is_first:
            layout = self._layouts[layer]
            windows = np.array(layout.windows)
            found = span_attention(call.query, call.key, call.value, call.mask, layout.sink_tokens, windows, call.scale, call.softcap)
            if not self._is_void:
                self._allocate(layer, call)
                self._keep(layer, _ordered(call.key, self._order), _ordered(call.value, self._order))
            return found
        ring = self.rings[layer]
        query, key, value = (_ordered(x, self._order) for x in (call.query, call.key, call.value))
        keep = self._recorded is None
        if self._recorded is not None:
            self._keep(layer, key, value)
            key, value = self._recorded[layer]
        schedule = self._schedule_of(layer) if keep and tokens == 1 else None
        # A model may be spread over several devices, a layer here and a layer there.
        lengths, padding = (x.to(query.device) for x in (self.lengths, self._padding))
        found = ring_attention(query, key, value, ring, lengths, padding, call.scale, call.softcap, schedule=schedule, keep=keep)
        return found if self._order is None else _ordered(found, self._order.argsort(dim=1))

    # --- rows

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep, drop, repeat or reorder rows."""
        rows = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
        for ring in self.rings:
            ring.select(rows)
        self.lengths, self._padding = (x.index_select(0, rows.to(x.device)) for x in (self.lengths, self._padding))
        if self._recorded is not None:
            chosen = [tuple(x.index_select(0, rows.to(x.device)) for x in pair) for pair in self._recorded]
            self._recorded = [(key, value) for key, value in chosen]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Rows in the order of the beams."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        self.batch_select_indices(torch.arange(len(self.lengths)).repeat_interleave(repeats))

    def reset(self) -> None:
        """Forget everything."""
        self.rings, self._recorded, self._seen, self._is_void = [], None, 0, False
        self.lengths = torch.zeros(0, dtype=torch.int32)

    # --- taking tokens back

    def activate_past_recording(self) -> None:
        """From here on tokens overwrite nothing before `crop` says which of them stay (assisted generation)."""
        self._recorded = self._recorded if self._recorded is not None else []

    def crop(self, tokens_to_remove: int | torch.Tensor) -> None:
        """Take the newest -`tokens_to_remove` tokens back; a positive number is the number of tokens to keep.

        Raises RuntimeError where they have overwritten older ones: where a ring is full and nothing was recorded.
        """
        # Prompt lookup counts in tensors.
        kept = int(tokens_to_remove)
        remove = -kept if kept <= 0 else max(self._seen - kept, 0)
        if self._recorded:
            self._commit(remove)
        elif remove and any(self._seen > int(ring.layout.slots.min()) for ring in self.rings):
            raise RuntimeError(
                "tokens were overwritten in a full ring and cannot be taken back; call activate_past_recording() before they come"
            )
        self.lengths -= remove
        self._seen -= remove

    def _commit(self, remove: int) -> None:
        assert self._recorded is not None
        columns = self._recorded[0][0].shape[2] - remove
        if columns < 0:
            raise RuntimeError(f"{remove} tokens are to be taken back, {columns + remove} were recorded")
        for ring, (key, value) in zip(self.rings, self._recorded, strict=True):
            if columns:
                lengths, padding = (x.to(key.device) for x in (self.lengths - remove, self._padding))
                ring_write(key[:, :, :columns], value[:, :, :columns], ring, lengths, padding)
        self._recorded = []

    # --- one forward pass

    def _begin(self, call: AttentionCall, tokens: int) -> None:
        """What is the same for all layers of a forward pass."""
        if not self._counts:
            self.lengths += 1
            return
        mask, batch, device = call.mask, len(call.query), call.query.device
        self._is_first = self._seen == 0
        if self._is_void or (mask.explicit is not None and not self._is_first):
            raise ValueError("a mask of one's own needs a cache that keeps everything: pass past_key_values=DynamicCache()")
        # A single pass may have one; what it would leave here cannot be gone on from.
        self._is_void = mask.explicit is not None
        if self._is_first:
            self._capacity = max(self._capacity, self._spans.fixed or 0, tokens)
            self._capacity += 0 if self._capacity > tokens or self._spans.fixed else ROOM
            self._layouts = layer_layouts(self._spans.plan, self._spans.fixed or tokens, self._capacity)
            self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
            self.rings = []
        self._seen += tokens
        padding, self._order = _padding(mask, tokens, self.lengths)
        if self._recorded:
            if mask.real is not None and bool(padding.any()):
                raise ValueError("padding between recorded tokens: assisted generation takes rows without padding")
        else:
            self._padding = padding
        # In place, so that a captured graph counts on by itself.
        self.lengths += tokens - padding
        if self._seen > self._capacity:
            self._capacity = max(self._seen + ROOM, self._capacity + self._capacity // 4)
            for ring in self.rings:
                if not ring.layout.is_closed:
                    ring.grow(self._capacity)

    def _allocate(self, layer: int, call: AttentionCall) -> None:
        self.rings.append(RingLayer(self._layouts[layer], len(call.key), call.key.shape[3], call.key.dtype, call.key.device))

    def _keep(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        if self._recorded is None:
            lengths, padding = (x.to(key.device) for x in (self.lengths, self._padding))
            ring_write(key, value, self.rings[layer], lengths, padding)
        elif len(self._recorded) == layer:
            self._recorded.append((key, value))
        else:
            before = self._recorded[layer]
            self._recorded[layer] = (torch.cat([before[0], key], dim=2), torch.cat([before[1], value], dim=2))

    def _schedule_of(self, layer: int) -> DecodeSchedule | None:
        """For one token a row; layers of one layout share it."""
        if not self._counts:
            return self._dealt[layer]
        slots = self.rings[layer].layout.slots
        name = (len(self.lengths), *slots.tolist())
        if name not in self._schedules:
            self._schedules[name] = new_schedule(self.rings[layer], len(self.lengths))
        return self._schedules[name]


class _Layer(CacheLayerMixin):
    """What transformers asks a layer of a cache; the cache answers."""

    is_sliding = False
    is_croppable = True

    def __init__(self, cache: RingCache, layer: int) -> None:
        super().__init__()
        self._cache, self._layer = cache, layer

    @property
    def batch_size(self) -> int:
        return self._cache.batch_size

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        pass

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return self._cache.update(key_states, value_states, self._layer)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self._cache.get_seq_length()

    def get_max_length(self) -> int:
        return -1


def _padding(mask: KeyMask, tokens: int, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """How many of the new columns are padding, int32 (batch,), and the order that brings it to the left, None where it is there."""
    if mask.real is None:
        return torch.zeros_like(lengths), None
    real = mask.real[:, -tokens:]
    padding = (tokens - real.sum(dim=1)).to(torch.int32)
    if tokens == 1 or not bool((real[:, :-1] & ~real[:, 1:]).any()):
        return padding, None
    return padding, real.int().argsort(dim=1, stable=True)


def _ordered(x: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    """`x` (batch, heads, tokens, head_dim) with each row's tokens in `order` (batch, tokens)."""
    return x if order is None else x.gather(2, order.to(x.device)[:, None, :, None].expand_as(x))
