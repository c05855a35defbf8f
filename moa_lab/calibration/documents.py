"""Documents: the embedded texts, splits that never mix, and excerpts of an exact number of tokens."""

from __future__ import annotations

import bisect
import json
import logging
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar, get_args

from moa_lab.prompting.controls import escaped_controls, told
from moa_lab.prompting.encoding import text_ids, text_tokens
from moa_lab.provenance import digest
from moa_lab.shipped import data_folder
from moa_lab.text import unreadable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Split = Literal["calibration", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

JOINT = "\n\n"
DRAWS = 200
# Where a sentence or a paragraph begins: after an end mark and blanks (but not before a small letter), after the full-width end
# marks of Chinese and Japanese, after a line break.
BOUNDARY = re.compile(r"""[.!?]["')\]]*\s+(?=["'(\[]?[^\Wa-z_])|[\u3002\uff01\uff1f]["\u201d\u300d]?|\n\s*""")
ABBREVIATION = re.compile(r"(?:^|[^\w.])(?:Mr|Mrs|Ms|Dr|St|Jr|Messrs|Gen|Gov|No|(?:\w\.)*\w)\.$")
SLOW_TOKENIZER_STARTS = 16

Excerpt = TypeVar("Excerpt")
Piece = tuple[int, int, int]


@dataclass(frozen=True)
class Document:
    """One text, with a human's summary of it, or a question about it and the answer, where its source has them.

    Raises ValueError when the text is blank, or a field holds a NUL character or half a character (a lone surrogate).
    """

    name: str
    text: str
    summary: str | None = None
    question: str | None = None
    answer: str | None = None

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise ValueError(f"document {self.name!r} has a blank text; leave it out")
        for text in filter(None, (self.text, self.summary, self.question, self.answer)):
            if fault := unreadable(text):
                raise ValueError(f"document {self.name!r} holds {fault}; write it again without it")


def embedded_documents(split: Split) -> tuple[Document, ...]:
    """Return the embedded State of the Union addresses of one split, ordered by name.

    Raises ValueError for an unknown split, and when the texts are missing.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    folder = _texts_folder() / split
    files = sorted(folder.glob("*.txt"))
    if not files:
        raise ValueError(f"{folder}: the embedded texts are missing; install moa-lab again, or check out its data/texts folder")
    return tuple(Document(name=file.stem, text=file.read_text(encoding="utf-8").strip()) for file in files)


def documents_hash(documents: Sequence[Document]) -> str:
    """Return a short fingerprint of the documents, all fields, in order: the order decides what a seed draws."""
    return digest(json.dumps([astuple(document) for document in documents]).encode())


def split_documents(documents: Sequence[Document], seed: int) -> dict[Split, tuple[Document, ...]]:
    """Split a user's documents 50/25/25 into calibration, validation and test.

    Documents with the same text (several questions about one) stay together, so a text is never in two splits. Which split a text
    falls into depends on the set of texts and the seed, not on the order of `documents`; within a split that order is kept.
    Raises ValueError when there are fewer than 3 different texts.
    """
    texts = sorted({document.text for document in documents}, key=lambda text: digest(text.encode()))
    if len(texts) < len(SPLITS):
        raise ValueError(
            f"documents hold {len(texts)} different texts; at least {len(SPLITS)} are needed, one for each of {', '.join(SPLITS)}: add some"
        )
    random.Random(seed).shuffle(texts)
    quarter = (len(texts) + 1) // 4
    split_of: dict[str, Split] = dict.fromkeys(texts, "calibration")
    split_of.update(dict.fromkeys(texts[:quarter], "validation"))
    split_of.update(dict.fromkeys(texts[quarter : 2 * quarter], "test"))
    return {split: tuple(document for document in documents if split_of[document.text] == split) for split in SPLITS}


_told: set[tuple[str, tuple[str, ...]]] = set()


def tell_escaped(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """How often the documents spell each control token of the tokenizer; they are kept as text, with one warning per document set."""
    texts = [text for document in documents for text in (document.text, document.summary, document.question, document.answer)]
    escaped = escaped_controls(tokenizer, texts)
    key = (documents_hash(documents), tuple(escaped)) if escaped else None
    if key and key not in _told:
        _told.add(key)
        logger.warning("the %d documents spell %s; they are kept as text", len(documents), told(escaped))
    return escaped


class TextStream:
    """Excerpts of an exact number of tokens, walking through documents in a seeded random order.

    Each document is tokenized once, without special tokens. An excerpt begins at a random sentence or paragraph of one document and
    goes on, after a blank line, with the next documents until it is full. No text occurs twice within an excerpt, and no excerpt is
    given twice by one stream. The same documents, tokenizer, seed and calls give the same excerpts.
    """

    def __init__(self, documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        # Several questions about one text are several documents; the text is streamed once.
        texts = tuple(dict.fromkeys(document.text for document in documents))
        if not texts:
            raise ValueError("documents is empty; a TextStream needs at least one document")
        self._joint = text_ids(tokenizer, JOINT)
        self._tokens: list[list[int]] = []
        self._starts: list[list[int]] = []
        for text in texts:
            ids, starts = _tokenize(tokenizer, text)
            if ids:
                self._tokens.append(ids)
                self._starts.append(starts)
        if not self._tokens:
            raise ValueError("documents hold no tokens: the tokenizer gives nothing for any of their texts")
        self._random = random.Random(seed)
        self._order: list[int] = []
        self._position = 0
        self._given: set[tuple[Piece, ...]] = set()

    @property
    def total_tokens(self) -> int:
        """Tokens of the longest possible excerpt: all documents, joined by blank lines."""
        return sum(map(len, self._tokens)) + len(self._joint) * (len(self._tokens) - 1)

    def take(self, n_tokens: int) -> list[int]:
        """Return the token ids of the next excerpt, exactly `n_tokens` of them.

        Raises ValueError when the documents hold fewer tokens, or when no further different excerpt of this length was found.
        """
        _check_positive("n_tokens", n_tokens)
        if n_tokens > self.total_tokens:
            raise ValueError(f"n_tokens={n_tokens} are needed but the documents hold only {self.total_tokens} tokens; add documents")
        return self._new(n_tokens, lambda: self._draw_excerpt(n_tokens))

    def take_documents(self, n_tokens: int, count: int) -> list[list[int]]:
        """Return excerpts of `count` different documents whose lengths sum to exactly `n_tokens`, as equal as the documents allow.

        Raises ValueError when the `count` longest documents hold fewer tokens, when there are fewer documents than `count` or fewer
        tokens than documents, or when no further different choice was found.
        """
        _check_positive("count", count)
        if count > len(self._tokens):
            raise ValueError(f"count={count} different documents are needed but there are only {len(self._tokens)}; add documents")
        if n_tokens < count:
            raise ValueError(f"n_tokens={n_tokens} must be at least count={count}: one token for each document")
        longest = sum(sorted(map(len, self._tokens))[-count:])
        if n_tokens > longest:
            raise ValueError(f"n_tokens={n_tokens} are needed but the {count} longest documents hold only {longest}; raise count")
        return self._new(n_tokens, lambda: self._draw_documents(n_tokens, count))

    def _new(self, n_tokens: int, draw: Callable[[], tuple[tuple[Piece, ...], Excerpt]]) -> Excerpt:
        for _ in range(DRAWS):
            pieces, excerpt = draw()
            if pieces not in self._given:
                self._given.add(pieces)
                return excerpt
        raise ValueError(
            f"{len(self._given)} excerpts were taken and no different one of n_tokens={n_tokens} was found in {DRAWS} draws: "
            f"the documents hold {self.total_tokens} tokens; add documents or ask for fewer or shorter excerpts"
        )

    def _draw_excerpt(self, n_tokens: int) -> tuple[tuple[Piece, ...], list[int]]:
        # A start is kept only if everything behind it still fills the excerpt; start 0 always does.
        queue = self._queue()
        first = queue[0]
        start = self._draw_start(first, self.total_tokens - n_tokens)
        ids = self._tokens[first][start : start + n_tokens]
        pieces = [(first, start, len(ids))]
        for document in queue[1:]:
            room = n_tokens - len(ids) - len(self._joint)
            if room <= 0:
                break
            piece = self._tokens[document][:room]
            ids = ids + self._joint + piece
            pieces.append((document, 0, len(piece)))
        # The last tokens may have room for a part of the blank line only.
        ids = ids + self._joint[: n_tokens - len(ids)]
        self._position += len(pieces)
        return tuple(pieces), ids

    def _draw_documents(self, n_tokens: int, count: int) -> tuple[tuple[Piece, ...], list[list[int]]]:
        queue = self._queue()
        chosen, spare = queue[:count], sorted(queue[count:], key=self._length)
        while sum(map(self._length, chosen)) < n_tokens:
            # Too short together: replace the shortest by the longest of the rest, until at worst the `count` longest are chosen.
            chosen[min(range(count), key=lambda index: self._length(chosen[index]))] = spare.pop()
        self._position += count
        shares = _fair_shares(n_tokens, [self._length(document) for document in chosen])
        starts = [self._draw_start(document, self._length(document) - share) for document, share in zip(chosen, shares, strict=True)]
        pieces = tuple(zip(chosen, starts, shares, strict=True))
        return pieces, [self._tokens[document][start : start + share] for document, start, share in pieces]

    def _length(self, document: int) -> int:
        return len(self._tokens[document])

    def _queue(self) -> list[int]:
        """All documents once, starting with the next in the random order; after the last one a new order is drawn."""
        if self._position >= len(self._order):
            self._order = self._random.sample(range(len(self._tokens)), len(self._tokens))
            self._position = 0
        return self._order[self._position :] + self._order[: self._position]

    def _draw_start(self, document: int, last: int) -> int:
        starts = self._starts[document]
        return starts[self._random.randrange(bisect.bisect_right(starts, last))]


def _texts_folder() -> Path:
    return data_folder("texts", package=Path(__file__).resolve().parents[1])


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def _fair_shares(total: int, limits: Sequence[int]) -> list[int]:
    """Split `total` into one positive share per limit, as equal as the limits allow; sum(limits) must be at least `total`."""
    shares = [0] * len(limits)
    for rank, index in enumerate(sorted(range(len(limits)), key=lambda index: limits[index])):
        # Shortest first: what it cannot hold is divided among the longer ones.
        shares[index] = min(limits[index], (total - sum(shares)) // (len(limits) - rank))
    return shares


def _tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int]]:
    """Token ids of `text`, and the sorted token indices at which a sentence or paragraph begins (0 always among them)."""
    characters = _boundaries(text)
    if not getattr(tokenizer, "is_fast", False):
        return _tokenize_slowly(tokenizer, text, characters)
    ids, offsets = text_tokens(tokenizer, text, offsets=True)
    begins = [begin for begin, _ in offsets]
    ends = [end for _, end in offsets]
    starts = {0}
    for character in characters:
        token = bisect.bisect_right(ends, character)
        # Skip a token that also holds the end of the previous sentence.
        if token < len(begins) and not text[begins[token] : character].strip():
            starts.add(token)
    return ids, sorted(starts)


def _tokenize_slowly(tokenizer: PreTrainedTokenizerBase, text: str, characters: list[int]) -> tuple[list[int], list[int]]:
    """The same without character offsets: a boundary is kept where the text before it tokenizes to a prefix of the whole."""
    ids = text_ids(tokenizer, text)
    starts = {0}
    for character in characters[:: max(1, len(characters) // SLOW_TOKENIZER_STARTS)]:
        before = text_ids(tokenizer, text[:character].rstrip())
        if 0 < len(before) < len(ids) and ids[: len(before)] == before:
            starts.add(len(before))
    return ids, sorted(starts)


def _boundaries(text: str) -> list[int]:
    """Character positions at which a sentence or paragraph begins, other than the first."""
    found = []
    for match in BOUNDARY.finditer(text):
        before = text[max(0, match.start() - 12) : match.start() + 1]
        if match.end() < len(text) and not ABBREVIATION.search(before):
            found.append(match.end())
    return found
