"""What a pool of pages holds: K and V of one head a page, as numbers, or as codes on a grid of each token's own.

Every page holds the K of its tokens, then their V; in fewer bits the codes of all tokens and then their grids (`moa_lab.cache.storage`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from moa_lab.cache.storage import pack, places, unpack, values_at
from moa_lab.plan import Plan, mix_of
from moa_lab.plan.bits import GRID_BYTES, UNTOUCHED, Bits, vector_bytes

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
    def is_untouched(self) -> bool:
        """True where K and V are numbers of the model's own type."""
        return min(self.bits) == UNTOUCHED

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


def page_bits(plan: Plan) -> Bits:
    """The bits of all heads' K and V. Raises ValueError where heads differ: pages that all heads take are of one size."""
    try:
        return mix_of(plan)
    except ValueError:
        raise ValueError(
            f"all heads take pages of one size, and plan {plan.name!r} stores heads in different bits: {', '.join(plan.stored_text())}"
        ) from None
