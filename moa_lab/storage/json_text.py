"""JSON as records need it: read strictly, and refused with the place and the reason."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

MAX_DEPTH = 64
"""Records nest some seven deep; Python itself gives up near a thousand, in whatever function happens to be there first."""
MAX_DIGITS = 1000
"""Of a whole number. Python neither reads nor prints more than 4,300."""


class CutJson(ValueError):
    """The text is right as far as it goes, and ends too early."""


def read_text(text: str) -> Any:
    """The data of a JSON text.

    Raises CutJson for a text that ends too early, ValueError with line and column for what is not JSON, and with the field for what
    JSON can write and no record may hold: NaN and infinity, a name that stands twice in an object, half of a surrogate pair, and
    nesting deeper than MAX_DEPTH.
    """
    try:
        data = json.loads(text, object_pairs_hook=_object, parse_int=_whole)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        if _is_cut(text, error):
            raise CutJson(f"the file ends at {where}, before the JSON does") from error
        raise ValueError(f"not JSON at {where}: {_reason(text, error)}; mend it there") from error
    except RecursionError as error:
        raise ValueError(TOO_DEEP) from error
    if flaw := _flaw(data):
        raise ValueError(f"field {field_name(flaw[0])}: {flaw[1]}")
    return data


def field_name(place: Iterable[str | int]) -> str:
    """A place in JSON data: `rows.3.value`."""
    return short(".".join(str(part) for part in place), 160) or "(top)"


def short(value: Any, letters: int = 40) -> str:
    """A value in one line of so many letters at most, in ASCII: errors are shown on any terminal."""
    written = value if isinstance(value, str) else repr(value)
    text = " ".join(written.encode("ascii", "backslashreplace").decode().split())
    return text if len(text) <= letters else f"{text[: letters - 3]}..."


TOO_DEEP = f"nests deeper than {MAX_DEPTH} levels, which no record does"


class _Twice(dict[str, Any]):
    """An object in which `name` stands twice."""

    name = ""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    names = [name for name, _ in pairs]
    doubled = _Twice(found)
    doubled.name = next(name for name in names if names.count(name) > 1)
    return doubled


def _whole(digits: str) -> int | float:
    return int(digits) if len(digits) <= MAX_DIGITS else math.inf


def _is_cut(text: str, error: json.JSONDecodeError) -> bool:
    rest = text[error.pos :].strip()
    return error.msg.startswith("Unterminated string") or any(word.startswith(rest) for word in ("true", "false", "null"))


def _reason(text: str, error: json.JSONDecodeError) -> str:
    before, here = text[: error.pos].rstrip(), text[error.pos :].lstrip()
    if here.startswith(("//", "/*", "#")):
        return "JSON has no comments"
    if here.startswith("'"):
        return "names and texts stand between double quotes"
    if here.startswith(",") or (before.endswith(",") and here.startswith(("}", "]"))):
        return "a comma too many"
    return error.msg[0].lower() + error.msg[1:]


def _flaw(value: Any, depth: int = 0) -> tuple[list[str | int], str] | None:
    """The place of what no record may hold, and what is wrong with it."""
    if isinstance(value, float):
        return None if math.isfinite(value) else ([], "numbers must be finite")
    if isinstance(value, str):
        halves = not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value)
        return ([], "half of a surrogate pair is no text") if halves else None
    if not isinstance(value, dict | list):
        return None
    if depth == MAX_DEPTH:
        return [], TOO_DEEP
    if isinstance(value, _Twice):
        return [value.name], "stands twice"
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        found = _flaw(inner, depth + 1) or _flaw(key)
        if found:
            return [key, *found[0]], found[1]
    return None
