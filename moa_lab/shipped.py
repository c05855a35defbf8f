"""Where the files are that come with the code: inside an installed package, beside it in a checkout."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def checkout(package: Path = PACKAGE) -> Path | None:
    """The project's folder; None where the package is installed and there is none."""
    return None if _carried(package).is_dir() else package.parent


def data_folder(name: str, package: Path = PACKAGE) -> Path:
    """The folder `data/NAME` of the project: texts, runs, studies, benchmarks, parity."""
    project = checkout(package)
    return _carried(package) / name if project is None else project / "data" / name


def notebooks_folder(package: Path = PACKAGE) -> Path:
    """The notebooks as they come: those of an installed package are copied before they are run."""
    project = checkout(package)
    return (_carried(package) if project is None else project) / "notebooks"


def _carried(package: Path) -> Path:
    # A wheel carries data inside the package; beside an installed package, `data` would be somebody else's folder.
    return package / "_data"
