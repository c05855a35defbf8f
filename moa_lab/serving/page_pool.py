"""What a pool of pages holds: K and V of one head a page, as numbers, or as codes on a grid of each token's own.

Every page holds the K of its tokens, then their V; in fewer bits the codes of all tokens and then their grids (`moa_lab.cache.storage`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch

from moa_lab.cache.storage import pack, places, unpack, values_at
from moa_lab.plan import WHOLE_BITS, Plan
from moa_lab.plan.bits import GRID_BYTES, UNTOUCHED, Bits, vector_bytes
from moa_lab.serving.page_layout import PageShape

GRAIN = 32
"""Tokens that pages of unequal heads have multiples of, so that kernels read as many at a time."""
LARGEST = 1.25
"""Pages of unequal heads are so much larger at most, if that leaves less of them unused."""

Part = tuple[int, int, int]
"""Of the K or V of a page: the bits, at which of its bytes they begin, and where their grids do (or would)."""


@dataclass(frozen=True)
class PagePool:
    """raw: the engine's buffer, contiguous, its first dimension the pages. page_tokens, head_dim: of a page. dtype: of the model's K and V.
    bits: of all heads' K and V."""

    raw: torch.Tensor
    page_tokens: int
    head_dim: int
    dtype: torch.dtype
    bits: Bits = (UNTOUCHED, UNTOUCHED)

    @property
    def parts(self) -> tuple[Part, Part]:
        """Where K and V lie in a page."""
        return _parts(self.page_tokens, self.head_dim, self.dtype.itemsize, self.bits)

    def write(self, part: int, pages: torch.Tensor, slots: torch.Tensor, values: torch.Tensor) -> None:
        """K (part 0) or V (1) of tokens, (tokens, head_dim), each to a page and a slot of it: int64 (tokens,)."""
        bits, first, grids = self.parts[part]
        if bits == UNTOUCHED:
            self._between(first, grids, self.dtype)[pages, slots] = values.to(self.dtype)
        else:
            where, low, step = places(values, bits)
            self._between(first, grids, torch.int32)[pages, slots] = pack(where, bits)
            self._grids(grids)[pages, slots] = torch.cat([low, step], dim=-1)

    def read(self, part: int, pages: torch.Tensor) -> torch.Tensor:
        """K or V of whole `pages`, int64 of any shape: (*pages.shape, page_tokens, head_dim)."""
        bits, first, grids = self.parts[part]
        # Rows of a matrix: copied whole, several times as fast as by index.
        found = self._between(first, grids, self.dtype if bits == UNTOUCHED else torch.int32).index_select(0, pages.flatten())
        if bits < UNTOUCHED:
            low, step = self._grids(grids).index_select(0, pages.flatten()).split(1, dim=-1)
            found = values_at(unpack(found, bits, self.head_dim), low, step, self.dtype)
        return found.view(*pages.shape, self.page_tokens, self.head_dim)

    def _between(self, first: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        """What lies between two bytes of every page: (pages, page_tokens, n)."""
        return self.raw.view(len(self.raw), -1).view(torch.int8)[:, first:stop].view(dtype).unflatten(1, (self.page_tokens, -1))

    def _grids(self, first: int) -> torch.Tensor:
        """Smallest values and steps: float16 (pages, page_tokens, 2)."""
        return self._between(first, first + self.page_tokens * GRID_BYTES, torch.float16)


@lru_cache(maxsize=64)
def _parts(page_tokens: int, head_dim: int, itemsize: int, bits: Bits) -> tuple[Part, Part]:
    (key, ends), (value, others) = (
        (page_tokens * vector_bytes(head_dim, each, itemsize), page_tokens * GRID_BYTES * (each < UNTOUCHED)) for each in bits
    )
    return (bits[0], 0, key - ends), (bits[1], key, key + value - others)


def page_bytes(page_tokens: int, head_dim: int, dtype: torch.dtype, bits: Bits = (UNTOUCHED, UNTOUCHED)) -> int:
    """Bytes of a page."""
    return page_tokens * sum(vector_bytes(head_dim, each, dtype.itemsize) for each in bits)


def page_shape(plan: Plan, page_tokens: int, dtype: torch.dtype) -> PageShape:
    """Pages of `page_tokens` where all heads store alike; of so many at least elsewhere, and of the size that leaves fewest bytes unused.

    dtype: of the model's K and V.
    """
    stored = Counter(pair for row in plan.bits for pair in row) or Counter({WHOLE_BITS: 1})
    return shape_of(stored, page_tokens, plan.geometry.head_dim, dtype)


def shape_of(stored: Mapping[Bits, int], page_tokens: int, head_dim: int, dtype: torch.dtype) -> PageShape:
    """As `page_shape`, for so many heads of each kind."""
    each = {bits: page_bytes(1, head_dim, dtype, bits) for bits in sorted(stored, reverse=True)}
    untouched = page_bytes(page_tokens, head_dim, dtype)
    least = page_tokens * max(each.values())
    if len(each) == 1:
        return PageShape(least, dict.fromkeys(each, page_tokens), untouched)
    grain = min(page_tokens & -page_tokens, GRAIN)
    # An engine takes K and V of a page for so many tokens of as many bytes each.
    sizes = {-(-nbytes // (2 * page_tokens)) * 2 * page_tokens for nbytes in (least, *_sizes(each, grain, least))}
    shapes = [
        PageShape(nbytes, {bits: nbytes // (grain * size) * grain for bits, size in each.items()}, untouched) for nbytes in sorted(sizes)
    ]
    return min(shapes, key=lambda shape: sum(count * shape.nbytes / shape.tokens[bits] for bits, count in stored.items()))


def _sizes(each: dict[Bits, int], grain: int, least: int) -> list[int]:
    """Sizes from `least` on, to a quarter more, that some heads fill."""
    return [
        grain * count * size
        for size in each.values()
        for count in range(-(-least // (grain * size)), int(LARGEST * least) // (grain * size) + 1)
    ]
