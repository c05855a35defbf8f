"""Files that survive a kill: written to a temporary name, then renamed."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

ENDS = ("low", "high")
"""Fields that hold the ends of an interval."""


_UMASK = threading.Lock()


def umask() -> int:
    """The permissions that new files lack."""
    # Reading it means setting it: two threads that do so at once would leave the process with 0.
    with _UMASK:
        found = os.umask(0)
        os.umask(found)
    return found


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it over `path` only when the block succeeds.

    Raises OSError (for instance: no space left) with `path` untouched and the temporary file removed.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        # mkstemp makes private files; a record is as readable as any other file of its owner.
        temporary.chmod(0o666 & ~umask())
        temporary.replace(target)
    except OSError as error:
        # A write that finds the disk full names no file.
        if error.errno and error.filename is None:
            error.filename = str(target)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> Path:
    """Write UTF-8 text atomically and return the path."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def write_json(path: str | Path, value: Any) -> Path:
    """Write JSON atomically; NaN and infinities are refused with ValueError because JSON has no word for them."""
    return write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_tensors(path: str | Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> Path:
    """Write named arrays and a JSON-able description as one safetensors file, atomically."""
    contiguous = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    description = {"record": json.dumps(metadata, allow_nan=False)}
    with atomic_path(path) as temporary:
        try:
            save_file(contiguous, temporary, metadata=description)
        except SafetensorError as error:
            # safetensors has an error of its own for a full disk.
            raise OSError(f"{path}: {error}") from error
    return Path(path)


def to_json(value: Any) -> Any:
    """Return a frozen dataclass as plain JSON data; ends of intervals that are infinite, as nothing is known of them, are null."""
    return asdict(value, dict_factory=lambda fields: {name: end_to_json(value) if name in ENDS else value for name, value in fields})


def end_to_json(end: Any) -> Any:
    """An end of an interval in JSON, which has no word for infinity: null."""
    return None if isinstance(end, float) and math.isinf(end) else end
