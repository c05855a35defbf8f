"""Opening a run: its folder's records as one state, the runs that are found, and the model of a run."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from moa_lab.plan import MIN_SPAN, Plan
from moa_lab.records import Front, InfluenceProfile, LossTable, Measurements, candidates
from moa_lab.search import loss_table
from moa_lab.shipped import data_folder
from moa_lab.storage import read_plain
from moa_lab.text import given_path
from moa_lab.workbench.exporting import PLAN
from moa_lab.workbench.launch import RUN_VARIABLE
from moa_lab.workbench.state import State

DEMO = data_folder("runs") / "demo"
MODEL = "smollm2"
RECORDS = ("profile.safetensors", "table.safetensors", "front.json")
"""A folder with one of these is a run that can be shown."""


def default_run() -> Path:
    """The run that `moa-lab lab --run` was given, or else the recorded demo."""
    return Path(os.environ.get(RUN_VARIABLE) or DEMO)


def known_runs(folders: Iterable[Path] | None = None) -> list[Path]:
    """Folders of runs within `folders`, and the default one, each once.

    None: the folders named runs in the working folder (a notebook's own) and in the two above it, and the recorded runs.
    """
    if folders is None:
        here = Path.cwd()
        folders = (*(folder / "runs" for folder in (here, *here.parents[:2])), DEMO.parent)
    found = [path for folder in folders if folder.is_dir() for path in sorted(folder.iterdir()) if _is_run(path)]
    return list(dict.fromkeys(path.resolve() for path in (default_run(), *found)))


def named(path: Path) -> str:
    """A path as text: relative to the working folder where that is shorter."""
    absolute = str(path.resolve())
    try:
        return min(os.path.relpath(absolute), absolute, key=len)
    except ValueError:  # another drive
        return absolute


def open_run(folder: str | Path) -> State:
    """The records of a run's folder (`moa-lab run`): profile, loss table, front, measurements, validation and chosen plan, whichever are
    there, and what its summary warns of.

    Raises ValueError where there is no profile, loss table or front, and for records of models whose heads differ.
    """
    given = given_path(folder)
    if not _is_run(given):
        raise ValueError(f"{folder} holds no profile, loss table or front: run `moa-lab run --out {folder}` first")
    profile, table, front = (given / name for name in RECORDS)
    # The folder of a density has no profile of its own: it is in the run's folder above.
    if not profile.exists() and (given.parent / "settings.json").is_file():
        profile = given.parent / profile.name
    influence = InfluenceProfile.load(profile) if profile.exists() else None
    chosen = Plan.load(given / "plan.json") if (given / "plan.json").exists() else None
    found = Front.load(front) if front.exists() else None
    first = next((point.plan for point in found or ()), None)
    plan = chosen or first
    floor = MIN_SPAN if plan is None else plan.min_span
    losses = LossTable.load(table) if table.exists() else loss_table(influence, min_span=floor) if influence is not None else None
    _check_same_model(given, {profile.name: influence, table.name: losses, front.name: first, "plan.json": chosen})
    return State(
        profile=influence, table=losses, front=found, measurements=_measured(given, chosen),
        plan=chosen, plans=() if chosen is None else (chosen,), validation=validation_of(given), worse=_worse(given),
    )  # fmt: skip


def validation_of(folder: Path) -> Measurements | None:
    """What the front of a run's folder was chosen by; None where there is no such record. Raises RecordError for a broken one."""
    path = folder / "validation.json"
    if not path.exists():
        return None
    found = Measurements.load(path)
    # Refused here and not when it is drawn: the error names the file.
    candidates(found, path)
    return found


def model_of(state: State) -> str:
    """The model that the state's records name, or else the embedded one."""
    records = (state.profile, state.table, state.front, state.plan)
    return next((record.provenance.model for record in records if record is not None and record.provenance.model), MODEL)


def model_title(name: str) -> str:
    """A model's name as it is shown: a file or a folder by its own name, wherever it lay."""
    path = Path(name)
    return path.stem if path.suffix == ".gguf" else path.name if path.is_absolute() else name


def _check_same_model(folder: Path, records: Mapping[str, Any]) -> None:
    """Raise ValueError where records, by file name, are of different geometries."""
    geometries = {name: record.geometry for name, record in records.items() if record is not None}
    for name, geometry in geometries.items():
        first = next(iter(geometries))
        if not geometry.fits(geometries[first]):
            raise ValueError(
                f"{folder / name} is of another model than {first}: it has {geometry}, {first} has {geometries[first]}; "
                "put it back, or choose another folder"
            )


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in RECORDS)


def _worse(folder: Path) -> tuple[str, ...]:
    """Where the run's plan is worse than a simple one, as its summary says; the summaries of older runs do not."""
    path = folder / "summary.json"
    found = read_plain(path) if path.exists() else {}
    told = found.get("worse", []) if isinstance(found, dict) else []
    return tuple(line for line in told if isinstance(line, str)) if isinstance(told, list) else ()


def _measured(folder: Path, chosen: Plan | None) -> Measurements | None:
    """A run's measurements, the rows of its chosen plan with that plan's identity; None where there are none."""
    stored = folder / "measurements.json"
    if chosen is None or not stored.exists():
        return None
    found = Measurements.load(stored)
    rows = [replace(row, detail={**row.detail, PLAN: chosen.identity()}) if row.plan == chosen.name else row for row in found]
    return replace(found, rows=tuple(rows))
