"""The folder of unpacked GGUF files in the cache: entries that appear whole or not at all."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moa_lab.models.embedded import cache_folder, sha256_of
from moa_lab.storage import RecordError, parse, read_json, to_json, umask, write_json

# Raise the number when unpacking or the tokenizer's settings change: entries of another number are not read.
SCHEMA = "moa_lab.unpacked/1"
RECORD = "unpacked.json"
WEIGHTS = ".safetensors"
ABANDONED_S = 24 * 3600


@dataclass(frozen=True)
class Entry:
    """The description that an entry holds of itself.

    source: name of the GGUF file. weights: fingerprint of the model. tokenizer: its settings beside tokenizer.json.
    sizes: bytes of every file. sha256: of all but the weights, whose bytes would take longer to hash than to read.
    """

    source: str
    dtype: str
    weights: str
    tokenizer: dict[str, Any]
    sizes: dict[str, int]
    sha256: dict[str, str]


def unpacked_folder() -> Path:
    """Folder of the entries."""
    return cache_folder() / "unpacked"


def describe(folder: Path, **said: Any) -> None:
    """Write the description of a folder into it, as its last file. said: the fields of `Entry` other than sizes and hashes."""
    files = sorted(path for path in folder.iterdir() if path.name != RECORD)
    sizes = {path.name: path.stat().st_size for path in files}
    entry = Entry(sizes=sizes, sha256={path.name: sha256_of(path) for path in files if path.suffix != WEIGHTS}, **said)
    write_json(folder / RECORD, {"schema": SCHEMA, **to_json(entry)})


def entry_of(folder: Path) -> Entry:
    """The description of an entry. Raises RecordError where its files do not match it."""
    data = read_json(folder / RECORD, SCHEMA)
    entry = parse(Entry, {key: value for key, value in data.items() if key != "schema"}, folder / RECORD)
    for name, size in entry.sizes.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size or (name in entry.sha256 and sha256_of(path) != entry.sha256[name]):
            raise RecordError(f"{path} is not the file that was written")
    return entry


@contextlib.contextmanager
def new_entry(name: str) -> Iterator[Path]:
    """An empty folder that becomes entry `name` when the block succeeds, and vanishes when it does not.

    Where another process was first, its entry stays: both hold the same.
    """
    root = unpacked_folder()
    root.mkdir(parents=True, exist_ok=True)
    _drop_abandoned(root)
    folder = Path(tempfile.mkdtemp(dir=root, prefix=f".{name}."))
    try:
        yield folder
        # mkdtemp makes private folders; an entry is as readable as any other of its owner.
        folder.chmod(0o777 & ~umask())
        try:
            folder.rename(root / name)
        except OSError:
            if not (root / name / RECORD).is_file():
                raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def kept_models() -> list[tuple[str, int]]:
    """What the cache keeps unpacked: "FILE (dtype)" and bytes of every entry; "unfinished" for one without a valid description."""
    found = []
    for folder in sorted(unpacked_folder().iterdir() if unpacked_folder().is_dir() else ()):
        try:
            data = read_json(folder / RECORD, SCHEMA)
            name = f"{data.get('source')} ({data.get('dtype')})"
        except RecordError:
            name = "unfinished"
        found.append((name, sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())))
    return found


def clear_kept() -> int:
    """Remove all entries; returns the bytes that were freed."""
    freed = sum(size for _, size in kept_models())
    shutil.rmtree(unpacked_folder(), ignore_errors=True)
    return freed


def _drop_abandoned(root: Path) -> None:
    """Remove what killed processes left: temporary folders a day old."""
    for folder in root.glob(".*"):
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > ABANDONED_S:
                shutil.rmtree(folder, ignore_errors=True)
