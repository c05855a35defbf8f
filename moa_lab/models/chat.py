"""Token ids of conversations, and the tokens that the tokenizer itself puts before a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from moa_lab.prompting.chat import conversation_ids


def opening_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that the tokenizer puts before every text, mostly one BOS; empty where it adds none."""
    bare = list(tokenizer("a", add_special_tokens=False).input_ids)
    whole = list(tokenizer("a").input_ids)
    starts = (start for start in range(len(whole) - len(bare) + 1) if whole[start : start + len(bare)] == bare)
    return whole[: next(starts, 0)]


def opened(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[int]:
    """`ids` after the tokenizer's opening, unless they begin with it already, as after a chat template that writes BOS."""
    opening = opening_ids(tokenizer)
    return list(ids) if list(ids[: len(opening)]) == opening else [*opening, *ids]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text, with a single BOS also where the text (a rendered chat) begins with its own."""
    ids, opening = list(tokenizer.encode(text)), opening_ids(tokenizer)
    return ids[len(opening) :] if opening and ids[: 2 * len(opening)] == opening * 2 else ids


def chat_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> list[int]:
    """Token ids of a conversation, `messages` being `{"role": ..., "content": ...}` in order.

    Uses the tokenizer's chat template, or "User: ... / Assistant:" lines where it has none. With
    `add_generation_prompt` the ids end where the assistant's answer begins. A BOS that the tokenizer adds to every text
    comes first, also where the template leaves it out. Contents are text: a control token that one spells (`<|im_end|>`) is cut
    into ordinary tokens, and a warning counts them. Raises ValueError, in one line with the cure, for a template that raises or
    leaves a message out.
    """
    return opened(tokenizer, conversation_ids(tokenizer, messages, add_generation_prompt))
