"""Read a GGUF file once, and quickly; transformers alone would read it three times."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

# `reading` replaces two names of the gguf package for as long as its block runs.
_LOCK = threading.RLock()


class QuickReader(gguf.GGUFReader):
    """gguf's reader over plain arrays, whose slices are ten times as fast as those of a memory map."""

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: str | None = None) -> np.ndarray:
        order = np.dtype(dtype).newbyteorder(override_order or self.byte_order)
        size = int(count) * order.itemsize
        # gguf's own reader silently returns fewer values past the end of the file.
        if offset + size > len(self.data):
            raise ValueError(f"the file ends after {len(self.data):,} bytes, within its contents; fetch it again")
        return np.frombuffer(self.data, np.uint8, size, int(offset)).view(order)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[gguf.GGUFReader]:
    """Within the block every `gguf.GGUFReader` of this file, also in transformers, is the one that is yielded.

    gguf's table of tensor names is cached as well: transformers would rebuild it for every module of a model.
    """
    with _LOCK:
        reader = QuickReader(path)
        package: Any = gguf
        original, names = package.GGUFReader, package.get_tensor_name_map

        def the_same(wanted: Any, *arguments: Any, **settings: Any) -> gguf.GGUFReader:
            return reader if Path(wanted).samefile(path) else original(wanted, *arguments, **settings)

        package.GGUFReader, package.get_tensor_name_map = the_same, functools.cache(names)
        try:
            yield reader
        finally:
            package.GGUFReader, package.get_tensor_name_map = original, names


def value_of(reader: gguf.GGUFReader, key: str, default: Any = None) -> Any:
    """The value of a metadata key, or `default` where the file has none."""
    field = reader.get_field(key)
    return default if field is None else field.contents()
