"""What is traced: a prompt with an answer, as tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Case:
    """A prompt and the answer that is traced.

    tokens: int64 (prompt and answer,). start: position of the answer's first token. n_tokens: the length N at which a plan's spans are
    taken. kind: "prompt" (the answer is the dense model's own), "needle" or "line" (it is what was asked for). planted: ranges of
    positions in the prompt that spell the answer.
    """

    tokens: np.ndarray
    start: int
    n_tokens: int
    kind: str = "prompt"

    def __post_init__(self) -> None:
        if not 0 < self.start < len(self.tokens) <= self.n_tokens:
            raise ValueError(f"an answer needs a token and a prompt before it, got {len(self.tokens)} tokens, answer from {self.start}")

    @property
    def prompt(self) -> np.ndarray:
        """Token ids of the prompt."""
        return self.tokens[: self.start]

    @property
    def answer(self) -> np.ndarray:
        """Token ids of the answer."""
        return self.tokens[self.start :]

    @property
    def planted(self) -> tuple[tuple[int, int], ...]:
        """Where the prompt spells the answer: [start, stop) positions; empty for an answer of fewer than two tokens."""
        wanted = [int(token) for token in self.answer]
        if len(wanted) < 2:
            return ()
        windows = np.lib.stride_tricks.sliding_window_view(self.prompt, len(wanted)) if self.start >= len(wanted) else np.empty((0, 1))
        return tuple((int(at), int(at) + len(wanted)) for at in np.flatnonzero((windows == wanted).all(axis=1)))
