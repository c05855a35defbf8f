"""Records read back: refused by name when they are not what they should be."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Hashable
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open

from moa_lab.storage.json_text import CutJson, field_name, read_text, short

T = TypeVar("T")
JSON_SUFFIX, TENSORS_SUFFIX = ".json", ".safetensors"
STAGE_CURE = "delete it and run its stage again"
"""For what a stage wrote and can write again."""
HAND_CURE = "take a whole copy, or close what is open"
"""For what belongs to the user, who may have no other copy."""


class RecordError(ValueError):
    """A file is truncated, foreign, or of another schema; the message names the file and the cure."""


def read_json(path: str | Path, schema: str, cure: str = STAGE_CURE) -> dict[str, Any]:
    """Read a JSON record whose `schema` field must equal `schema`.

    cure: what to do where the file ends too early. Raises RecordError for a missing, truncated, misspelt or foreign file.
    """
    return check_schema(path, read_plain(path, f"a {schema} record", cure), schema)


def read_plain(path: str | Path, expected: str = "a record in JSON", cure: str = STAGE_CURE) -> Any:
    """Read any JSON file: UTF-8 with or without a byte order mark, as editors leave it, or UTF-16 and UTF-32.

    Raises RecordError that says where the file goes wrong: line and column of what is not JSON, the field of a number that is not
    finite or of a name that stands twice.
    """
    try:
        raw = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise RecordError(f"{path}: no such file; expected {expected}") from error
    except IsADirectoryError as error:
        raise RecordError(f"{path} is a folder; expected {expected}") from error
    except OSError as error:
        raise RecordError(f"{path}: cannot be read ({error.strerror}); expected {expected}") from error
    if _is_safetensors(raw[:9], len(raw)):
        raise RecordError(f"{path}: a safetensors file; expected {expected}, which is JSON")
    try:
        text = raw.decode(json.detect_encoding(raw))
    except UnicodeDecodeError as error:
        raise RecordError(f"{path}: truncated or not JSON: no text in {error.encoding} at byte {error.start}; {cure}") from error
    return _read_text(path, text, cure)


def read_tensors(path: str | Path, schema: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read what `write_tensors` wrote: the arrays, and the description whose `schema` must equal `schema`.

    Raises RecordError for a missing, truncated or foreign file.
    """
    if not Path(path).is_file():
        raise RecordError(f"{path}: no such file; expected a {schema} record")
    with Path(path).open("rb") as stream:
        start = stream.read(64)
    if start.removeprefix(codecs.BOM_UTF8).lstrip()[:1] in (b"{", b"["):
        # A user's own config card, say: it is whole, and must not be called damaged.
        raise RecordError(f"{path}: a JSON file; expected a {schema} record, which is safetensors")
    try:
        with safe_open(path, framework="np") as stream:
            # Before the tensors: a foreign file may hold types that numpy has no word for.
            description = check_schema(path, _described(path, stream), schema)
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 - not a mapping
    except RecordError:
        raise
    except (SafetensorError, ValueError) as error:
        raise RecordError(f"{path}: truncated or not a safetensors file ({error}); {STAGE_CURE}") from error
    return tensors, description


def read_description(path: str | Path) -> Any:
    """The JSON of a record, or what a safetensors record says of itself, told apart by content and not by name.

    Raises RecordError for a file that is neither.
    """
    path = Path(path)
    if path.is_file():
        with path.open("rb") as stream:
            start = stream.read(9)
        if path.suffix == TENSORS_SUFFIX or _is_safetensors(start, path.stat().st_size):
            try:
                with safe_open(path, framework="np") as tensors:
                    return _described(path, tensors)
            except SafetensorError as error:
                raise RecordError(f"{path}: truncated or not a record ({error}); {STAGE_CURE}") from error
    # Nobody knows yet whose it is: it may be a card that has no other copy.
    return read_plain(path, cure=HAND_CURE)


def check_schema(path: str | Path, data: Any, schema: str) -> dict[str, Any]:
    """Return `data` where it is a record of that schema; raise RecordError otherwise."""
    found = data.get("schema") if isinstance(data, dict) else None
    if found != schema:
        raise RecordError(f"{path}: schema is {short(repr(found))}, expected {schema!r}; this is another kind of file")
    return data


def schema_of(path: str | Path) -> str:
    """Return the schema name of a record, JSON or safetensors, for `moa-lab show`; raises RecordError when there is none."""
    data = read_description(path)
    if not isinstance(data, dict) or not isinstance(data.get("schema"), str):
        raise RecordError(f"{path}: not a moa_lab record (it names no schema)")
    return str(data["schema"])


def parse(cls: type[T], data: Any, path: str | Path) -> T:
    """Build a (nested) frozen dataclass from JSON data, whose types are taken at their word: "8" and 8.0 are no whole number.

    Raises RecordError that names the file and the first bad field, also one that `cls` does not have.
    """
    reader: TypeAdapter[T] = _reader(cast(Hashable, cls))
    try:
        value = reader.validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        got = "" if isinstance(first["input"], dict) else f", got {short(first['input'])}"
        reason = first["msg"].removeprefix("Value error, ")
        raise RecordError(f"{path}: field {field_name(first['loc'])}: {reason}{got}") from error
    unknown = _unread(data, reader.dump_python(value))
    if unknown:
        raise RecordError(f"{path}: field {field_name(unknown)}: no such field here; it is misspelt, or a newer moa-lab wrote the file")
    return value


def is_intact(path: str | Path, load: Callable[[Path], object]) -> bool:
    """Tell whether `load(path)` succeeds: a stage that finds an intact record need not run again."""
    try:
        load(Path(path))
    except RecordError:
        return False
    return True


@lru_cache
def _reader(cls: Hashable) -> TypeAdapter[Any]:
    """Building one takes a millisecond; a store of scores is read thousands of times."""
    return TypeAdapter(cast(Any, cls))


def _is_safetensors(start: bytes, size: int) -> bool:
    """Whether a file of `size` bytes begins like safetensors: the length of a header in eight bytes, then the header's brace."""
    return start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= size


def _described(path: str | Path, stream: Any) -> Any:
    try:
        return read_text((stream.metadata() or {}).get("record", "{}"))
    except ValueError as error:
        raise RecordError(f"{path}: truncated or not a safetensors file of moa_lab ({error}); {STAGE_CURE}") from error


def _read_text(path: str | Path, text: str, cure: str) -> Any:
    try:
        return read_text(text)
    except CutJson as error:
        raise RecordError(f"{path}: truncated or not JSON: {error}; {cure}") from error
    except ValueError as error:
        raise RecordError(f"{path}: {error}") from error


def _unread(data: Any, read: Any) -> list[str | int]:
    """The place of a name in `data` that is not in what was read of it; empty where there is none."""
    if isinstance(data, dict) and isinstance(read, dict):
        for name, inner in data.items():
            if name not in read:
                return [name]
            if found := _unread(inner, read[name]):
                return [name, *found]
    elif isinstance(data, list | tuple) and isinstance(read, list | tuple):
        for index, (inner, other) in enumerate(zip(data, read, strict=False)):
            if found := _unread(inner, other):
                return [index, *found]
    return []
