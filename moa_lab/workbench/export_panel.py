"""Export: the chosen plan as files, read back at once, and a report about it."""

from __future__ import annotations

import html
from pathlib import Path

import ipywidgets as w

from moa_lab.plan import Plan
from moa_lab.workbench.exporting import FORMATS, Sources, export, known_of
from moa_lab.workbench.state import State
from moa_lab.workbench.widgets import Errors, button, row


class ExportPanel:
    """Writes the state's plan to a folder."""

    def __init__(self, state: State, folder: str | Path = "exported") -> None:
        self.state, self.errors = state, Errors("export")
        self.folder = w.Text(str(folder), description="folder")
        self.name = w.Text("my_plan", description="name")
        self.folder.add_class("moa-export-folder")
        self.name.add_class("moa-export-name")
        self.formats = [
            w.Checkbox(kind == "config card", description=kind, indent=False, layout=w.Layout(width="auto")) for kind in FORMATS
        ]
        self.replace = w.Checkbox(False, description="replace what is there", indent=False, layout=w.Layout(width="auto"))
        export_button = button("Export", "export")
        export_button.on_click(self.errors.guard(lambda _: self.export()))
        self.done, self.plan = w.HTML(), w.HTML()
        self.done.add_class("moa-exported")
        state.watch_in("Export", ["plan", "n_tokens", "measurements"], self._tell)
        self.box = w.VBox(
            [self.plan, row(self.folder, self.name), row(*self.formats), row(self.replace, export_button), self.errors.box, self.done]
        )
        self._tell()

    def export(self) -> None:
        """Write the files, and say what was read back."""
        self.done.value = ""
        state = self.state
        if state.plan is None:
            raise ValueError("no plan is chosen: move the density, or click a plan of the front")
        formats = tuple(kind for kind, box in zip(FORMATS, self.formats, strict=True) if box.value)
        sources = Sources(state.n_tokens, state.profile, state.front, state.measurements, state.validation)
        paths = export(state.plan, self.folder.value, self.name.value, formats, sources, replace=self.replace.value)
        read = [f"{path} (plan {Plan.load(path).identity()})" if path.name == f"{self.name.value}.json" else str(path) for path in paths]
        self.done.value = f"written and read back: {html.escape('; '.join(read))}"

    def _tell(self) -> None:
        plan, n = self.state.plan, self.state.n_tokens
        told = "no plan is chosen"
        if plan is not None:
            rows = known_of(plan, self.state.measurements).select(plan=plan.name)
            measured = f"a report holds {len(rows)} measured rows of it" if rows else "not measured yet: a report holds predictions alone"
            told = f"plan <b>{html.escape(plan.name)}</b>, {plan.density(n):.1%} at {n:,} tokens, identity {plan.identity()}; {measured}"
        self.plan.value = told
