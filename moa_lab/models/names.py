"""What a model name means: an embedded model, a .gguf file here or on the hub, a folder, or a hub id."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from moa_lab.models.embedded import EMBEDDED, embedded_file
from moa_lab.models.hub import check_hub
from moa_lab.storage.hub import hub_file

FILE_OF_REPOSITORY = re.compile(r"([\w.-]+/[\w.-]+):(.+\.gguf)", re.IGNORECASE)
NAMES_SHOWN = 3


@dataclass(frozen=True)
class Source:
    """Where a model's files are: `gguf`, one file with everything in it, or else `place`, a folder or a hub id."""

    place: str
    gguf: Path | None = None

    @property
    def is_here(self) -> bool:
        """Whether everything is on this machine already."""
        return self.gguf is not None or Path(self.place).is_dir()


def is_gguf(name: str) -> bool:
    """Whether a model of this name comes from a GGUF file."""
    return name in EMBEDDED or name.lower().endswith(".gguf")


def source_of(name: str) -> Source:
    """Find the model of that name; `owner/repository:file.gguf` is fetched from the hub, or found in the hub's cache.

    Raises ValueError, in one line that names the cure, for an unknown name.
    """
    if name in EMBEDDED:
        return _in_file(embedded_file(name))
    path = Path(name).expanduser()
    if is_gguf(name):
        if path.is_file():
            return _in_file(path)
        if on_hub := FILE_OF_REPOSITORY.fullmatch(name):
            return _in_file(hub_file(f"model {name!r}", *on_hub.groups()))
        raise ValueError(f"model {name!r}: no such file; give the path of an existing .gguf")
    if path.is_dir():
        if not (path / "config.json").is_file():
            wanted = f"a folder written by save_pretrained, or a .gguf file{_files_in(path)}"
            raise ValueError(f"model {name!r}: the folder holds no config.json; give {wanted}")
        return Source(str(path))
    if path.exists():
        raise ValueError(f"model {name!r} is a file that is not a .gguf; give a folder, a .gguf file or a hub id")
    if name.startswith((".", "~", "/")) or name.count("/") > 1:
        raise ValueError(f"model {name!r}: no such folder; give an existing folder or .gguf file, a hub id, or one of {sorted(EMBEDDED)}")
    check_hub(name, sorted(EMBEDDED))
    return Source(name)


def _in_file(path: Path) -> Source:
    return Source(str(path.parent), path)


def _files_in(folder: Path) -> str:
    found = sorted(str(path) for path in folder.iterdir() if path.suffix.lower() == ".gguf")[:NAMES_SHOWN]
    return f" (here: {', '.join(found)})" if found else ""
