"""Export: the chosen plan for the engine that will run it, with its launch command; a report, and a page of the whole desk."""

from __future__ import annotations

import html
from collections.abc import Callable
from pathlib import Path

import ipywidgets as w

from moa_lab.engines import ENGINES, engine_table
from moa_lab.plan import Plan
from moa_lab.text import given_path
from moa_lab.workbench.desk_page import desk_records
from moa_lab.workbench.exporting import FORMATS, Sources, export, known_of
from moa_lab.workbench.jobs import Handle
from moa_lab.workbench.launching import LAUNCHERS, launch
from moa_lab.workbench.state import State
from moa_lab.workbench.tracing import Tracing
from moa_lab.workbench.widgets import OWN_WIDTH, Errors, Work, button, choice, grid, row


class ExportPanel:
    """Writes the state's plan to a folder. tracing: the answer that was traced, for a desk page; it gives None where there is none."""

    def __init__(self, state: State, folder: str | Path = "exported", tracing: Callable[[], Tracing | None] = lambda: None) -> None:
        self.state, self.errors, self._tracing = state, Errors("export"), tracing
        self.folder = w.Text(str(folder), description="folder", style=OWN_WIDTH)
        self.name = w.Text("my_plan", description="name", style=OWN_WIDTH)
        self.folder.add_class("moa-export-folder")
        self.name.add_class("moa-export-name")
        self.engine = choice("to run with", list(LAUNCHERS), "export-engine", "260px")
        # At first what the first engine reads, so that its command finds its files.
        reads = LAUNCHERS[self.engine.value].needs
        self.formats = [w.Checkbox(kind in reads, description=kind, indent=False, layout=w.Layout(width="auto")) for kind in FORMATS]
        self.replace = w.Checkbox(False, description="replace what is there", indent=False, layout=w.Layout(width="auto"))
        self.work = Work("Export", "export", self.errors, self._begin, self._written)
        self.works = (self.work,)
        compare = button("Under other engines", "engines", "what each would allocate for this plan, at the length of the desk")
        compare.on_click(self.errors.guard(lambda _: self.compare()))
        self.done, self.plan, self.launch, self.engines = w.HTML(), w.HTML(), w.HTML(), w.HTML()
        for box, name in ((self.done, "exported"), (self.launch, "launch"), (self.engines, "engine-table")):
            box.add_class(f"moa-{name}")
        self.engine.observe(self.errors.guard(lambda _: self._choose_engine()), "value")
        for box in (self.folder, self.name, *self.formats):
            box.observe(lambda _: self._tell(), "value")
        state.watch_in("Export", ["plan", "n_tokens", "measurements"], self._tell)
        self.box = w.VBox(
            [
                self.plan, row(self.engine, self.folder, self.name), row(*self.formats), row(self.replace, self.work.box, compare),
                self.errors.box, self.done, self.launch, self.engines,
            ]
        )  # fmt: skip
        self._tell()

    def export(self) -> None:
        """Write the files beside all else, and say what was read back. A desk page takes seconds, half a minute for thousands of heads."""
        self.work.start.click()

    def _begin(self) -> Callable[[Handle], list[str]]:
        """What is exported is what is chosen now, whatever is chosen while it is written."""
        self.done.value = ""
        if self.state.plan is None:
            raise ValueError("no plan is chosen: move the density, or click a plan of the front")
        state, tracing = self.state.copy(), self._tracing()
        plan, folder, name, replaced = self.state.plan, given_path(self.folder.value), self.name.value.strip(), self.replace.value
        formats = self._formats()

        def work(handle: Handle) -> list[str]:
            desk = desk_records(state, tracing) if "desk page" in formats else None
            sources = Sources(state.n_tokens, state.profile, state.front, state.measurements, state.validation, desk)
            paths = export(plan, folder, name, formats, sources, replace=replaced, progress=handle.progress)
            card = f"{name}.json"
            return [f"{path} (plan {Plan.load(path).identity()})" if path.name == card else str(path) for path in paths]

        return work

    def _formats(self) -> tuple[str, ...]:
        return tuple(kind for kind, box in zip(FORMATS, self.formats, strict=True) if box.value)

    def _written(self, told: list[str]) -> None:
        self.done.value = f"written and read back: {html.escape('; '.join(told))}"

    def compare(self) -> None:
        """Tell what known engines allocate for the plan."""
        if self.state.plan is None:
            raise ValueError("no plan is chosen: move the density, or click a plan of the front")
        (header, *rows), refused = engine_table(self.state.plan, ENGINES.values(), [self.state.n_tokens])
        told = "".join(f"<div>{html.escape(name)} does not hold it: {html.escape(why)}</div>" for name, why in refused.items())
        note = "rounded: its heads keep more than the plan says; <code>moa-lab run --engine NAME</code> finds plans of which none does."
        self.engines.value = f"{grid(header, rows)}{told}<div>{note}</div>"

    def _choose_engine(self) -> None:
        """Tick the files that the engine reads."""
        for kind, box in zip(FORMATS, self.formats, strict=True):
            if kind in LAUNCHERS[self.engine.value].needs:
                box.value = True
        self._tell()

    def _tell(self) -> None:
        plan, n = self.state.plan, self.state.n_tokens
        self.engines.value = ""
        told = "no plan is chosen"
        if plan is not None:
            rows = known_of(plan, self.state.measurements).select(plan=plan.name)
            measured = f"a report holds {len(rows)} measured rows of it" if rows else "not measured yet: a report holds predictions alone"
            told = f"plan <b>{html.escape(plan.name)}</b>, {plan.density(n):.1%} at {n:,} tokens, identity {plan.identity()}; {measured}"
        self.plan.value = told
        self.launch.value = "" if plan is None else self._launched(plan)

    def _launched(self, plan: Plan) -> str:
        """How the chosen engine runs the exported plan, or why it does not take it."""
        engine = LAUNCHERS[self.engine.value]
        try:
            command = launch(self.engine.value, plan, given_path(self.folder.value) / f"{self.name.value.strip()}.json")
        except ValueError as error:
            return f'<div class="moa-error">{html.escape(self.engine.value)} does not take this plan: {html.escape(str(error))}</div>'
        files, ticked = ", ".join(engine.needs), self._formats()
        missing = [kind for kind in engine.needs if kind not in ticked]
        lacks = f" ({', '.join(missing)} not ticked)" if missing else ""
        return f"{html.escape(engine.note)} It reads: {html.escape(files + lacks)}. Once exported:<pre>{html.escape(command)}</pre>"
