"""Apply and measure: plans on the model itself, side by side, with a table of all measurements."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import ipywidgets as w
import pandas as pd

from moa_lab.evaluate.equal_bytes import unequal_rows
from moa_lab.evaluate.options import TEXTS
from moa_lab.evaluate.parity import Parity
from moa_lab.evaluate.parity import table as parity_table
from moa_lab.figures.measurements import metric_label
from moa_lab.figures.theme import byte_size, percent
from moa_lab.plan import Plan
from moa_lab.records import ALLOCATED, Measurements
from moa_lab.runtime.generate import Generation
from moa_lab.text import given_path
from moa_lab.workbench.jobs import Handle
from moa_lab.workbench.measuring import KINDS, Entry, Measuring, Plans, history_table, recorded
from moa_lab.workbench.opening import model_title
from moa_lab.workbench.state import State
from moa_lab.workbench.widgets import OWN_WIDTH, Errors, Work, button, grid, number, row, whole

TAB = "Apply & measure"
PROMPT = "Say in one sentence what this is about."
TEXT_TOKENS = 512
"""Tokens of text before the prompt: with fewer than its shortest span, a plan would drop nothing."""


class MeasurePanel:
    """measuring: makes the controller, and with it loads the model, when it is first needed."""

    def __init__(self, state: State, measuring: Callable[[], Measuring], length: int = 1024, n: int = 4) -> None:
        self.state, self.errors = state, Errors("measure")
        self._make = measuring
        self._measuring: Measuring | None = None
        self._before = state.measurements or Measurements(())
        self._past: list[Entry] = recorded(self._before)
        self.known = Plans(state)
        longest = self.known.geometry.max_length if self.known.geometry else 131072
        self.plans = w.SelectMultiple(description="plans", rows=5, layout=w.Layout(width="380px"), style=OWN_WIDTH)
        self.plans.add_class("moa-plans")
        self.kinds = [
            w.Checkbox(kind in ("retrieval", "memory"), description=kind, indent=False, layout=w.Layout(width="auto")) for kind in KINDS
        ]
        self.length = whole("tokens", min(length, longest), 1, longest, "measure-length")
        self.n = whole("texts", n, 1, 1024, "measure-n", "130px")
        self.seed = whole("seed", 0, 0, 2**31 - 1, "measure-seed", "130px")
        self.work = Work("Measure", "measure", self.errors, self._measurer, lambda _: self.show())
        self.prompt = w.Textarea(value=PROMPT, description="prompt", layout=w.Layout(width="400px", height="60px"), style=OWN_WIDTH)
        self.text = whole("after a text of (tokens)", min(TEXT_TOKENS, longest // 2), 0, longest, "text-tokens", "230px")
        self.new = whole("new tokens", 48, 1, 4096, "new-tokens", "170px")
        self.generate = Work("Generate", "generate", self.errors, self._generator, self._said)
        self.parity = Work("Parity", "parity", self.errors, self._comparer, self._compared)
        self.where, self.said, self.checked, self.history = w.HTML(), w.HTML(), w.HTML(), w.HTML()
        self.history.add_class("moa-history-box")
        self.file = w.Text("history.json", description="file", layout=w.Layout(width="240px"), style=OWN_WIDTH)
        self.path = w.Text(placeholder="a config card, or a run's folder", layout=w.Layout(width="260px"))
        self.path.add_class("moa-plan-path")
        load = button("Load plan", "load-plan")
        load.on_click(self.errors.guard(lambda _: self._load()))
        self.saved = w.HTML()
        save = w.Button(description="Save history", layout=w.Layout(width="auto"))
        save.on_click(self.errors.guard(lambda _: self._save()))
        self.uniform = number("uniform at", 0.5, 0.01, 1.0, 0.01, "uniform", "170px")
        self.uniform.observe(self.errors.guard(lambda _: self.offer()), "value")
        state.watch_in(TAB, ["plan", "other", "plans"], self.offer)
        self.works = (self.work, self.generate, self.parity)
        self.box = w.VBox(
            [
                self.where,
                row(self.plans, w.VBox([row(self.uniform), row(self.path, load)])),
                row(*self.kinds),
                row(self.length, self.n, self.seed, self.work.box),
                self.errors.box,
                row(self.prompt, self.text, self.new),
                row(self.generate.box),
                self.said,
                row(self.parity.box),
                self.checked,
                self.history,
                row(self.file, save, self.saved),
            ]
        )
        self.offer()
        self.show()

    def offer(self) -> None:
        """List the plans that can be measured: dense, uniform, the state's plans."""
        before = {plan.name for plan in self.plans.value}
        offered = self.known.offered(self.uniform.value, (self.length.value,))
        self.plans.options = [(f"{plan.name} ({plan.density(self.length.value):.0%} at {self.length.value:,})", plan) for plan in offered]
        chosen = [plan for plan in offered if plan.name in before]
        self.plans.value = tuple(chosen or offered[:1])

    def show(self) -> None:
        """Show the measurements made here and before, and add them to the state's."""
        measured = self._measuring.history if self._measuring is not None else []
        if measured:
            self.state.set(measurements=self._with(measured))
        table = history_table([*self._past, *measured])
        if not len(table):
            return
        unequal = html.escape(unequal_rows(entry.row for entry in measured))
        self.history.value = f"{grid(*_told(table))}<p>{unequal}</p>"

    def _with(self, measured: Sequence[Entry]) -> Measurements:
        """The measurements known before and those made here: a log, in which a row may occur twice."""
        return replace(self._before, rows=(*self._before.rows, *(entry.row for entry in measured)))

    def another_model(self) -> None:
        """Load the model named now at the next measurement; earlier measurements stay.

        Raises ValueError while something runs.
        """
        self.check_idle()
        if self._measuring is not None:
            self._past += self._measuring.history
            self._before = self._with(self._measuring.history)
            self._measuring, self.where.value = None, ""

    def _model(self) -> Measuring:
        if self._measuring is None:
            self.where.value = "loading the model"
            self._measuring = self._make()
            device = self._measuring.model.device
            kernels = "Triton kernels" if device.type == "cuda" else "plain PyTorch over the same ring cache (no GPU here)"
            self.where.value = f"on {device}, {kernels}"
        return self._measuring

    def _measurer(self) -> Callable[[Handle], Any]:
        plans, kinds = self._free_plans(), [kind for kind, box in zip(KINDS, self.kinds, strict=True) if box.value]
        if not kinds:
            raise ValueError(f"choose what to measure: {', '.join(KINDS)}")
        length, n, seed = self.length.value, self.n.value, self.seed.value

        def work(handle: Handle) -> Any:
            try:
                return self._model().measure(plans, kinds, length, n, seed, handle)
            finally:
                # Also what was measured before a cancellation.
                self.show()

        return work

    def _generator(self) -> Callable[[Handle], Any]:
        plans, prompt, new, text = self._free_plans(), self.prompt.value, self.new.value, self.text.value
        return lambda handle: self._model().generate(prompt, plans, new, handle, text)

    def _said(self, said: dict[str, Generation]) -> None:
        cells = "".join(
            f'<td style="vertical-align: top; width: {100 // len(said)}%"><b>{html.escape(name)}</b><br>{found.decode_tokens_per_s:.1f} '
            f"tokens/s, KV {found.kv_bytes_allocated / 2**20:.1f} MiB allocated, {found.kv_bytes_predicted / 2**20:.1f} predicted"
            f'<div class="moa-said">{html.escape(found.texts[0])}</div></td>'
            for name, found in said.items()
        )
        self.said.value = f'<table style="width: 100%"><tr>{cells}</tr></table>'
        self.show()

    def _comparer(self) -> Callable[[Handle], Any]:
        plan = self._free_plans()[0]
        self.checked.value = f"{html.escape(plan.name)}, the first plan chosen, against masks written out in full:"
        return lambda handle: self._model().parity(plan, handle)

    def _compared(self, found: Parity) -> None:
        self.checked.value += f"<pre>{html.escape(parity_table(found))}</pre>"

    def check_idle(self) -> None:
        """Raise ValueError while a job runs: a model can be under one plan only."""
        busy = next((work.start.description for work in self.works if work.is_running), "")
        if busy:
            raise ValueError(f"the model is busy ({busy}): cancel that first, or wait for its end")

    def _free_plans(self) -> list[Plan]:
        self.check_idle()
        if not self.plans.value:
            raise ValueError("choose at least one plan")
        return list(self.plans.value)

    def _save(self) -> None:
        if self._measuring is None or not self._measuring.history:
            raise ValueError("nothing was measured yet")
        if not self.file.value.strip():
            raise ValueError("name a file for the history")
        file = given_path(self.file.value)
        if file.exists():
            raise FileExistsError(f"{file} exists: choose another name")
        path = self._measuring.save(file)
        self.saved.value = f"{len(self._measuring.history)} rows in {html.escape(str(path))}"

    def _load(self) -> None:
        plan = self.known.load(self.path.value)
        self.offer()
        self.plans.value = tuple(each for _, each in self.plans.options if each.identity() == plan.identity())


def _told(table: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """The head of the table of measurements, and its rows in words."""
    head = ["plan", "density", "measured", "texts", "tokens", "value [95% interval]", "n", "when", "on"]
    rows = [
        [
            str(one.plan), percent(one.density, 1), _measured(one.metric, one.task), TEXTS.get(one.task, one.task), f"{one.length:,}",
            _scored(one.metric, one.value, one.low, one.high), f"{one.n:,}", one.when[:16].replace("T", " "),
            f"{model_title(one.model)}, {one.device}",
        ]
        for one in table.itertuples()
    ]  # fmt: skip
    return head, rows


def _measured(metric: str, task: str) -> str:
    """What was measured, in words: other facts than needles are retrieved as well."""
    return metric_label(metric)[0] if metric != "retrieval" else f"{task} retrieved"


def _scored(metric: str, *score: float) -> str:
    """A value and, where it has one, its interval."""
    value, low, high = (_shown(metric, one) for one in score)
    return value if low == high or "-" in (low, high) else f"{value} [{low}, {high}]"


def _shown(metric: str, value: float) -> str:
    if not math.isfinite(value):
        return "-"
    if metric == ALLOCATED:
        return byte_size(value)
    return percent(value, 1) if metric_label(metric)[1] == "%" else f"{value:.4g}"
