"""What a pool of pages holds: K and V of one head a page, as numbers, or as codes on a grid of each token's own.

Every page holds the K of its tokens, then their V; a vector in fewer bits is its codes and then its grid (`moa_lab.cache.storage`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moa_lab.cache.storage import pack, places, unpack, values_at
from moa_lab.plan import Plan, mix_of
from moa_lab.plan.bits import UNTOUCHED, Bits, code_words, vector_bytes


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
    def numbers(self) -> torch.Tensor:
        """Of an untouched pool: (pages, 2, page_tokens, head_dim)."""
        return self.raw.view(self.dtype).view(len(self.raw), 2, self.page_tokens, self.head_dim)

    def write(self, part: int, pages: torch.Tensor, slots: torch.Tensor, values: torch.Tensor) -> None:
        """K (part 0) or V (1) of tokens, (tokens, head_dim), each to a page and a slot of it: int64 (tokens,)."""
        if self.is_untouched:
            self.numbers[pages, part, slots] = values
        else:
            self._stored(part)[pages, slots] = self._words(values, self.bits[part])

    def read(self, part: int, pages: torch.Tensor) -> torch.Tensor:
        """K or V of whole `pages`, int64 of any shape: (*pages.shape, page_tokens, head_dim)."""
        if self.is_untouched:
            # Rows of a matrix: copied whole, several times as fast as by index.
            found = self.numbers.flatten(0, 1).flatten(1).index_select(0, (2 * pages + part).flatten())
        else:
            found = self._numbers(self._stored(part).index_select(0, pages.flatten()), self.bits[part])
        return found.view(*pages.shape, self.page_tokens, self.head_dim)

    def _stored(self, part: int) -> torch.Tensor:
        """32-bit words of one part: (pages, page_tokens, words)."""
        counts = [vector_bytes(self.head_dim, bits, self.dtype.itemsize) // 4 for bits in self.bits]
        first = part * self.page_tokens * counts[0]
        words = self.raw.view(len(self.raw), -1).view(torch.int32)[:, first : first + self.page_tokens * counts[part]]
        return words.unflatten(1, (self.page_tokens, counts[part]))

    def _words(self, values: torch.Tensor, bits: int) -> torch.Tensor:
        if bits == UNTOUCHED:
            return values.to(self.dtype).contiguous().view(torch.int32)
        where, low, step = places(values, bits)
        return torch.cat([pack(where, bits), torch.cat([low, step], dim=-1).view(torch.int32)], dim=-1)

    def _numbers(self, words: torch.Tensor, bits: int) -> torch.Tensor:
        if bits == UNTOUCHED:
            return words.contiguous().view(self.dtype)
        codes, grid = words.split([code_words(self.head_dim, bits), 1], dim=-1)
        low, step = grid.contiguous().view(torch.float16).split(1, dim=-1)
        return values_at(unpack(codes, bits, self.head_dim), low, step, self.dtype)


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
