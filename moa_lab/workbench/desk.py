"""The whole workbench: the panels over one state, in tabs."""

from __future__ import annotations

import contextlib
import html
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ipywidgets as w

from moa_lab.models import load_model, weight_count
from moa_lab.models.size import is_at_hand
from moa_lab.text import given_path
from moa_lab.workbench.across import Across
from moa_lab.workbench.across_panel import TAB as RUNS
from moa_lab.workbench.across_panel import AcrossPanel
from moa_lab.workbench.advice_panel import TAB as WHICH
from moa_lab.workbench.advice_panel import AdvicePanel
from moa_lab.workbench.budget_panel import BudgetPanel, budget_of
from moa_lab.workbench.export_panel import ExportPanel
from moa_lab.workbench.front_panel import FrontPanel
from moa_lab.workbench.head_line import HeadLine
from moa_lab.workbench.heads_panel import HeadsPanel
from moa_lab.workbench.jobs import Job
from moa_lab.workbench.loaded import Loaded, Pair
from moa_lab.workbench.measure_panel import TAB as MEASURE
from moa_lab.workbench.measure_panel import MeasurePanel
from moa_lab.workbench.measuring import Measuring, Plans
from moa_lab.workbench.opening import default_run, known_runs, model_of, named, open_run
from moa_lab.workbench.page import Keys, PageTheme, PageWidth
from moa_lab.workbench.panels import Panels
from moa_lab.workbench.plan_heads_panel import PlanHeadsPanel
from moa_lab.workbench.profiles import with_profile
from moa_lab.workbench.state import State
from moa_lab.workbench.told import Told
from moa_lab.workbench.trace_panel import TAB, TracePanel
from moa_lab.workbench.tracing import Tracing
from moa_lab.workbench.widgets import OWN_WIDTH, STYLE, Errors, button, row, without_null


class Workbench:
    """Panels over `state`. In a notebook the last line of a cell shows it. panels: by the title of their tab, each made at the first look.

    model: what `load_model` takes, loaded at the first measurement; None: the one that the records name. Opening another run replaces
    `state` and `panels`.
    """

    def __init__(self, state: State, model: str | None = None, run: str | Path | None = None, **sizes: Any) -> None:
        self.errors, self._sizes, self._open = Errors("open"), sizes, False
        self._loaded = Loaded(lambda: self._named_model, self._load)
        self._counting: Job[int] | None = None
        self.tabs = w.Tab()
        self.dark = w.ToggleButton(description="dark figures", value=state.dark, layout=w.Layout(width="auto"))
        self.run = w.Combobox(
            value=str(run or ""), options=[named(path) for path in known_runs()], description="run", placeholder="a run's folder",
            layout=w.Layout(width="340px"), style=OWN_WIDTH,
        )  # fmt: skip
        self.run.add_class("moa-run")
        self.model = w.Text(description="model", continuous_update=False, layout=w.Layout(width="220px"), style=OWN_WIDTH)
        self.model.add_class("moa-model")
        again = button("Open run", "open-run", "its profile, loss table, front, plan and measurements, in all panels")
        again.on_click(self.errors.guard(lambda _: self.reopen(self.run.value)))
        self.model.observe(self.errors.guard(lambda change: self._new_model(change["old"])), "value")
        self.worse = w.HTML()
        self.worse.add_class("moa-worse")
        theme = PageTheme(dark=state.dark)
        theme.observe(lambda change: setattr(self.dark, "value", change["new"]), "dark")
        self.width = PageWidth()
        self.width.observe(self.errors.guard(lambda change: self.state.set(width=change["new"]), keep=True), "width")
        self.dark.observe(lambda change: self.state.set(dark=change["new"]), "value")
        self.tabs.observe(self.errors.guard(lambda change: self._turned(change["new"])), "selected_index")
        self.keys, self.head = Keys(), w.VBox([])
        self.keys.on_msg(self.errors.guard(lambda _, content, __: self.press(content["key"])))
        self._look_at(state, model)
        opened = row(self.run, again, self.model, self.dark)
        without_null(opened)
        self.box = w.VBox([w.HTML(STYLE), theme, self.width, self.worse, opened, self.errors.box, self.head, self.tabs, self.keys])
        self.box.add_class("moa-bench")

    @classmethod
    def open(cls, run: str | Path | None = None, model: str | None = None, **sizes: Any) -> Workbench:
        """The workbench over the records of a run's folder (`moa-lab run`): profile, loss table, front, measurements, whichever are there.

        run: None for the folder that `moa-lab lab --run` was given, or else the recorded demo. Raises ValueError where there is no run.
        """
        folder = given_path(run) if run is not None else default_run()
        told = Told(f"opening {named(folder)}: its records, then the panels ...")
        made = cls(open_run(folder), model, named(folder), **sizes)
        told.say(f"opened {named(folder)}")
        return made

    def reopen(self, run: str | Path, model: str | None = None) -> None:
        """Show another run instead. Raises ValueError, and changes nothing, where there is none."""
        if not str(run).strip():
            raise ValueError("name the folder of a run")
        state = open_run(run)
        state.dark, state.width = self.state.dark, self.state.width
        self.run.value = str(run).strip()
        self._instead(state, model)

    def load_profile(self, path: str | Path) -> None:
        """Show the run with the profile of a file or a folder, in all panels. Raises ValueError, and changes nothing, as `with_profile`."""
        self._instead(with_profile(self.state, path), self.model.value)

    def show(self, title: str) -> w.Widget:
        """Select a panel, and return the whole workbench. Raises ValueError for an unknown title."""
        if title not in self.panels:
            raise ValueError(f"there is no panel {title!r}; there are {', '.join(self.panels)}")
        self.tabs.selected_index = list(self.tabs.titles).index(title)
        return self.box

    def press(self, key: str) -> None:
        """What a key does on a map of heads: "left", "right", "up" and "down" move the selected head on it, "space" pins it in the budget,
        or releases it. Raises ValueError for another key, and where there is no budget to pin in.
        """
        # The line tells of what was done last, though the pointer may rest on the map.
        self.state.set(hovered=None)
        moves = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
        if key == "space":
            budget = self.panels.get("Budget")
            if budget is None:
                raise ValueError("a head is pinned in a budget, which needs a loss table")
            budget.toggle_pin()
            self.line.tell()
        elif key in moves:
            # A panel whose map may have its heads in another order than by number steps on that map.
            panel = self.panels[self.state.tab]
            getattr(panel, "step", self.state.step)(*moves[key])
        else:
            raise ValueError(f"keys are {', '.join(moves)} and space, got {key!r}")

    def _instead(self, state: State, model: str | None) -> None:
        """Show another state; what runs is asked to stop."""
        for panel in self.panels.made.values():
            for work in getattr(panel, "works", ()):
                work.stop()
        self._look_at(state, model)

    def _across(self) -> Across:
        """The run that is open, the first of those that are compared."""
        across = Across()
        # A state that no run holds, and a run that has only begun, have no results.
        with contextlib.suppress(ValueError, OSError):
            across.open(self.run.value)
        return across

    def _look_at(self, state: State, model: str | None) -> None:
        self.state, self._open, self._counting = state, False, None
        self.model.value = model or model_of(state)
        warned = "".join(f"<p>{html.escape(line)}</p>" for line in state.worse)
        self.worse.value = f'<div class="moa-error" role="note">{warned}</div>' if warned else ""
        self.worse.layout.display = "" if warned else "none"
        makes: dict[str, Callable[[], Any]] = {
            "Heads": lambda: HeadsPanel(state) if state.profile is not None else PlanHeadsPanel(state, self.load_profile),
            "Budget": lambda: BudgetPanel(state, measuring=lambda: Measuring(*self._loaded()), budget=budget),
            "Front": lambda: FrontPanel(state),
            WHICH: lambda: AdvicePanel(state),
            RUNS: lambda: AcrossPanel(state, self._across()),
            TAB: lambda: TracePanel(state, lambda: Tracing(*self._loaded()), lambda: panels.get("Budget")),
            MEASURE: lambda: MeasurePanel(state, lambda: Measuring(*self._loaded()), **self._sizes),
            "Export": lambda: ExportPanel(state, tracing=lambda: panels.made[TAB].tracing if TAB in panels.made else None),
        }
        needed = {"Heads": Plans(state).geometry, "Budget": state.table}
        panels = self.panels = Panels({title: make for title, make in makes.items() if needed.get(title, state) is not None})
        # Set before the panels are made: hidden panels draw only when they are selected.
        state.set(tab=next(iter(panels)))
        # The budget first: it chooses the plan that the panels show.
        budget = None if state.table is None else budget_of(state)
        if budget is not None:
            state.set(plan=budget.answer().plan, n_tokens=budget.n_tokens)
        heads = panels.get("Heads")
        self.line = HeadLine(
            state, None if heads is None else heads.known, lambda: panels["Budget"].pins_of(state.plan) if "Budget" in panels.made else ()
        )
        self.head.children = (self.line.box,)
        self.tabs.children, self.tabs.titles = list(panels.boxes.values()), list(panels)
        self.tabs.selected_index, self._open = 0, True
        self._turned(0)

    @property
    def _named_model(self) -> str:
        return str(self.model.value).strip()

    def _new_model(self, before: str) -> None:
        """Take the model that is named now. Raises ValueError while one is at work: then its name stays."""
        if not self._open:
            return
        made = self.panels.made
        users = [*(made[title] for title in (TAB, MEASURE) if title in made), *([made["Budget"].curves] if "Budget" in made else [])]
        try:
            for user in users:
                user.check_idle()
        except ValueError:
            self._open = False
            self.model.value, self._open = before, True
            raise
        for user in users:
            user.another_model()
        self._counting = None
        self.state.set(weights_bytes=0)
        self._turned(self.tabs.selected_index)

    def _turned(self, index: int | None) -> None:
        titles = list(self.panels)
        title = titles[index if index is not None and index < len(titles) else 0]
        self.state.set(tab=title)
        # Made now, if this is the first look at it.
        self.panels[title]
        if self.state.tab in ("Budget", WHICH) and self._counting is None:
            self._count_weights()

    def _load(self, name: str) -> Pair:
        model, tokenizer = load_model(name)
        # Another run, or another model, may have been named meanwhile.
        if name == self._named_model:
            self.state.set(weights_bytes=2 * sum(weight.numel() for weight in model.parameters()))
        return model, tokenizer

    def _count_weights(self) -> None:
        """Read the size of the model beside all else, once a panel wants it; what is not on this machine is not fetched for that."""
        state, name = self.state, self._named_model
        if not is_at_hand(name):
            return

        def ended(job: Job[int]) -> None:
            # Where it cannot be read, the estimate stays.
            if job.status == "done" and job.result and self.state is state and name == self._named_model:
                state.set(weights_bytes=2 * job.result)

        self._counting = Job(lambda _: weight_count(name), ended).start()

    def _ipython_display_(self) -> None:
        # Called by IPython, which is there in notebooks only.
        from IPython.display import display

        display(self.box)
