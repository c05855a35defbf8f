"""Keys and values of a plan's heads in pages, written and read through block tables; attention over them.

Kernels do it where they run (`paged_kernels`); plain PyTorch, their reference, elsewhere. Page 0 belongs to nobody: it is never written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from moa_lab.cache.storage import heads_as_stored
from moa_lab.kernels.dispatch import kernel_applies
from moa_lab.kernels.reference import masked_attention
from moa_lab.masks import visible
from moa_lab.serving.head_slots import HeadSlots
from moa_lab.serving.page_layout import LayerPages, RequestPages
from moa_lab.serving.page_pool import PagePool
from moa_lab.serving.step import Scoring, Step

if TYPE_CHECKING:
    from moa_lab.serving.paged_kernels import PagedKernels


LEAST_TILE = 16
"""Pages of a multiple of so many tokens are read by kernels: the fewest keys that they multiply with."""


class LayerHeads:
    """Where heads of one kind have their slots in a layer, in requests of every bucket. slots: of several layers, of which this is the
    `index`-th."""

    def __init__(self, pages: LayerPages, device: torch.device, slots: HeadSlots | None = None, index: int = 0) -> None:
        self.slots, self.index = slots or HeadSlots([pages], device), index
        self._pages, self._device = pages, device

    @cached_property
    def kernels(self) -> PagedKernels:
        """These heads as kernels want them told."""
        # Imported here: Triton may be missing.
        from moa_lab.serving.paged_kernels import PagedKernels

        return PagedKernels(self._pages, self._device)

    @cached_property
    def heads(self) -> torch.Tensor:
        """Which of the layer's KV heads these are: int64."""
        return torch.tensor(self._pages.heads, device=self._device)

    @property
    def columns(self) -> int:
        """Of the block table of a request, as many as hold all pages of these heads."""
        return int(self._pages.steps.max() + self._pages.ranks.max()) + 1

    @property
    def capacity(self) -> int:
        """Tokens of the longest request."""
        return min(layout.capacity for layout in self._pages.layouts)

    def pool(self, raw: torch.Tensor, head_dim: int, dtype: torch.dtype) -> PagePool:
        """An engine's buffer as these heads use it."""
        return PagePool(raw, self._pages.page_tokens, head_dim, dtype, self._pages.bits)

    def write(self, pool: PagePool, key: torch.Tensor, value: torch.Tensor, step: Step) -> None:
        """Write the new tokens: key, value (tokens, kv_heads, head_dim)."""
        pages, slots, chosen = self.slots.of_pass(step).written
        mask = chosen[self.index]
        for part, given in enumerate((key, value)):
            pool.write(part, pages[self.index], slots[self.index], given.flatten(0, 1) if mask is None else given[mask])


def paged_layers(pages: RequestPages, device: torch.device) -> list[list[LayerHeads]]:
    """The heads of all layers, by kind; where there is one, a pass is worked out for all layers together."""
    layers = [pages.of_layer(layer) for layer in range(pages.layers)]
    if len(pages.layouts[0].kinds) > 1:
        return [[LayerHeads(alike, device) for alike in kinds] for kinds in layers]
    slots = HeadSlots([alike for (alike,) in layers], device)
    return [[LayerHeads(alike, device, slots, layer)] for layer, (alike,) in enumerate(layers)]


def layer_attention(
    kinds: Sequence[LayerHeads], raw: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    step: Step, scoring: Scoring,
) -> torch.Tensor:  # fmt: skip
    """`paged_attention` of all heads of a layer. raw: the engine's buffer, a page a row."""
    head_dim, group = key.shape[2], query.shape[1] // key.shape[1]
    if len(kinds) == 1:
        return paged_attention(kinds[0], kinds[0].pool(raw, head_dim, key.dtype), query, key, value, step, scoring)
    output = torch.empty_like(query)
    for alike in kinds:
        asking = _query_heads(alike.heads, group)
        sinks = None if scoring.sink_logits is None else scoring.sink_logits[asking]
        output[:, asking] = paged_attention(
            alike, alike.pool(raw, head_dim, key.dtype), query[:, asking], key[:, alike.heads], value[:, alike.heads],
            step, replace(scoring, sink_logits=sinks),
        )  # fmt: skip
    return output


def paged_attention(
    layer: LayerHeads, pool: PagePool, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, step: Step, scoring: Scoring
) -> torch.Tensor:
    """Attention of the new tokens to what their heads hold and to one another: (tokens, query_heads, head_dim). They are kept from here on.

    query: (tokens, query_heads, head_dim); key, value: (tokens, kv_heads, head_dim). A token is seen as it is stored.
    """
    if pool.page_tokens % LEAST_TILE == 0 and kernel_applies(query, key, value):
        return layer.kernels.attend(pool, query, key, value, step, scoring)
    output = torch.empty_like(query)
    # Before they are written: in a full ring they take the place of tokens that the first of them still see.
    for row in step.several:
        part = slice(*step.told[0][row : row + 2])
        output[part] = _chunk(layer, pool, query[part], key[part], value[part], step, row, scoring)
    layer.write(pool, key, value, step)
    if not step.several:
        _newest(layer, pool, query, output, step, scoring)
    elif len(step.single):
        tokens = step.firsts[step.single]
        found = torch.empty_like(query[tokens])
        _newest(layer, pool, query[tokens], found, step, scoring)
        output[tokens] = found
    return output


def _chunk(
    layer: LayerHeads, pool: PagePool, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    step: Step, row: int, scoring: Scoring,
) -> torch.Tensor:  # fmt: skip
    """Of one row's new tokens, which are not yet written."""
    slots, index, kv_heads = layer.slots, layer.index, key.shape[1]
    group, reach = query.shape[1] // kv_heads, slots.reaches[index]
    new = torch.arange(len(query), device=query.device) + (step.told[1][row] - len(query))
    # (1, kv_heads, tokens, head_dim)
    given_key, given_value = heads_as_stored(key.transpose(0, 1)[None], value.transpose(0, 1)[None], [pool.bits] * kv_heads)
    windows = slots.windows[index, step.buckets[row]]
    past = slots.of_pass(step).past(row)
    output = torch.empty_like(query)
    for most, alike in {0: list(range(kv_heads))}.items() if past is None else past.alike[index].items():
        heads = torch.tensor(alike, device=query.device)
        seen_key, seen_value, positions = given_key[:, heads], given_value[:, heads], new.expand(1, len(alike), -1)
        if past is not None:
            held = past.positions[index][:, heads, : most * slots.page_tokens]
            kept_key, kept_value = (
                pool.read(part, past.pages[index][:, heads, :most]).flatten(2, 3).masked_fill_((held < 0)[..., None], 0) for part in (0, 1)
            )
            seen_key, seen_value = torch.cat([kept_key, seen_key], dim=2), torch.cat([kept_value, seen_value], dim=2)
            positions = torch.cat([held, positions], dim=2)
        known, asked = positions[:, :, None], new[None, None, :, None]
        shown = visible(asked, known, slots.sink_tokens, windows[heads][None, :, None, None]) & (known >= 0)
        shown = shown if reach is None else shown & (asked - known < reach)
        asking = _query_heads(heads, group)
        sinks = None if scoring.sink_logits is None else scoring.sink_logits[asking]
        found = masked_attention(
            query[:, asking].transpose(0, 1)[None], seen_key, seen_value,
            shown.repeat_interleave(group, dim=1), scoring.scale, scoring.softcap, sinks,
        )  # fmt: skip
        output[:, asking] = found[0].transpose(0, 1)
    return output


def _newest(layer: LayerHeads, pool: PagePool, query: torch.Tensor, output: torch.Tensor, step: Step, scoring: Scoring) -> None:
    """Of one new token a row, already written, into `output`: both (rows, query_heads, head_dim)."""
    found, index = layer.slots.of_pass(step), layer.index
    pages, shown, empty = found.held.pages[index], found.shown[index], found.empty[index]
    kv_heads = pages.shape[1]
    group = query.shape[1] // kv_heads
    # The query heads of a KV head take the place of its query tokens.
    asked, answered = (x.unflatten(1, (kv_heads, group)) for x in (query, output))
    for most, alike in found.held.alike[index].items():
        count = most * layer.slots.page_tokens
        heads = slice(None) if len(alike) == kv_heads else torch.tensor(alike, device=query.device)
        key, value = (pool.read(part, pages[:, heads, :most]).flatten(2, 3).masked_fill_(empty[:, heads, :count], 0) for part in (0, 1))
        sinks = None if scoring.sink_logits is None else scoring.sink_logits.view(kv_heads, group, 1)[heads]
        answered[:, heads] = masked_attention(
            asked[:, heads], key, value, shown[:, heads, None, :count], scoring.scale, scoring.softcap, sinks
        )


def _query_heads(heads: torch.Tensor, group: int) -> torch.Tensor:
    """The query heads of KV heads, in their order."""
    return (heads[:, None] * group + torch.arange(group, device=heads.device)).flatten()
