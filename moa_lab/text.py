"""Tables, intervals and errors as lines of text, what is no text, and lists that a user gives."""

from __future__ import annotations

import logging
import math
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

logger = logging.getLogger(__name__)

Item = TypeVar("Item", bound=Hashable)

NO_INTERVAL = "no interval"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """One line a row, every column as wide as its widest cell; all rows have as many cells."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def from_to(numbers: Iterable[int]) -> str:
    """The least and the largest of at least one number: "3 to 37", or "3" where they are one."""
    found = sorted(numbers)
    return str(found[0]) if found[0] == found[-1] else f"{found[0]} to {found[-1]}"


def given_path(path: str | Path) -> Path:
    """A path as people write it: with blanks around it, with ~ for their own folder."""
    return Path(str(path).strip()).expanduser()


def told_apart(paths: Sequence[Path]) -> list[str]:
    """A name for each of several different paths: its last part or, where others end alike, as many more as tell it from them."""
    return [_told_apart(path, [other for other in paths if other != path]) for path in paths]


def _told_apart(path: Path, others: Sequence[Path]) -> str:
    for count in range(1, len(path.parts)):
        end = path.parts[-count:]
        if all(other.parts[-count:] != end for other in others):
            return "/".join(end)
    return str(path)


def one_line(error: BaseException) -> str:
    """What an error says, in one line; its type where it says nothing."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def unreadable(text: str) -> str | None:
    """What makes a string no text: a lone surrogate (half a character, which no tokenizer reads) or a NUL; None for neither."""
    if "\0" in text:
        return "a NUL character"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"a lone surrogate (\\u{ord(text[error.start]):04x})"
    return None


def once(items: Iterable[Item], what: str) -> tuple[Item, ...]:
    """Each item once, in order: what is named twice adds no evidence. A repetition is logged; `what` names the items."""
    given = tuple(items)
    kept = tuple(dict.fromkeys(given))
    if len(kept) < len(given):
        repeated = ", ".join(str(item) for item in kept if given.count(item) > 1)
        logger.warning("%s: %s named more than once, taken once", what, repeated)
    return kept


def interval_text(low: float | None, high: float | None, form: str = ".3f") -> str:
    """`[0.120, 0.240]`, or `[no interval]` where nothing is known of either end (infinite, or None)."""
    if not has_interval(low, high):
        return f"[{NO_INTERVAL}]"
    return ", ".join(format(end, form) for end in (low, high) if end is not None).join("[]")


def has_interval(low: float | None, high: float | None) -> bool:
    """Whether something is known of an interval: an observation alone has none, its ends are infinite (None in a file)."""
    return any(end is not None and math.isfinite(end) for end in (low, high))
