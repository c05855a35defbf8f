"""Tokens as text: what each adds to it, and a long text folded to what matters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

BEFORE = 4
"""Tokens before one that its text is decoded with: enough to complete a character, and to keep a leading space."""
BROKEN = "\ufffd"
PART = "…"
"""Shown for a token that ends within a character; the one that completes it shows the character."""
Tokens = Sequence[int] | np.ndarray
SIGNS = {"\n": "↵", "\t": "⇥", "\r": "␍"}


@dataclass(frozen=True)
class Fold:
    """A run of positions [start, stop), shown or left out."""

    start: int
    stop: int
    shown: bool


def piece(tokenizer: PreTrainedTokenizerBase, tokens: Tokens, position: int) -> str:
    """What the token at `position` adds to the text; "" for a token that ends within a character."""
    context = [int(token) for token in tokens[max(0, position - BEFORE) : position]]
    before = _decoded(tokenizer, context).rstrip(BROKEN)
    after = _decoded(tokenizer, [*context, int(tokens[position])])
    return "" if after.endswith(BROKEN) else after[len(before) :]


def label(text: str) -> str:
    """A piece as something that can be seen: signs for line ends and lone spaces."""
    for character, sign in SIGNS.items():
        text = text.replace(character, sign)
    return text.strip() or ("␣" if text else PART)


def words(tokenizer: PreTrainedTokenizerBase, tokens: Tokens, position: int, around: int = 6) -> str:
    """The text around a position, in one line."""
    near = [int(token) for token in tokens[max(0, position - around) : position + around + 1]]
    return " ".join(_decoded(tokenizer, near).replace(BROKEN, "").split())


def folded(length: int, kept: Iterable[tuple[int, int]], gap: int = 8) -> list[Fold]:
    """`length` positions as runs: those of `kept` ([start, stop), in any order, cut to the text) are shown, and gaps of at most `gap`."""
    folds: list[Fold] = []
    for start, stop in sorted((max(0, start), min(stop, length)) for start, stop in kept):
        if start >= stop:
            continue
        last = folds[-1] if folds else Fold(0, 0, True)
        if start - last.stop <= gap:
            joined = Fold(last.start, max(last.stop, stop), True)
            folds[-1:] = [joined]
        else:
            folds += [Fold(last.stop, start, False), Fold(start, stop, True)]
    end = folds[-1].stop if folds else 0
    return folds if end == length else [*folds, Fold(end, length, False)]


def _decoded(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    return str(tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False))
