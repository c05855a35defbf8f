"""Differences and agreements of a parity case, summed up."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from moa_lab.evaluate.parity.record import ParityRow


class Tally:
    """The largest difference and the number of agreements in one case so far."""

    def __init__(self, tolerance: float, same: float = 1.0) -> None:
        """same: share of the decided positions that must agree; below 1 these alone decide, not the largest difference."""
        self._tolerance, self._same = tolerance, same
        self.difference = 0.0
        self._positions = self._decided = self._agreeing = 0

    def add(self, found: torch.Tensor, expected: torch.Tensor, said: torch.Tensor | None = None, never: Sequence[int] = ()) -> None:
        """Add logits (positions, vocabulary) and the reference's. said: the tokens chosen (None: the likeliest); never: excluded ones."""
        difference = (found.to(expected) - expected).abs().amax(dim=-1) / expected.std(dim=-1)
        self._largest(difference)
        chosen = found.argmax(dim=-1) if said is None else said
        self._choices(chosen, expected, never, 2 * self._tolerance)

    def add_tokens(self, said: torch.Tensor, expected: torch.Tensor) -> None:
        """Add tokens (positions,) and the reference's logits (positions, vocabulary)."""
        below = expected.amax(dim=-1) - expected.gather(1, said[:, None])[:, 0]
        self._largest(below / expected.std(dim=-1))
        self._choices(said, expected, (), self._tolerance)

    def row(self, name: str, compared: str) -> ParityRow:
        """The verdict."""
        agreement = self._agreeing / self._decided if self._decided else None
        difference = self.difference if math.isfinite(self.difference) else None
        close = difference is not None and (difference <= self._tolerance or self._same < 1)
        passed = close and self._agreeing >= self._same * self._decided
        return ParityRow(name, compared, self._positions, difference, agreement, self._decided, self._tolerance, passed)

    def _largest(self, differences: torch.Tensor) -> None:
        # torch's maximum propagates NaN, Python's may not.
        self.difference = float(torch.cat([differences, differences.new_tensor([self.difference])]).amax())

    def _choices(self, chosen: torch.Tensor, expected: torch.Tensor, never: Sequence[int], apart: float) -> None:
        spread = expected.std(dim=-1)
        allowed = expected.clone()
        allowed[:, list(never)] = -math.inf
        best = allowed.topk(2, dim=-1)
        decided = (best.values[:, 0] - best.values[:, 1]) / spread > apart
        self._positions += len(expected)
        self._decided += int(decided.sum())
        self._agreeing += int((decided & (best.indices[:, 0] == chosen)).sum())
