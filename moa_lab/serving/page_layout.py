"""Which pages of a paged KV cache a request takes under a plan, and where each lies in the request's block table.

A page holds the keys and values of `page_tokens` tokens of one KV head of one layer, and all heads of all layers take their pages from
one pool. A head has the slots of `moa_lab.cache.LayerLayout`: first the sink, then a ring for the window. Slots are cut into pages in
their order, and a head takes a page when the first token comes to lie in it; a head whose ring is full takes no more. So what a request
holds depends only on its number of tokens, and its block table is written once, from front to back: step j of the table has the
page j of every head that has one.

Where spans grow with the length, requests of other lengths have other windows. Lengths are taken in buckets: all that share a bucket have
the windows of its greatest length, and the first column of a block table, before the pages, is the bucket of the request.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from moa_lab.cache import LayerLayout, layer_layouts
from moa_lab.plan import Plan

PAGE_TOKENS = 64
"""Tokens of a page unless the engine is told otherwise: spans are mostly multiples of it."""
BUCKETS = 64
"""Most lengths that a server keeps layouts for."""


@dataclass(frozen=True)
class PageLayout:
    """layers: of every layer, the slots of its heads, with room for the longest request. page_tokens: slots per page."""

    layers: tuple[LayerLayout, ...]
    page_tokens: int

    def __post_init__(self) -> None:
        if self.page_tokens < 1 or not self.layers:
            raise ValueError(f"a page layout needs layers and at least 1 token per page, got {len(self.layers)} and {self.page_tokens}")

    @cached_property
    def most_pages(self) -> np.ndarray:
        """Pages that a head takes at most: int64 (layers, kv_heads)."""
        slots = np.stack([layer.slots for layer in self.layers])
        found: np.ndarray = -(-slots // self.page_tokens)
        return found

    @cached_property
    def steps(self) -> np.ndarray:
        """Pages of a request after so many steps of its table: int64 (steps + 1,), from 0 to all that it may take."""
        counts = np.bincount(self.most_pages.ravel())
        # Step j has the heads with more than j pages.
        having = self.most_pages.size - np.cumsum(counts)[:-1]
        return np.concatenate([[0], np.cumsum(having)])

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

    def columns(self, layer: int, kv_head: int) -> np.ndarray:
        """Where the pages of a head lie in a request's block table, in order: int64 (most pages,)."""
        return self.steps[: self.most_pages[layer, kv_head]] + self.ranks[layer, kv_head]


def page_layout(plan: Plan, n_tokens: int, max_tokens: int, page_tokens: int = PAGE_TOKENS) -> PageLayout:
    """The pages of requests of up to `max_tokens`, under the windows that `plan` has at length N = `n_tokens`."""
    return PageLayout(tuple(layer_layouts(plan, n_tokens, max_tokens)), page_tokens)


@dataclass(frozen=True)
class RequestPages:
    """The pages of requests of any length. lengths: the greatest of every bucket, rising; layouts: of every bucket, of one page size."""

    lengths: tuple[int, ...]
    layouts: tuple[PageLayout, ...]

    def __post_init__(self) -> None:
        if not self.lengths or len(self.lengths) != len(self.layouts) or list(self.lengths) != sorted(set(self.lengths)):
            raise ValueError(f"buckets need rising lengths and a layout for each, got {self.lengths} and {len(self.layouts)} layouts")

    @property
    def page_tokens(self) -> int:
        """Slots per page."""
        return self.layouts[0].page_tokens

    @cached_property
    def steps(self) -> np.ndarray:
        """`PageLayout.steps` of every bucket, the last one repeated up to the longest: int64 (buckets, steps + 1)."""
        most = max(len(each.steps) for each in self.layouts)
        return np.stack([np.pad(each.steps, (0, most - len(each.steps)), mode="edge") for each in self.layouts])

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


def request_pages(plan: Plan, lengths: tuple[int, ...], max_tokens: int, page_tokens: int = PAGE_TOKENS) -> RequestPages:
    """The pages of requests of up to `max_tokens`, under the windows that `plan` has at the length of their bucket."""
    return RequestPages(lengths, tuple(page_layout(plan, n_tokens, max_tokens, page_tokens) for n_tokens in lengths))
