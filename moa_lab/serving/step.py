"""What an engine asks for in one pass of the model: whose tokens are new, and how scores are made."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch


@dataclass(frozen=True)
class Step:
    """The requests of one pass of the model, a row each, whose new tokens lie one after the other.

    table: integers (rows, columns), the pages of the block tables. buckets: integers (rows,), of `RequestPages`. lengths: int64 (rows,),
    tokens of each row with the new ones. firsts: int64 (rows + 1,), the first new token of each row, then the number of all. on_host:
    `firsts` and `lengths`, where the host knows them. worked_out: what layers share, by who made it.
    """

    table: torch.Tensor
    buckets: torch.Tensor
    lengths: torch.Tensor
    firsts: torch.Tensor
    on_host: tuple[list[int], list[int]] | None = None
    worked_out: dict[object, object] = field(default_factory=dict, compare=False)

    @cached_property
    def told(self) -> tuple[list[int], list[int]]:
        """`firsts` and `lengths` on the host, which may have to wait for them: once a pass."""
        return self.on_host or (self.firsts.tolist(), self.lengths.tolist())

    @cached_property
    def told_buckets(self) -> list[int]:
        """`buckets` on the host, which waits for them: only rows of several new tokens need that."""
        found: list[int] = self.buckets.tolist()
        return found

    @cached_property
    def new(self) -> torch.Tensor:
        """New tokens of each row: int64 (rows,)."""
        return self.firsts.diff()

    @cached_property
    def rows(self) -> torch.Tensor:
        """The row of every new token: int64 (tokens,). Where a captured graph has more tokens than rows bring, the row behind the last."""
        return torch.searchsorted(self.firsts[1:], torch.arange(self.told[0][-1], device=self.firsts.device), right=True)

    @cached_property
    def narrow(self) -> tuple[torch.Tensor, ...]:
        """`lengths`, `firsts`, `rows` and `buckets` in int32, as kernels read them in every layer."""
        return self.lengths.int(), self.firsts.int(), self.rows.int(), self.buckets.int().contiguous()

    @cached_property
    def positions(self) -> torch.Tensor:
        """The position of every new token in its sequence: int64 (tokens,)."""
        return torch.arange(len(self.rows), device=self.rows.device) + (self.lengths - self.firsts[1:])[self.rows]

    @cached_property
    def single(self) -> torch.Tensor:
        """The rows that have one new token: int64."""
        return (self.new == 1).nonzero().flatten()

    @cached_property
    def several(self) -> list[int]:
        """The rows that have more."""
        firsts, lengths = self.told
        return [row for row in range(len(lengths)) if firsts[row + 1] - firsts[row] > 1]


@dataclass(frozen=True)
class Scoring:
    """How scores are made of queries and keys: the scale, Gemma 2's softcap, gpt-oss's sink_logits (query_heads, 1, 1)."""

    scale: float
    softcap: float | None = None
    sink_logits: torch.Tensor | None = None
