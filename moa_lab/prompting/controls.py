"""Control tokens of a tokenizer (`<|im_end|>`, `<bos>`, `<tool_call>`), and where a text spells one."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

# Some tokenizers (Gemma's) have added tokens for ordinary HTML elements: these are text.
HTML = frozenset({
    "a", "b", "blockquote", "body", "br", "caption", "code", "div", "em", "footer", "h1", "h2", "h3", "h4", "h5", "h6", "html", "i",
    "iframe", "img", "li", "ol", "p", "pre", "s", "span", "strong", "sub", "sup", "table", "tbody", "td", "tfoot", "th", "thead", "tr",
    "u", "ul",
})  # fmt: skip
_BRACKETED = re.compile(r"</?([^<>\s]+)>|\[/?([^\[\]\s]+)\]")
_NEVER = re.compile(r"(?!)")


@dataclass(frozen=True)
class Controls:
    """Control tokens of one tokenizer.

    ids: by content. pattern: matches the longest control token. unflagged: those that the tokenizer does not flag as special.
    """

    ids: Mapping[str, int]
    pattern: re.Pattern[str]
    unflagged: frozenset[str] = frozenset()

    @cached_property
    def marks(self) -> frozenset[int]:
        """Their ids."""
        return frozenset(self.ids.values())

    def within(self, text: str) -> Counter[str]:
        """How often `text` spells each control token."""
        return Counter(self.pattern.findall(text))


_known: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[Any, Controls]] = WeakKeyDictionary()


def controls_of(tokenizer: PreTrainedTokenizerBase) -> Controls:
    """The tokenizer's control tokens: its special tokens, and other added tokens that are not text.

    A token that is not flagged as special is a control token when it is bracketed (`<tool_call>`, `<|fim_prefix|>`) and no HTML
    element, unless the chat template itself uses that element. Blank tokens (line breaks) and added words are text.
    """
    # Asked of the class: some tokenizers put thousands of tokens together to answer.
    if not hasattr(type(tokenizer), "added_tokens_decoder"):  # mistral_common, which recognises no control token in a text
        return Controls({}, _NEVER)
    key = (len(tokenizer), str(tokenizer.chat_template), tuple(tokenizer.all_special_tokens))
    known = _known.get(tokenizer)
    if known is None or known[0] != key:
        known = _known[tokenizer] = (key, _read(tokenizer))
    return known[1]


def escaped_controls(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str | None]) -> dict[str, int]:
    """How often the texts spell each control token, the most frequent first."""
    controls = controls_of(tokenizer)
    found: Counter[str] = Counter()
    for text in texts:
        found += controls.within(text or "")
    return dict(found.most_common())


def told(escaped: Mapping[str, int], shown: int = 5) -> str:
    """ "3 control tokens (<|im_end|> 2, <bos> 1)", for a log line."""
    named = ", ".join(f"{content} {count}" for content, count in list(escaped.items())[:shown])
    more = ", ..." if len(escaped) > shown else ""
    total = sum(escaped.values())
    return f"{total} control token{'' if total == 1 else 's'} ({named}{more})"


def unused_characters(text: str, start: int) -> Iterator[str]:
    """Characters of a private-use plane of Unicode, from `start` on, that `text` does not hold; never letters or blanks."""
    held = set(text)
    return (chr(code) for code in range(start, (start | 0xFFFF) - 1) if chr(code) not in held)


def _read(tokenizer: PreTrainedTokenizerBase) -> Controls:
    template = str(tokenizer.chat_template or "")
    added = tokenizer.added_tokens_decoder
    ids = {token.content: index for index, token in added.items() if token.special or _is_mark(token.content, template)}
    special = {str(content): index for content, index in zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)}
    ids = {content: index for content, index in {**special, **ids}.items() if content.strip()}
    # Longest first, as the tokenizer itself matches.
    contents = sorted(ids, key=len, reverse=True)
    unflagged = frozenset(token.content for token in added.values() if not token.special and token.content not in special)
    return Controls(ids, re.compile("|".join(map(re.escape, contents))) if contents else _NEVER, unflagged & ids.keys())


def _is_mark(content: str, template: str) -> bool:
    bracketed = _BRACKETED.fullmatch(content)
    return bool(bracketed and ((bracketed[1] or bracketed[2]).lower() not in HTML or content in template))
