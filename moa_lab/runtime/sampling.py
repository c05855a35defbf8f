"""How the next token is chosen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper


@dataclass(frozen=True)
class Sampling:
    """temperature 0 takes the likeliest token. top_k, top_p: as in transformers; seed: the same seed, the same tokens."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or (self.top_k is not None and self.top_k < 1) or (self.top_p is not None and not 0 < self.top_p <= 1):
            raise ValueError(f"temperature must be at least 0, top_k at least 1, top_p above 0 and at most 1, got {self}")

    def generator(self, device: torch.device) -> torch.Generator:
        """A generator that begins at the seed."""
        return torch.Generator(device).manual_seed(self.seed)

    def pick(self, logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """int64 (batch,) from `logits` (batch, vocabulary), without a word to the host."""
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        warpers = LogitsProcessorList([TemperatureLogitsWarper(self.temperature)])
        if self.top_k is not None:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p is not None:
            warpers.append(TopPLogitsWarper(self.top_p))
        # None of these looks at the tokens before.
        before = torch.empty(len(logits), 0, dtype=torch.long)
        weights = warpers(before, logits.float()).softmax(dim=-1)  # type: ignore[arg-type]
        # The largest of weight / exponential noise falls on a token as often as its weight says.
        noise = torch.empty_like(weights).exponential_(generator=generator)
        return (weights / noise.clamp(min=torch.finfo(noise.dtype).tiny)).argmax(dim=-1)
