"""The methods, what each needs beyond a dense model, and what it holds over time.

As kvpress runs them. DuoAttention's own engine drops while it reads, as a plan does; and of what is masked, entries stay in memory here:
what is kept and held is counted as if they had gone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from moa_lab.presses.footprint import read_densely, read_twice
from moa_lab.presses.questions import Question

REPLAYED_TOKENS = 2048
"""Tokens that KVzip reconstructs at once (kvpress's default)."""


@dataclass(frozen=True)
class Needs:
    """What a method needs. reads: the context's attention, "dense" or "spans"; passes: over the context, before its first question;
    before: what is made once for a model; drops: how the entries to drop are chosen."""

    reads: str
    passes: int
    before: str
    drops: str


Footprint = Callable[[int, int, float], float]


@dataclass(frozen=True)
class Method:
    """A press of kvpress. footprint: of context, rest and entries kept of the context (see `moa_lab.presses.footprint`)."""

    name: str
    needs: Needs
    footprint: Footprint = read_densely


def _read_twice(context: int, rest: int, kept: float) -> float:
    return read_twice(context, rest, kept, REPLAYED_TOKENS)


_SPLIT = "whole heads; the others keep at least"
METHODS = {
    method.name: method
    for method in (
        Method("streaming", Needs("dense", 1, "nothing", "the first 4 tokens and the newest stay")),
        Method("snapkv", Needs("dense", 1, "nothing", "attention of the context's last 32 tokens, pooled over 13")),
        Method("adakv", Needs("dense", 1, "nothing", "expected attention (epsilon 0.01), one budget for a layer's heads; masked")),
        Method("duo", Needs("dense", 1, "mean queries and keys of 50 texts", f"{_SPLIT} 128 first, 256 newest; masked")),
        Method("duo-192", Needs("dense", 1, "mean queries and keys of 50 texts", f"{_SPLIT} 64 first, 128 newest; masked")),
        Method("kvzip", Needs("dense", 2, "nothing", "attention of the context repeated, one budget for all heads; masked"), _read_twice),
        Method("kvzip-heads", Needs("dense", 1, "KVzip's scores of one text", f"{_SPLIT} 64 first, 128 newest; masked")),
    )
}
DENSE = Needs("dense", 1, "nothing", "nothing")
SPANS = Needs("spans", 1, "a plan: learned or searched", "a sink and a window per head, while the context is read too")
SPANS_AFTER = Needs("dense", 1, "a plan: learned or searched", "the same after the context is read; masked")


def kept_context(keep: float, question: Question) -> int:
    """Entries of the context that a head may keep on average, so that of all `length` tokens `keep` are held when the answer is there.

    Raises ValueError where question and answer alone take more.
    """
    kept = round(keep * question.length) - question.asked_tokens
    if not 0 < kept <= len(question.context):
        raise ValueError(f"{keep:.0%} of {question.length} tokens leave {kept} for a context of {len(question.context)}")
    return kept


def split_heads(kept: int, context: int, heads: int, floor: int) -> tuple[int, int]:
    """How many of `heads` stream, and the entries that each of them keeps of the context, `floor` at least, where the others keep all
    and `kept` are kept on average. What is left over by whole heads is given to those that stream.

    Raises ValueError where even streaming alone keeps more.
    """
    if floor > kept:
        raise ValueError(f"heads that keep {floor} tokens at least cannot keep {kept} on average")
    streaming = math.ceil(heads * (context - kept) / (context - floor))
    return streaming, (kept * heads - context * (heads - streaming)) // max(1, streaming)
