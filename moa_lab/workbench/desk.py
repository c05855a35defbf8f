"""The whole workbench: the panels over one state, in tabs."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ipywidgets as w

from moa_lab.models import load_model
from moa_lab.plan import Plan
from moa_lab.records import Front, InfluenceProfile, LossTable, Measurements
from moa_lab.search import loss_table
from moa_lab.workbench.budget_panel import BudgetPanel
from moa_lab.workbench.export_panel import ExportPanel
from moa_lab.workbench.exporting import PLAN
from moa_lab.workbench.front_panel import FrontPanel
from moa_lab.workbench.heads_panel import HeadsPanel
from moa_lab.workbench.launch import RUN_VARIABLE
from moa_lab.workbench.measure_panel import MeasurePanel
from moa_lab.workbench.measuring import Measuring
from moa_lab.workbench.state import State
from moa_lab.workbench.widgets import STYLE

DEMO = Path(__file__).resolve().parents[2] / "data" / "runs" / "demo"


class Workbench:
    """Panels over `state`. In a notebook the last line of a cell shows it. panels: by the title of their tab.

    model: what `load_model` takes; it is loaded when something is measured first.
    """

    def __init__(self, state: State, model: str = "smollm2", **sizes: Any) -> None:
        self.state = state
        makes: list[tuple[str, Callable[[], Any]]] = [
            ("Heads", lambda: HeadsPanel(state)), ("Budget", lambda: BudgetPanel(state)), ("Front", lambda: FrontPanel(state)),
            ("Apply & measure", lambda: MeasurePanel(state, lambda: Measuring(*load_model(model)), **sizes)),
            ("Export", lambda: ExportPanel(state)),
        ]  # fmt: skip
        needed = {"Heads": state.profile, "Budget": state.table}
        # The budget first: it chooses the plan that the others show.
        order = sorted(makes, key=lambda made: made[0] != "Budget")
        self.panels = {title: make() for title, make in order if needed.get(title, state) is not None}
        titles = [title for title, _ in makes if title in self.panels]
        self.tabs = w.Tab([self.panels[title].box for title in titles], titles=titles)
        self.dark = w.ToggleButton(description="dark figures", value=state.dark, layout=w.Layout(width="auto"))
        self.dark.observe(lambda change: state.set(dark=change["new"]), "value")
        self.tabs.observe(lambda change: state.set(tab=titles[change["new"]]), "selected_index")
        state.set(tab=titles[self.tabs.selected_index or 0])
        self.box = w.VBox([w.HTML(STYLE), w.HBox([self.dark]), self.tabs])
        self.box.add_class("moa-bench")

    @classmethod
    def open(cls, run: str | Path | None = None, model: str = "smollm2", **sizes: Any) -> Workbench:
        """The workbench over the records of a run's folder (`moa-lab run`): profile, loss table, front, measurements, whichever are there.

        run: None for the folder that `moa-lab lab --run` was given, or else the recorded demo.

        Raises ValueError where none is.
        """
        folder = Path(run or os.environ.get(RUN_VARIABLE) or DEMO)
        profile = InfluenceProfile.load(folder / "profile.safetensors") if (folder / "profile.safetensors").exists() else None
        stored = folder / "table.safetensors"
        table = LossTable.load(stored) if stored.exists() else loss_table(profile) if profile is not None else None
        front = Front.load(folder / "front.json") if (folder / "front.json").exists() else None
        if profile is None and table is None and front is None:
            raise ValueError(f"{folder} holds no profile, loss table or front: run `moa-lab run --out {folder}` first")
        return cls(State(profile=profile, table=table, front=front, measurements=_measured(folder)), model, **sizes)

    def show(self, title: str) -> w.Widget:
        """Turn to a panel, and return the whole."""
        self.tabs.selected_index = list(self.tabs.titles).index(title)
        return self.box

    def _ipython_display_(self) -> None:
        # Found by IPython; only in a notebook is there one.
        from IPython.display import display

        display(self.box)


def _measured(folder: Path) -> Measurements | None:
    """What a run measured, the rows of its chosen plan with that plan's identity; None where nothing was."""
    stored, chosen = folder / "measurements.json", folder / "plan.json"
    if not (stored.exists() and chosen.exists()):
        return None
    found, plan = Measurements.load(stored), Plan.load(chosen)
    rows = [replace(row, detail={**row.detail, PLAN: plan.identity()}) if row.plan == plan.name else row for row in found]
    return replace(found, rows=tuple(rows))
