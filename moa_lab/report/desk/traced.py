"""An answer that was traced, as a desk page shows it: its parts as HTML that is already escaped."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TracedHead:
    """A head behind a token. label: in columns. html: the text it read, and where its span ends."""

    layer: int
    kv_head: int
    label: str
    html: str


@dataclass(frozen=True)
class TracedToken:
    """A token of the answer. text: its piece and probabilities; tip: in words; classes: of CSS. why: one sentence on what became of it;
    empty, and without heads, for one that nobody looked at.
    """

    text: str
    tip: str
    classes: tuple[str, ...]
    why: str = ""
    heads: tuple[TracedHead, ...] = ()


@dataclass(frozen=True)
class TracedAnswer:
    """said: HTML, what was asked for and what is said dense and under the plan. columns: a heading of the heads' labels. style: CSS."""

    said: str
    tokens: tuple[TracedToken, ...]
    columns: str
    style: str
