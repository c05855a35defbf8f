"""What a caller passed, checked before any work is done."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moa_lab.text import unreadable


def whole_number(name: str, value: Any, at_least: int | None = 1) -> int:
    """`value` as an int. Raises ValueError for anything that is not a whole number, and for one that is too small."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or (at_least is not None and number < at_least):
        raise ValueError(f"{name} must be a whole number{'' if at_least is None else f' of at least {at_least}'}, got {value!r}")
    return number


def is_finite(value: Any) -> bool:
    """True for a number (NumPy's too) that is neither a truth value, nor beyond what a float holds, nor not a number."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def check_tokenizer(tokenizer: Any) -> None:
    """Raises ValueError for what is no tokenizer of transformers."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(f"tokenizer must be one of transformers, as load_model returns beside the model, got {type(tokenizer).__name__}")


def truth(name: str, value: Any) -> bool:
    """`value`. Raises ValueError for anything but True and False: the text "no" would count as yes."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return value


def texts(prompts: Any) -> list[str]:
    """Prompts as a list of texts. Raises ValueError for anything else."""
    asked = list(prompts) if _is_list(prompts) else [prompts]
    for number, prompt in enumerate(asked, start=1):
        if not isinstance(prompt, str):
            raise ValueError(f"prompts must be a text or texts, got {type(prompt).__name__}: decode tokens first; chats go in as chat=True")
        if fault := unreadable(prompt):
            raise ValueError(f"prompt {number} holds {fault}; write it again without it")
    return asked


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop_tokens: Any) -> list[int]:
    """Ids of the tokens that end an answer: None for the model's own end of sequence, else ids and texts that are one token each.

    Raises ValueError for an id outside the vocabulary, and for a text that takes several tokens.
    """
    if stop_tokens is None:
        ends = model.generation_config.eos_token_id if model.generation_config else None
        return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    found = []
    for stop in stop_tokens if _is_list(stop_tokens) else [stop_tokens]:
        token = _only_token(tokenizer, stop) if isinstance(stop, str) else whole_number("a stop token", stop, 0)
        if token >= vocabulary:
            raise ValueError(f"stop token {token} is outside the model's vocabulary of {vocabulary}")
        found.append(token)
    return found


def _is_list(value: Any) -> bool:
    """Whether a value stands for its items: not so a text, bytes, a mapping (whose keys are no items), or an array of no dimension."""
    return isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping) and getattr(value, "ndim", 1) > 0


def _only_token(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    known = tokenizer.get_vocab().get(text)
    tokens = [known] if known is not None else tokenizer.encode(text, add_special_tokens=False)
    if len(tokens) != 1:
        raise ValueError(
            f"stop token {text!r} is {len(tokens)} tokens: pass a text of one token, an id, "
            "or use stop_strings= of transformers' generate within apply_plan"
        )
    return int(tokens[0])
