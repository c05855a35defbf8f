"""Profiles from files: of a run's folder or alone, and into the state of a run that keeps none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import ipywidgets as w

from moa_lab.plan import MIN_SPAN
from moa_lab.records import InfluenceProfile
from moa_lab.search import loss_table
from moa_lab.text import given_path
from moa_lab.workbench.measuring import Plans
from moa_lab.workbench.state import State
from moa_lab.workbench.widgets import OWN_WIDTH, Errors, button

FILE = "profile.safetensors"


def profile_file(path: str | Path) -> Path:
    """The file of a profile that is named by itself or by the run's folder. Raises FileNotFoundError where there is none."""
    given = given_path(path)
    file = given / FILE if given.is_dir() else given
    if not str(path).strip() or not file.is_file():
        raise FileNotFoundError(f"there is no profile at {str(path)!r}: name a {FILE}, or the folder of a run")
    return file


def with_profile(state: State, path: str | Path) -> State:
    """The state with the profile of a file or a run's folder and, where it has none, with the loss table that follows from it.

    Raises FileNotFoundError where there is no such file; ValueError for a profile of another model: other heads, or other weights than
    those that the state's records name.
    """
    file = profile_file(path)
    profile, geometry = InfluenceProfile.load(file), Plans(state).geometry
    if geometry is not None and not profile.geometry.fits(geometry):
        raise ValueError(f"{file} is of another model: it has {profile.geometry}, this run has {geometry}")
    records = (state.measurements, state.plan, *state.plans, state.front)
    for origin in (record.provenance for record in records if record is not None):
        if origin.weights and profile.provenance.weights and origin.weights != profile.provenance.weights:
            theirs, ours = profile.provenance.model or "a model without a name", origin.model or "a model without a name"
            raise ValueError(f"{file} is of other weights: it was made with {theirs}, this run with {ours}")
    floor = MIN_SPAN if state.plan is None else state.plan.min_span
    table = loss_table(profile, min_span=floor) if state.table is None else state.table
    return replace(state, profile=profile, table=table, task="", length=0, _watchers=[])


def profile_path(errors: Errors, load: Callable[[str], object], label: str = "profile", tooltip: str = "") -> tuple[w.Text, w.Button]:
    """A box for the file or folder of a profile, and the button that calls `load` with what it holds."""
    path = w.Text(
        placeholder="a run's folder, or its profile.safetensors", description=label, layout=w.Layout(width="400px"), style=OWN_WIDTH
    )
    path.add_class("moa-profile-path")
    pressed = button("Load profile", "load-profile", tooltip)
    pressed.on_click(errors.guard(lambda _: load(path.value)))
    return path, pressed
