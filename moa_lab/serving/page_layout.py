"""Which pages of a paged KV cache a request takes under a plan, and where each lies in the request's block table.

A page holds the keys and values of `page_tokens` tokens of one KV head of one layer, and all heads of all layers take their pages from
one pool. A head has the slots of `moa_lab.cache.LayerLayout`: first the sink, then a ring for the window. Slots are cut into pages in
their order, and a head takes a page when the first token comes to lie in it; a head whose ring is full takes no more. So what a request
holds depends only on its number of tokens, and its block table is written once, from front to back: step j of the table has the
page j of every head that has one.

Heads that store other bits have pages of as many bytes, which hold another number of tokens: each kind of head has steps of its own, and
the table has the steps of all kinds in the order in which tokens need them.

Where spans grow with the length, requests of other lengths have other windows. Lengths are taken in buckets: all that share a bucket have
the windows of its greatest length, and the first column of a block table, before the pages, is the bucket of the request.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from moa_lab.cache import LayerLayout, layer_layouts
from moa_lab.plan import WHOLE_BITS, Bits, Plan

PAGE_TOKENS = 64
"""Tokens of a page unless the engine is told otherwise: spans are mostly multiples of it."""
BUCKETS = 64
"""Most lengths that a server keeps layouts for."""


@dataclass(frozen=True)
class PageLayout:
    """Pages of heads of one kind. layers: of every layer, the slots of its heads, with room for the longest request. page_tokens: slots per
    page. bits: of what they store. heads: of every layer those of this kind; empty: all of all layers. at_least: places of every step of
    the table, where devices share a table and another one has more heads with that page (see `moa_lab.serving.shares`)."""

    layers: tuple[LayerLayout, ...]
    page_tokens: int
    bits: Bits = WHOLE_BITS
    heads: tuple[tuple[int, ...], ...] = ()
    at_least: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.page_tokens < 1 or not self.layers:
            raise ValueError(f"a page layout needs layers and at least 1 token per page, got {len(self.layers)} and {self.page_tokens}")

    @cached_property
    def most_pages(self) -> np.ndarray:
        """Pages that a head takes at most: int64 (layers, kv_heads); none of another kind."""
        slots = np.stack([layer.slots for layer in self.layers])
        found: np.ndarray = -(-slots // self.page_tokens)
        for row, heads in zip(found, self.heads, strict=False):
            row[[head for head in range(len(row)) if head not in heads]] = 0
        return found

    @cached_property
    def having(self) -> np.ndarray:
        """Heads that have a page j: int64 (steps,)."""
        counts = np.bincount(self.most_pages.ravel())
        found: np.ndarray = self.most_pages.size - np.cumsum(counts)[:-1]
        return found

    @cached_property
    def steps(self) -> np.ndarray:
        """Pages of a request after so many steps of its table: int64 (steps + 1,), from 0 to all that it may take."""
        count = max(len(self.having), len(self.at_least))
        own, others = (np.pad(each, (0, count - len(each))) for each in (self.having, np.array(self.at_least, dtype=np.int64)))
        return np.concatenate([[0], np.cumsum(np.maximum(own, others))])

    @cached_property
    def ranks(self) -> np.ndarray:
        """Place of a head within every step of the table: int64 (layers, kv_heads).

        Heads with more pages come first, so that a head keeps its place when others have none left.
        """
        order = np.argsort(-self.most_pages.ravel(), kind="stable")
        found = np.empty_like(order)
        found[order] = np.arange(len(order))
        return found.reshape(self.most_pages.shape)

    def pages_for(self, n_tokens: int) -> int:
        """Pages of a request of `n_tokens`, all heads together."""
        return int(self.steps[min(-(-n_tokens // self.page_tokens), len(self.steps) - 1)])

    @property
    def kinds(self) -> tuple[tuple[PageLayout, np.ndarray], ...]:
        """Of every kind of heads its pages, and where in the table the steps of these begin: int64 (steps + 1,)."""
        return ((self, self.steps),)

    def columns(self, layer: int, kv_head: int) -> np.ndarray:
        """Where the pages of a head lie in a request's block table, in order: int64 (most pages,)."""
        return self.steps[: self.most_pages[layer, kv_head]] + self.ranks[layer, kv_head]


@dataclass(frozen=True)
class MixedLayout:
    """Pages of heads of several kinds, which share a table."""

    of_kinds: tuple[PageLayout, ...]

    @cached_property
    def kinds(self) -> tuple[tuple[PageLayout, np.ndarray], ...]:
        """As `PageLayout.kinds`."""
        return tuple((kind, self._begin(at, kind)) for at, kind in enumerate(self.of_kinds))

    def _begin(self, at: int, kind: PageLayout) -> np.ndarray:
        """Where the steps of a kind begin. Of steps that are needed at the same token, those of the first kinds come first."""
        others = [
            sum(other.pages_for(page * kind.page_tokens + (earlier < at)) for earlier, other in enumerate(self.of_kinds) if earlier != at)
            for page in range(len(kind.steps))
        ]
        found: np.ndarray = kind.steps + np.array(others)
        return found

    def pages_for(self, n_tokens: int) -> int:
        """As `PageLayout.pages_for`."""
        return sum(kind.pages_for(n_tokens) for kind in self.of_kinds)


AnyLayout = PageLayout | MixedLayout


@dataclass(frozen=True)
class PageShape:
    """What the pages of a plan's heads hold. nbytes: of every page; tokens: of a page, by the bits of its K and V. untouched: bytes of a
    page as an engine has it, of numbers of the model's own type."""

    nbytes: int
    tokens: dict[Bits, int]
    untouched: int


def page_layout(
    plan: Plan, n_tokens: int, max_tokens: int, page_tokens: int = PAGE_TOKENS, tokens: Mapping[Bits, int] | None = None
) -> AnyLayout:
    """The pages of requests of up to `max_tokens`, under the windows that `plan` has at length N = `n_tokens`.

    tokens: of a page, by what it stores (see `PageShape`); None: `page_tokens` in all.
    """
    layers = tuple(layer_layouts(plan, n_tokens, max_tokens))
    return layout_of(layers, plan.bits, tokens) if tokens else PageLayout(layers, page_tokens)


def layout_of(layers: tuple[LayerLayout, ...], bits: Sequence[Sequence[Bits]], tokens: Mapping[Bits, int]) -> AnyLayout:
    """Pages of heads that store `bits`, by layer and KV head, in pages of so many tokens. bits: empty where all store alike."""
    if len(tokens) == 1:
        ((alike, count),) = tokens.items()
        return PageLayout(layers, count, alike)
    kinds = [
        PageLayout(layers, count, kind, tuple(tuple(head for head, own in enumerate(row) if own == kind) for row in bits))
        for kind, count in tokens.items()
    ]
    return MixedLayout(tuple(kinds))


@dataclass(frozen=True, eq=False)
class LayerPages:
    """Heads of one layer that store the same bits, in requests of every bucket. heads: which; layouts: their slots by bucket. ranks: int64
    (buckets, heads); steps: int64 (buckets, steps + 1), where in the table the steps of their kind begin."""

    heads: tuple[int, ...]
    bits: Bits
    page_tokens: int
    layouts: tuple[LayerLayout, ...]
    ranks: np.ndarray
    steps: np.ndarray


@dataclass(frozen=True)
class RequestPages:
    """The pages of requests of any length. lengths: the greatest of every bucket, rising; layouts: of every bucket, of the same kinds."""

    lengths: tuple[int, ...]
    layouts: tuple[AnyLayout, ...]

    def __post_init__(self) -> None:
        if not self.lengths or len(self.lengths) != len(self.layouts) or list(self.lengths) != sorted(set(self.lengths)):
            raise ValueError(f"buckets need rising lengths and a layout for each, got {self.lengths} and {len(self.layouts)} layouts")

    def of_layer(self, layer: int) -> tuple[LayerPages, ...]:
        """The heads of a layer, by kind."""
        found = []
        for alike in zip(*(layout.kinds for layout in self.layouts), strict=True):
            kind = alike[0][0]
            heads = kind.heads[layer] if kind.heads else tuple(range(len(kind.layers[layer].windows)))
            if heads:
                layers = (each.layers[layer] for each, _ in alike)
                layouts = tuple(replace(own, windows=tuple(own.windows[head] for head in heads)) for own in layers)
                ranks = np.stack([each.ranks[layer, list(heads)] for each, _ in alike])
                most = max(len(begin) for _, begin in alike)
                steps = np.stack([np.pad(begin, (0, most - len(begin)), mode="edge") for _, begin in alike])
                found.append(LayerPages(heads, kind.bits, kind.page_tokens, layouts, ranks, steps))
        return tuple(found)

    @property
    def layers(self) -> int:
        """Of the model."""
        return len(self.layouts[0].kinds[0][0].layers)

    def bucket(self, n_tokens: int) -> int:
        """The bucket of a request that will have `n_tokens`: the first that is no shorter, or the last."""
        return min(bisect_left(self.lengths, n_tokens), len(self.lengths) - 1)

    def most_pages(self, max_tokens: int) -> int:
        """Pages that a request takes at most, when requests have up to `max_tokens`."""
        greatest = [min(length, max_tokens) for length in self.lengths[:-1]] + [max_tokens]
        return max(layout.pages_for(length) for layout, length in zip(self.layouts, greatest, strict=True))


def bucket_lengths(max_tokens: int, page_tokens: int = PAGE_TOKENS) -> tuple[int, ...]:
    """The greatest lengths of at most `BUCKETS` buckets for requests of up to `max_tokens`: whole pages apart, the last of `max_tokens`."""
    step = -(-max_tokens // (BUCKETS * page_tokens)) * page_tokens
    return (*range(step, max_tokens, step), max_tokens)


def request_pages(
    plan: Plan, lengths: tuple[int, ...], max_tokens: int, page_tokens: int = PAGE_TOKENS, tokens: Mapping[Bits, int] | None = None
) -> RequestPages:
    """The pages of requests of up to `max_tokens`, under the windows that `plan` has at the length of their bucket; as `page_layout`."""
    return RequestPages(lengths, tuple(page_layout(plan, n_tokens, max_tokens, page_tokens, tokens) for n_tokens in lengths))
