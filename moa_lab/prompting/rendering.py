"""Render chats with the tokenizer's template, in a message format that it takes, and check that it keeps all messages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from moa_lab.prompting.controls import controls_of, unused_characters
from moa_lab.text import one_line

Message = Mapping[str, str]

CURE = "use plain prompts instead: --plain-prompts, or tokenizer.chat_template = None"
# Supplementary private use area B; area A has the stand-ins of `encoding`.
MARKS = 0x100000


@dataclass(frozen=True)
class Shape:
    """A message format: content as one string or as a list of parts, and whether the template shows a last answer."""

    parts: bool = False
    last_answer: bool = True


SHAPES = (Shape(), Shape(parts=True), Shape(last_answer=False), Shape(parts=True, last_answer=False))


@dataclass
class Marks:
    """Private-use characters that replace in messages what the template must not see; none of them occurs in `texts`.

    quoted: those that replace control tokens which the user wrote.
    """

    tokenizer: PreTrainedTokenizerBase
    texts: Sequence[str]
    quoted: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._unused = unused_characters("".join([*self.texts, str(self.tokenizer.chat_template or "")]), MARKS)
        self._of: dict[str, str] = {}

    def new(self) -> str:
        """The next unused character."""
        return next(self._unused)

    def quote(self, text: str, role: str = "user") -> str:
        """`text` with a character in place of every control token that it spells.

        An assistant's text keeps control tokens that are not special (`<think>`, `<tool_call>`), since templates read them.
        """
        controls = controls_of(self.tokenizer)
        kept = controls.unflagged if role == "assistant" else frozenset()
        return controls.pattern.sub(lambda match: match[0] if match[0] in kept else self._stands_for(match[0]), text)

    def _stands_for(self, content: str) -> str:
        if content not in self._of:
            self._of[content] = self.new()
            self.quoted[self._of[content]] = content
        return self._of[content]


def check_turns(tokenizer: PreTrainedTokenizerBase, turns: int = 1) -> None:
    """Try the chat template, if there is one, on a conversation of `turns` questions and answers.

    Raises ValueError, in one line with the cure, where it raises, or drops, repeats or reorders messages.
    """
    if tokenizer.chat_template and turns:
        shape_of(tokenizer, ["user", "assistant"] * turns, SHAPES)


def shape_of(
    tokenizer: PreTrainedTokenizerBase, roles: Sequence[str], shapes: Iterable[Shape], add_generation_prompt: bool = False,
    in_order: bool = True,
) -> Shape:  # fmt: skip
    """The first of `shapes` in which the template shows every message of `roles` (with `in_order`: each once, in order).

    Raises ValueError that says what is wrong with the first of them.
    """
    marks = Marks(tokenizer, ())
    contents = [marks.new() for _ in roles]
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
    complaints = []
    for shape in shapes:
        try:
            text = render(tokenizer, messages, shape, add_generation_prompt)
        except ValueError as error:
            complaints.append(str(error))
            continue
        complaint = _complaint(text, contents[: len(contents) if shape.last_answer else -1], roles, in_order)
        if complaint is None:
            return shape
        complaints.append(f"the chat template {complaint}; {CURE}")
    raise ValueError(complaints[0])


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], shape: Shape, add_generation_prompt: bool = False) -> str:
    """The chat as text; raises ValueError where the template raises.

    A shape without the last answer ends where that answer begins.
    """
    shown = messages if shape.last_answer else messages[:-1]
    content: Callable[[str], Any] = (lambda text: [{"type": "text", "text": text}]) if shape.parts else (lambda text: text)
    conversation = [{**message, "content": content(message["content"])} for message in shown]
    try:
        return str(
            tokenizer.apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=add_generation_prompt or not shape.last_answer
            )
        )
    except Exception as error:  # a template is a program: besides jinja2's own errors it may raise TypeError, KeyError, ...
        raise ValueError(f"the chat template raises {type(error).__name__}: {one_line(error)}; {CURE}") from error


def split_at(text: str, marks: Sequence[str]) -> Iterator[str]:
    """The pieces of `text` before each of the marks; raises ValueError unless each mark occurs once, in order."""
    complaint = _complaint(text, marks, [], in_order=True)
    if complaint is not None:
        raise ValueError(f"the chat template {complaint}; {CURE}")
    for mark in marks:
        piece, _, text = text.partition(mark)
        yield piece


def _complaint(text: str, contents: Sequence[str], roles: Sequence[str], in_order: bool) -> str | None:
    for index, content in enumerate(contents):
        name = f"message {index + 1} ({roles[index]})" if roles else "a part of a message"
        if content not in text:
            return f"drops {name} of {len(contents)}"
        if in_order and text.count(content) > 1:
            return f"repeats {name}"
    places = [text.index(content) for content in contents]
    return "changes the order of the messages" if in_order and places != sorted(places) else None
