"""Where a number came from: carried by every record."""

from __future__ import annotations

import hashlib
import platform
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

PACKAGES = ("moa-lab", "torch", "transformers", "numpy", "scipy", "pymoo")


@dataclass(frozen=True)
class Provenance:
    """Model, data, seed, versions, device, command and UTC time behind a record.

    `weights` and `tokenizer` are short fingerprints (see `moa_lab.models`), `calibration` the hash of the samples;
    None where a record does not depend on one.
    """

    model: str | None = None
    weights: str | None = None
    tokenizer: str | None = None
    calibration: str | None = None
    seed: int | None = None
    device: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    command: str = ""
    created: str = ""


def provenance(
    model: str | None = None,
    weights: str | None = None,
    tokenizer: str | None = None,
    calibration: str | None = None,
    seed: int | None = None,
    device: str | None = None,
) -> Provenance:
    """Return a Provenance with versions, command and time filled in from this process."""
    return Provenance(
        model=model,
        weights=weights,
        tokenizer=tokenizer,
        calibration=calibration,
        seed=seed,
        device=device or platform.machine(),
        versions=versions(),
        command=_command(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result; packages that are not installed are left out."""
    found = {name: version_of(name) for name in PACKAGES}
    return {"python": platform.python_version()} | {name: version for name, version in found.items() if version is not None}


def version_of(package: str) -> str | None:
    """The version of an installed package; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def digest(*parts: bytes) -> str:
    """Return a short (16 hex digits) SHA-256 of the parts in order."""
    state = hashlib.sha256()
    for part in parts:
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)
    return state.hexdigest()[:16]


def _command() -> str:
    program = Path(sys.argv[0]).name
    return " ".join(["python -m moa_lab" if program == "__main__.py" else program, *sys.argv[1:]])
