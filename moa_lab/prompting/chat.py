"""Token ids of a conversation."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from moa_lab.prompting.controls import escaped_controls, told
from moa_lab.prompting.encoding import rendered_ids, text_ids
from moa_lab.prompting.rendering import SHAPES, Marks, render, shape_of

logger = logging.getLogger(__name__)


def conversation_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
) -> list[int]:
    """Token ids of `messages`; see `moa_lab.models.chat_ids`."""
    contents = [message["content"] for message in messages]
    _tell(tokenizer, messages)
    if not tokenizer.chat_template:
        lines = [f"{message['role'].capitalize()}: {message['content']}\n" for message in messages]
        return text_ids(tokenizer, "".join(lines) + ("Assistant:" if add_generation_prompt else ""), add_special_tokens=True)
    # Refuse a template that drops a message; it may repeat or reorder messages.
    shapes = [shape for shape in SHAPES if shape.last_answer]
    shape = shape_of(tokenizer, [message["role"] for message in messages], shapes, add_generation_prompt, in_order=False)
    marks = Marks(tokenizer, contents)
    quoted = [{**message, "content": marks.quote(message["content"], message["role"])} for message in messages]
    return rendered_ids(tokenizer, render(tokenizer, quoted, shape, add_generation_prompt), marks.quoted)


def _tell(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> None:
    escaped = escaped_controls(tokenizer, [message["content"] for message in messages if message["role"] != "assistant"])
    if escaped:
        logger.warning("a chat spells %s; they are kept as text", told(escaped))
