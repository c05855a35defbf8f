"""Copy the notebooks of an installed package, and the records they read, to a folder of the user's; nothing is overwritten."""

from __future__ import annotations

import filecmp
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moa_lab.shipped import checkout, data_folder, notebooks_folder
from moa_lab.storage import atomic_path

FIRST = "00_tour.ipynb"
NAME = "moa-lab-notebooks"
RECORDS = ("runs", "studies", "benchmarks", "parity", "pictures")
"""Folders of `data/` that notebooks read or show."""


@dataclass(frozen=True)
class LaidOut:
    """What `lay_out` did: files copied to `folder`, and the user's own, which differ from this version's and stay."""

    folder: Path
    copied: tuple[Path, ...]
    kept: tuple[Path, ...]

    def __str__(self) -> str:
        size = sum((self.folder / path).stat().st_size for path in self.copied)
        copied = f", {len(self.copied)} files copied there ({size / 1e6:.1f} MB)" if self.copied else ""
        names = ", ".join(path.name for path in self.kept)
        kept = f"; yours stay as they are: {names} (--notebooks DIR puts this version's into another folder)" if self.kept else ""
        return f"notebooks are in {self.folder / 'notebooks'}{copied}{kept}"


def user_folder() -> Path | None:
    """Where notebooks are copied to unless the user names a folder: NAME in the working folder, or that folder itself where it is one.

    None in a checkout, whose notebooks are opened where they are.
    """
    here = Path.cwd()
    if checkout() is not None:
        return None
    return here if (here / "notebooks" / FIRST).is_file() else here / NAME


def lay_out(folder: Path) -> LaidOut:
    """Copy the notebooks and what they read to `folder`, each file that is not there yet.

    Raises ValueError where they did not come with the package, OSError where `folder` cannot be written.
    """
    folder = folder.expanduser().resolve()
    copied, kept = [], []
    for source, place in _shipped():
        target = folder / place
        if not os.path.lexists(target):
            with atomic_path(target) as temporary:
                shutil.copyfile(source, temporary)
            copied.append(place)
        elif not (target.is_file() and filecmp.cmp(source, target, shallow=False)):
            kept.append(place)
    return LaidOut(folder, tuple(copied), tuple(kept))


def _shipped() -> Iterator[tuple[Path, Path]]:
    """Every file with its place in the user's folder, where notebooks find `../data` as they do in a checkout."""
    roots = {notebooks_folder(): Path("notebooks")} | {data_folder(name): Path("data", name) for name in RECORDS}
    if not (notebooks_folder() / FIRST).is_file():
        raise ValueError(f"the notebooks are not in {notebooks_folder()}: install moa-lab again, or take a checkout of the project")
    for root, place in roots.items():
        for source in sorted(root.rglob("*")):
            # Skip what JupyterLab leaves beside notebooks, for instance .ipynb_checkpoints.
            if source.is_file() and not any(part.startswith(".") for part in source.relative_to(root).parts):
                yield source, place / source.relative_to(root)
