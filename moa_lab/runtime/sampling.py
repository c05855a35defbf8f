"""How the next token is chosen."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from moa_lab.runtime.arguments import is_finite, whole_number

COLDEST = 1e-6
"""Temperatures below lead to scores that float32 cannot hold."""


@dataclass(frozen=True)
class Sampling:
    """temperature 0 takes the likeliest token, and there is nothing to draw then: top_k and top_p need one above.

    top_k, top_p: as in transformers; seed: the same seed, the same tokens. Raises ValueError for what is out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        top_k_is_right = self.top_k is None or (isinstance(self.top_k, Integral) and not isinstance(self.top_k, bool) and self.top_k >= 1)
        top_p_is_right = self.top_p is None or (is_finite(self.top_p) and 0 < self.top_p <= 1)
        if not (is_finite(self.temperature) and self.temperature >= 0 and top_k_is_right and top_p_is_right):
            raise ValueError(f"temperature must be at least 0, top_k at least 1, top_p above 0 and at most 1, got {self}")
        if 0 < self.temperature < COLDEST:
            raise ValueError(f"temperature {self.temperature} is too near 0 to divide by: take 0 for the likeliest token")
        if self.temperature == 0 and (self.top_k, self.top_p) != (None, None):
            raise ValueError(f"top_k and top_p choose what is drawn from, and temperature 0 draws nothing: give one, such as 1.0 ({self})")
        if not -(2**63) <= whole_number("seed", self.seed, None) < 2**64:
            raise ValueError(f"seed must fit in 64 bits, got {self.seed}")

    def generator(self, device: torch.device) -> torch.Generator:
        """A generator that begins at the seed."""
        return torch.Generator(device).manual_seed(self.seed)

    def pick(self, logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """int64 (batch,) from `logits` (batch, vocabulary), without a host synchronisation."""
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        # transformers takes Python's own numbers alone, and an int for no temperature.
        warpers = LogitsProcessorList([TemperatureLogitsWarper(float(self.temperature))])
        if self.top_k is not None:
            warpers.append(TopKLogitsWarper(int(self.top_k)))
        if self.top_p is not None:
            warpers.append(TopPLogitsWarper(float(self.top_p)))
        # None of these looks at the tokens before.
        before = torch.empty(len(logits), 0, dtype=torch.long)
        weights = warpers(before, logits.float()).softmax(dim=-1)  # type: ignore[arg-type]
        # The largest of weight / exponential noise falls on a token as often as its weight says.
        noise = torch.empty_like(weights).exponential_(generator=generator)
        return (weights / noise.clamp(min=torch.finfo(noise.dtype).tiny)).argmax(dim=-1)
