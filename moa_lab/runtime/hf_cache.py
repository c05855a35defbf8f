"""A transformers cache over the rings: what no head of the plan will see again is not kept, and not allocated."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from moa_lab.cache import LayerLayout, RingLayer, layer_layouts, ring_layer
from moa_lab.interface import AttentionCall
from moa_lab.kernels.dispatch import new_schedule, ring_attention, ring_write, span_attention
from moa_lab.kernels.schedule import DecodeSchedule
from moa_lab.runtime.attention import ELSEWHERE, SpanAttention
from moa_lab.runtime.cache_layers import LayerView, WholeCache
from moa_lab.runtime.columns import ordered, padding_of
from moa_lab.runtime.turns import Turns

ROOM = 256
"""Tokens that there is room for beyond what came, where nothing says how many will come."""


class RingCache(WholeCache):
    """The KV cache of one batch under a plan; made inside `apply_plan` wherever transformers would make a cache, or by `ring_cache`.

    spans: the plan in force. capacity: tokens that rows will reach, prompt and new; more are taken, and
    cost a copy. Spans of elastic rules are those of the plan's length N, or else of the first prompt's, and stay.

    Rows may be padded anywhere: padding is never stored, so a row holds what it would alone. `copy.copy` and `copy.deepcopy` make a
    cache of its own under the same plan. Raises RuntimeError when used outside the plan that made it, after a pass that failed half-way,
    when copied in the middle of a pass, and when pickled or offloaded; ValueError when it goes on after a mask of one's own, or with
    one, or with another number of rows.
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
        self._turns: Turns | None = None
        # The layer whose attention comes next: anything but 0 between two passes means that one failed.
        self._next = 0
        # Padding of every row before its first token, where that is all the padding it has; -1 where it is not.
        self._front = torch.zeros(0, dtype=torch.int32)
        super().__init__(layers=[LayerView(self, layer) for layer in range(spans.plan.geometry.layers)])

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

    def in_turn(self, groups: Sequence[slice]) -> Iterator[slice]:
        """Every group of rows, one after another: until the next one passes bring the first tokens to its rows alone, the same number of
        columns to each; all rows together go on afterwards.

        groups: consecutive, from row 0 on. Long prompts of many rows so need no chunks, which cost more than whole prompts do. There must
        be room for all tokens. Raises RuntimeError for a cache that holds or records tokens.
        """
        if self._seen or self._recorded is not None:
            raise RuntimeError("rows come in turn to an empty cache that records nothing")
        turns = self._turns = Turns(groups[-1].stop)
        try:
            for rows in groups:
                turns.rows, self._seen = rows, 0
                yield rows
                turns.end(self.lengths, self._padding, self._front)
        finally:
            self._turns, self.rings = None, turns.rings
        self.lengths, self._padding, self._front = turns.all()

    @property
    def is_decoding(self) -> bool:
        """True within `decoding`."""
        return not self._counts

    def came(self, columns: int) -> None:
        """Count the columns that came while decoding."""
        self._seen += columns

    @property
    def batch_size(self) -> int:
        """Rows; -1 before the first tokens came."""
        return len(self.lengths) or -1

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hands the new tokens' keys and values on to the attention, which finds the others here."""
        self._spans.arrive(self, key_states, layer_idx)
        return key_states, value_states

    def attend(self, layer: int, call: AttentionCall) -> torch.Tensor:
        """Attention of one layer to all that its heads keep and to the new tokens, which are kept from here on."""
        if layer == 0:
            self._begin(call, call.query.shape[2])
        self._next = layer + 1
        found = self._attend(layer, call)
        self._next %= len(self.layers)
        return found

    def _attend(self, layer: int, call: AttentionCall) -> torch.Tensor:
        tokens = call.query.shape[2]
        if self._is_first:
            layout = self._layouts[layer]
            windows = np.array(layout.windows)
            seen = self._spans.as_stored(layer, call.key, call.value)
            found = span_attention(call.query, *seen, call.mask, layout.sink_tokens, windows, call.scale, call.softcap, call.sink_logits)
            if not self._is_void:
                self._allocate(layer, call)
                self._keep(layer, ordered(call.key, self._order), ordered(call.value, self._order))
            return found
        ring = self.rings[layer]
        query, key, value = (ordered(x, self._order) for x in (call.query, call.key, call.value))
        keep = self._recorded is None
        if self._recorded is not None:
            self._keep(layer, key, value)
            key, value = self._recorded[layer]
        schedule = self._schedule_of(layer) if keep and tokens == 1 else None
        # A model may be spread over several devices, a layer here and a layer there.
        lengths, padding = (x.to(query.device) for x in (self.lengths, self._padding))
        found = ring_attention(
            query, key, value, ring, lengths, padding, call.scale, call.softcap, call.sink_logits, schedule=schedule, keep=keep
        )
        return found if self._order is None else ordered(found, self._order.argsort(dim=1))

    def check_owner(self, spans: SpanAttention) -> None:
        """Raises RuntimeError where `spans` is not what this cache was made under."""
        self._spans.check_active()
        if self._spans is not spans:
            raise RuntimeError(ELSEWHERE)

    # --- copies

    def __deepcopy__(self, memo: dict[int, Any]) -> RingCache:
        """A cache that goes on as this one would; neither changes the other. Only the plan in force is shared."""
        if self._next or not self._counts:
            raise RuntimeError("a ring cache cannot be copied in the middle of a pass or of a decode loop: copy it before or afterwards")
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        memo[id(self._spans)] = self._spans
        # Schedules are never written, and a recorded key may hang on a graph, which no deep copy follows.
        shared: dict[str, Any] = {"_schedules": dict(self._schedules), "_dealt": list(self._dealt)}
        if self._recorded is not None:
            shared["_recorded"] = [(key.detach().clone(), value.detach().clone()) for key, value in self._recorded]
        vars(twin).update({name: copy.deepcopy(value, memo) for name, value in vars(self).items() if name not in shared} | shared)
        return twin

    def __copy__(self) -> RingCache:
        """As a deep copy: two caches that share rings would overwrite each other's tokens."""
        return copy.deepcopy(self)

    # --- rows

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep, drop, repeat or reorder rows."""
        if not self._seen:
            return
        rows = torch.as_tensor(indices).flatten()
        if rows.dtype == torch.bool:
            rows = torch.arange(len(self.lengths), device=rows.device)[rows]
        # Counted from the end, without a host synchronisation.
        rows = torch.where(rows < 0, rows + len(self.lengths), rows)
        for ring in self.rings:
            ring.select(rows)
        self.lengths, self._padding, self._front = (
            x.index_select(0, rows.to(x.device)) for x in (self.lengths, self._padding, self._front)
        )
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
        self.rings, self._recorded, self._seen, self._is_void, self._next = [], None, 0, False, 0
        self.lengths, self._front = (torch.zeros(0, dtype=torch.int32) for _ in range(2))

    # --- taking tokens back

    def activate_past_recording(self) -> None:
        """From here on tokens overwrite nothing before `crop` says which of them stay (assisted generation)."""
        self._recorded = self._recorded if self._recorded is not None else []

    def crop(self, tokens_to_remove: int | torch.Tensor) -> None:
        """Take the newest -`tokens_to_remove` tokens back; a positive number is the number of tokens to keep.

        Raises RuntimeError where they have overwritten older ones: where a ring is full and nothing was recorded; and where padding
        lies between tokens, so that a row has fewer to take back than another.
        """
        # Prompt lookup counts in tensors.
        kept = int(tokens_to_remove)
        remove = min(-kept, self._seen) if kept <= 0 else max(self._seen - kept, 0)
        if remove and not torch.equal(self.lengths + self._front, torch.full_like(self.lengths, self._seen)):
            raise RuntimeError("tokens cannot be taken back where rows have padding between their tokens: run the rows one by one")
        if self._recorded:
            self._commit(remove)
        elif remove and any(self._seen > int(ring.layout.slots.min()) for ring in self.rings):
            raise RuntimeError(
                "tokens were overwritten in a full ring and cannot be taken back; call activate_past_recording() before they come"
            )
        # A row that began later has fewer.
        self.lengths.sub_(remove).clamp_(min=0)
        self._seen -= remove
        self._front.clamp_(max=self._seen)

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
        if self._next:
            raise RuntimeError("a pass over this cache failed half-way, and layers differ in what they hold: reset() it, or make a new one")
        self._is_first = self._seen == 0
        if self._is_void or (mask.explicit is not None and not self._is_first):
            raise ValueError("a mask of one's own needs a cache that keeps everything: pass past_key_values=DynamicCache()")
        if self._is_first:
            self._capacity = max(self._capacity, self._spans.fixed or 0, tokens)
            self._capacity += 0 if self._capacity > tokens or self._spans.fixed else ROOM
            self._layouts = layer_layouts(self._spans.plan, self._spans.fixed or tokens, self._capacity)
            self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
            self.rings = []
        elif batch != len(self.lengths):
            raise ValueError(f"{batch} rows over a cache of {len(self.lengths)}: batch_repeat_interleave or batch_select_indices it first")
        # A single pass may have one; what it would leave here cannot be gone on from.
        self._is_void = mask.explicit is not None
        padding, order = padding_of(mask, tokens, self.lengths)
        if self._recorded:
            if mask.real is not None and bool(padding.any()):
                raise ValueError("padding between recorded tokens: assisted generation takes rows without padding")
        else:
            self._padding = padding
        if self._is_first:
            self._front = padding.clone() if order is None else torch.full_like(padding, -1)
        self._order = order
        self._seen += tokens
        # In place, so that a captured graph counts on by itself.
        self.lengths += tokens - padding
        if self._seen > self._capacity:
            self._capacity = max(self._seen + ROOM, self._capacity + self._capacity // 4)
            for ring in self.rings:
                ring.grow(self._capacity)

    def _allocate(self, layer: int, call: AttentionCall) -> None:
        key, bits = call.key, self._spans.plan.bits_of(layer)

        def make(batch: int) -> RingLayer:
            return ring_layer(self._layouts[layer], batch, key.shape[3], key.dtype, key.device, bits)

        self.rings.append(make(len(key)) if self._turns is None else self._turns.ring(layer, make))

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
        """For one token a row; layers of one layout and equal bits share it."""
        if not self._counts:
            return self._dealt[layer]
        ring = self.rings[layer]
        name = (len(self.lengths), ring.most_bits, *ring.layout.slots.tolist())
        if name not in self._schedules:
            self._schedules[name] = new_schedule(ring, len(self.lengths))
        return self._schedules[name]
