"""KV footprint over time: how many entries are held, and for how long.

After PruLong (Bhaskar et al., 2025, arXiv 2506.17121, "Cache Me If You Can"): for every token that is processed, count the KV entries
held while it is, its own among them; sum over all tokens, and divide by what the dense model holds over the same sequence,
N (N + 1) / 2. Entries are counted per KV head and averaged over heads. So a method that reads densely pays for the whole context until
it is read, whatever it drops then; one that drops while it reads does not. Tokens of a chunk enter together: a chunk's own keys stay
until its end. Passes that the dense model does not make are added, and may lift a footprint above 1.

context, rest: tokens before the question, and of question and answer together.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

CHUNK_TOKENS = 512
"""Tokens that enter together where a method drops while it reads."""


def triangle(n_tokens: int) -> int:
    """Entries that the dense model holds over `n_tokens` tokens, summed over time."""
    return n_tokens * (n_tokens + 1) // 2


def read_densely(context: int, rest: int, kept: float) -> float:
    """Footprint where the context is read densely and `kept` of its entries are held afterwards (mean over heads)."""
    return (triangle(context) + rest * kept + triangle(rest)) / triangle(context + rest)


def read_twice(context: int, rest: int, kept: float, chunk_tokens: int) -> float:
    """`read_densely`, and every chunk of the context once more after it, over the whole cache (KVzip's reconstruction)."""
    again = context * context + sum(triangle(size) for size in _chunks(context, chunk_tokens))
    return read_densely(context, rest, kept) + again / triangle(context + rest)


def read_in_spans(context: int, rest: int, spans: Iterable[int], chunk_tokens: int = CHUNK_TOKENS) -> float:
    """Footprint where a head never holds more than its span (tokens) of what was before the chunk that is read."""
    heads = np.fromiter(spans, dtype=np.int64)
    first = 0
    held = 0.0
    for size in _chunks(context, chunk_tokens):
        held += size * np.minimum(first, heads).mean() + triangle(size)
        first += size
    return (held + _decoded(context, rest, heads)) / triangle(context + rest)


def spans_after_reading(context: int, rest: int, spans: Iterable[int]) -> float:
    """Footprint where the context is read densely, and the spans hold from then on."""
    heads = np.fromiter(spans, dtype=np.int64)
    return (triangle(context) + _decoded(context, rest, heads)) / triangle(context + rest)


def _decoded(context: int, rest: int, spans: np.ndarray) -> float:
    """Entries held over the tokens after the context, one by one."""
    tokens = np.arange(context + 1, context + rest + 1)
    return float(np.minimum(tokens, spans[:, None]).mean(axis=0).sum())


def _chunks(n_tokens: int, chunk_tokens: int) -> list[int]:
    return [min(chunk_tokens, n_tokens - first) for first in range(0, n_tokens, chunk_tokens)]
