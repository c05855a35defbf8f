"""Rows of local files: JSON lines, JSON, CSV, TSV, Parquet and plain text, compressed or not, one file or a folder of them."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import importlib
import io
import json
import logging
import lzma
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

logger = logging.getLogger(__name__)

Row = Mapping[str, Any]

TEXT = "document"
"""The one column of a plain text file."""

UNPACK: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.decompress, ".bz2": bz2.decompress, ".xz": lzma.decompress}
DAMAGED = (ValueError, OSError, EOFError, RecursionError, csv.Error, lzma.LZMAError, zlib.error)


@dataclass(frozen=True)
class Table:
    """Rows of one file or hub dataset. stem: how the names of its documents begin. columns: whether the source has named columns."""

    source: str
    stem: str
    rows: Sequence[Row]
    columns: bool = True


class _Refused(ValueError):
    """An error whose message already names the fault and its cure."""


def is_file_name(name: str) -> bool:
    """Tell whether a name ends like a file that can be read here."""
    return _kind(Path(name)) is not None


def read_tables(path: Path) -> list[Table]:
    """The rows of a file, or of all files of a folder (and its folders), in the order of their names.

    Raises ValueError, in one line with the cure: no such file, a folder without such files or with several formats, a damaged file
    (with the line where there is one).
    """
    if not path.is_dir():
        return [_table(path)]
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and not _is_hidden(file.relative_to(path))]
    readable = [file for file in files if _kind(file)]
    if not readable:
        raise ValueError(f"{path}: the folder holds no {FORMATS} file")
    kinds = sorted({str(_kind(file)) for file in readable})
    if len(kinds) > 1:
        raise ValueError(f"{path}: the folder holds several formats ({', '.join(kinds)}); give one file, or a folder of one format")
    if len(readable) < len(files):
        logger.warning("%s: left out %d files that are no %s", path, len(files) - len(readable), kinds[0])
    return [_table(file) for file in readable]


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _kind(path: Path) -> str | None:
    """The suffix of the format in lower case, without that of the compression; None for an unknown one."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in (*UNPACK, ".zst"):
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in READERS else None


def _table(path: Path) -> Table:
    kind = _kind(path)
    if kind is None or not path.is_file():
        raise ValueError(f"{path}: no such file; give a {FORMATS} file or a folder of them")
    packing = path.suffix.lower()
    if packing == ".zst":
        raise ValueError(f"{path}: cannot be unpacked here; unpack it first, or pack it as {', '.join(UNPACK)}")
    stem = path.name[: -len(path.suffix)] if packing in UNPACK else path.name
    try:
        content = path.read_bytes()
        rows = READERS[kind](UNPACK[packing](content) if packing in UNPACK else content)
    except _Refused as error:
        raise ValueError(f"{path}: {error}") from error
    except ImportError as error:
        raise ValueError(f"{path}: Parquet files need the package pyarrow; pip install pyarrow, or give another format") from error
    except DAMAGED as error:
        raise ValueError(f"{path}: truncated or not {kind[1:].upper()} ({first_line(error)}); fetch or write it again") from error
    return Table(str(path), stem[: -len(kind)], rows, columns=kind != ".txt")


def _decoded(content: bytes) -> str:
    """The text of a file, in UTF-8 with or without a byte order mark, or in UTF-16 with one."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The error's positions do not count the byte order mark.
        content = content.removeprefix(codecs.BOM_UTF8)
        line = content.count(b"\n", 0, error.start) + 1
        raise _Refused(f"line {line} is not UTF-8 (byte 0x{content[error.start]:02x}); write the file as UTF-8") from error


def _read_json(content: bytes) -> list[Row]:
    """A list of objects, or one object a line: `datasets` itself writes lines into files named .json."""
    text = _decoded(content)
    if text.lstrip().startswith("["):
        rows = json.loads(text)
    else:
        rows = [_json_line(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip("\ufeff \t\r")]
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} is {type(row).__name__}, expected an object with a key for each column")
    return cast(list[Row], rows)


def _json_line(number: int, line: str) -> Any:
    try:
        # Files that were joined have a byte order mark in the middle.
        return json.loads(line.lstrip("\ufeff"))
    except json.JSONDecodeError as error:
        raise ValueError(f"line {number}: {error}") from error


def _read_csv(content: bytes, dialect: str = "excel") -> list[Row]:
    text = _decoded(content)
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise _Refused(f"line {line} holds a NUL character, which no text has; remove it")
    # Documents are longer than the 128 kB that csv allows a field by default.
    previous = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), dialect=dialect, strict=True)
        _check_once(reader.fieldnames or (), "line 1: column")
        rows = []
        for row in reader:
            # DictReader gives None for missing fields, and collects surplus fields under the key None.
            if None in row or None in row.values():
                raise ValueError(f"line {reader.line_num} has another number of fields than the header")
            rows.append(row)
        return cast(list[Row], rows)
    finally:
        csv.field_size_limit(previous)


def _check_once(names: Sequence[str], where: str) -> None:
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise _Refused(f"{where} {repeated!r} stands twice; name each once")


def _read_tsv(content: bytes) -> list[Row]:
    return _read_csv(content, "excel-tab")


def _read_text(content: bytes) -> list[Row]:
    """One document, or several that are separated by form feeds."""
    return [{TEXT: part} for part in _decoded(content).split("\f") if part.strip()]


def _read_parquet(content: bytes) -> list[Row]:
    parquet = importlib.import_module("pyarrow.parquet")
    return cast(list[Row], parquet.read_table(io.BytesIO(content)).to_pylist())


def first_line(error: BaseException) -> str:
    """The type of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


READERS: dict[str, Callable[[bytes], Sequence[Row]]] = {
    ".jsonl": _read_json, ".ndjson": _read_json, ".json": _read_json, ".csv": _read_csv, ".tsv": _read_tsv, ".txt": _read_text,
    ".parquet": _read_parquet,
}  # fmt: skip
FORMATS = ", ".join(READERS)
