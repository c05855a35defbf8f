"""A record that is made once: read where it is on disk, made and saved where it is not."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from moa_lab import processes
from moa_lab.storage import RecordError


class Kept(Protocol):
    """What can be saved."""

    def save(self, path: Path, /) -> object:
        """Write it to `path`."""


Record = TypeVar("Record", bound=Kept)

logger = logging.getLogger(__name__)


def kept_or_made(
    path: Path, load: Callable[[Path], Record], make: Callable[[], Record], *, by_first: bool = False,
    timing: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Record:  # fmt: skip
    """The record at `path`, the same in all processes of a run, as it is read from then on.

    make: where it is missing or broken; its first process alone if `by_first`, else all of them. timing: entered while it is made.
    """
    found = processes.from_first(lambda: _kept(path, load))
    if found is None:
        with timing():
            made = processes.from_first(make) if by_first else make()
            found = processes.from_first(lambda: _saved(made, path, load))
    return found


def _kept(path: Path, load: Callable[[Path], Record]) -> Record | None:
    if path.exists():
        try:
            return load(path)
        except RecordError as error:
            logger.warning("%s; making it again", error)
    return None


def _saved(made: Record, path: Path, load: Callable[[Path], Record]) -> Record:
    made.save(path)
    return load(path)
