"""Prompts of an exact number of tokens: fixed text around a context that is cut to fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from transformers import PreTrainedTokenizerBase

from moa_lab.models import opened
from moa_lab.prompting.encoding import rendered_ids, text_ids
from moa_lab.prompting.rendering import SHAPES, Marks, render, shape_of, split_at


@dataclass(frozen=True)
class Turn:
    """One question and how its reply begins: `lead` is given in the prompt, the tokens after it are the answer."""

    question: str
    lead: str = ""


@dataclass(frozen=True)
class Frame:
    """Token ids around the context and the answers: `opening`, context, then for each turn `before[i]`, answer i."""

    opening: list[int]
    before: list[list[int]]

    def fixed_tokens(self) -> int:
        """Tokens that the frame itself takes."""
        return len(self.opening) + sum(len(ids) for ids in self.before)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a piece of text: nothing added, and control tokens that it spells are text."""
    return text_ids(tokenizer, text)


def chat_frame(tokenizer: PreTrainedTokenizerBase, before_context: str, turns: Sequence[Turn]) -> Frame:
    """The frame of a conversation whose first message holds `before_context`, the context, then the first question.

    Uses the tokenizer's chat template; without one, a plain "question / answer" layout. Either begins with the BOS of a tokenizer that
    adds one. Control tokens come from the template only. Raises ValueError for a template that raises, or drops, repeats or reorders
    messages.
    """
    marks = Marks(tokenizer, [before_context, *(text for turn in turns for text in (turn.question, turn.lead))])
    context, answers = marks.new(), [marks.new() for _ in turns]
    messages: list[dict[str, str]] = []
    for turn, answer in zip(turns, answers, strict=True):
        before = "" if messages else f"{marks.quote(before_context)}{context}\n\n"
        messages += [{"role": "user", "content": before + marks.quote(turn.question)}, {"role": "assistant", "content": answer}]
    opening, *pieces = split_at(_render(tokenizer, messages), [context, *answers])
    leads = [marks.quote(turn.lead) for turn in turns]
    return Frame(
        # A template may leave out the BOS that the tokenizer puts before every text.
        opened(tokenizer, rendered_ids(tokenizer, opening, marks.quoted)),
        [rendered_ids(tokenizer, piece + lead, marks.quoted) for piece, lead in zip(pieces, leads, strict=True)],
    )


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    if tokenizer.chat_template:
        shape = shape_of(tokenizer, [message["role"] for message in messages], SHAPES)
        return render(tokenizer, messages, shape) + ("" if shape.last_answer else messages[-1]["content"])
    start = tokenizer.bos_token or ""
    lines = [m["content"] + "\n\n" if m["role"] == "user" else f"Answer: {m['content']}\n\n" for m in messages]
    return start + "".join(lines)


def assemble(frame: Frame, context: Sequence[int], answers: Sequence[Sequence[int]]) -> tuple[np.ndarray, tuple[tuple[int, int], ...]]:
    """Join frame, context and answers: tokens int64 (n,) and the [start, stop) range of every answer."""
    ids = [*frame.opening, *context]
    ranges = []
    for before, answer in zip(frame.before, answers, strict=True):
        ids += before
        ranges.append((len(ids), len(ids) + len(answer)))
        ids += answer
    return np.array(ids, dtype=np.int64), tuple(ranges)


def insert_at_depths(
    tokenizer: PreTrainedTokenizerBase, context: Sequence[int], pieces: Sequence[Sequence[int]], depths: Sequence[float]
) -> list[int]:
    """Insert each piece at the sentence end nearest to its depth (0: start, 1: end), in the order of depth.

    Where the context has no sentence end, the exact depth is used.
    """
    ends = _sentence_ends(tokenizer, context)
    result: list[int] = []
    last = 0
    for depth, piece in sorted(zip(depths, pieces, strict=True), key=lambda pair: pair[0]):
        wanted = round(depth * len(context))
        place = int(ends[np.abs(ends - wanted).argmin()]) if len(ends) else wanted
        place = max(place, last)
        result += [*context[last:place], *piece]
        last = place
    return result + list(context[last:])


_endings: WeakKeyDictionary[PreTrainedTokenizerBase, dict[int, bool]] = WeakKeyDictionary()


def _sentence_ends(tokenizer: PreTrainedTokenizerBase, context: Sequence[int]) -> np.ndarray:
    known = _endings.setdefault(tokenizer, {})
    for token in set(context) - known.keys():
        text: Any = tokenizer.decode([token])
        known[token] = text.rstrip().endswith((".", "!", "?"))
    ends = [index + 1 for index, token in enumerate(context) if known[token]]
    return np.array([0, *ends] if ends else [])
