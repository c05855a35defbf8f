"""Parts of all panels: error messages, progress of long work, boxes, tables."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec

import ipywidgets as w

from moa_lab.text import one_line
from moa_lab.workbench.jobs import Handle, Job

P = ParamSpec("P")

STYLE = """<style>
.moa-bench { max-width: 1780px; }
.moa-bench .widget-tab > .lm-TabBar .lm-TabBar-tab { flex: 0 1 auto; }
.moa-head-line { min-height: 2.9em; }
.moa-head-line .widget-html-content { white-space: normal; line-height: 1.4; }
/* As many columns as there is room for: one beside the figures, two or three below them. */
.moa-budget-facts table, .moa-budget-facts tbody { display: block; }
.moa-budget-facts tbody { columns: 350px; column-gap: 24px; }
.moa-budget-facts tr { display: grid; grid-template-columns: 206px minmax(0, 1fr); break-inside: avoid; }
.moa-lost .widget-html-content { white-space: normal; line-height: 1.4; }
.moa-pins .widget-html-content { white-space: normal; line-height: 1.4; }
.moa-keys:focus-visible { outline: 2px solid #ff5c39; outline-offset: -2px; }
.moa-error { border-left: 4px solid #d55e00; padding: 4px 10px; white-space: pre-wrap; }
.moa-worse p { margin: 0; max-width: 860px; line-height: 1.4; }
.moa-facts table, .moa-history table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.moa-facts, .moa-history { line-height: 1.5; }
.moa-facts td, .moa-facts th, .moa-history td, .moa-history th { padding: 2px 10px 2px 0; text-align: left; font-size: 13px; }
.moa-history { max-width: 100%; max-height: 320px; overflow: auto; }
.moa-parallel .axis .domain, .moa-parallel .axis line { stroke: #7a808a !important; stroke-opacity: 0.8 !important; }
.moa-history td { white-space: nowrap; }
.moa-history td, .moa-history th { text-align: left !important; }
.moa-history th { white-space: normal; vertical-align: bottom; line-height: 1.2; }
/* A table that is wider than its panel scrolls by itself. */
.moa-bench .widget-html, .moa-bench .widget-html-content { min-width: 0; max-width: 100%; }
.moa-history td:last-child { white-space: normal; min-width: 12em; }
.moa-history-box td:nth-child(3), .moa-history-box td:nth-child(8) { white-space: normal; min-width: 7em; }
.moa-history-box td:last-child { min-width: 8em; }
.moa-advice-table .moa-history { max-height: none; }
.moa-advice { max-width: 860px; }
.moa-advice .widget-html-content { line-height: 1.5; }
.moa-bench pre { white-space: pre; overflow-x: auto; max-width: 860px; line-height: 1.3; }
.moa-said { white-space: pre-wrap; max-height: 240px; overflow: auto; }
</style>"""


OWN_WIDTH = {"description_width": "initial"}
"""Style of a box whose label takes as much room as its words."""


class Errors:
    """A box for error messages. `guard` makes a callback that clears the box and shows its own error there."""

    def __init__(self, name: str) -> None:
        self.box = w.HTML()
        self.box.add_class(f"moa-{name}-error")

    def show(self, message: str) -> None:
        """Show `message`; "" for none."""
        self.box.value = f'<div class="moa-error" role="alert">{html.escape(message)}</div>' if message else ""

    def guard(self, callback: Callable[P, object], *, keep: bool = False) -> Callable[P, None]:
        """`callback` with its errors shown; an error raised in a widget's callback would go unnoticed.

        keep: what is shown stays until another error: for what a pointer does on its way.
        """

        @wraps(callback)
        def guarded(*args: P.args, **settings: P.kwargs) -> None:
            # Cleared before the call, not after it: messages of watchers and jobs that it starts must stay.
            if not keep:
                self.show("")
            try:
                callback(*args, **settings)
            # Any error.
            except Exception as error:
                self.show(one_line(error))

        return guarded


class Work:
    """A button that starts a job, its progress, and a button that ends it. One job at a time."""

    def __init__(
        self, label: str, name: str, errors: Errors, begin: Callable[[], Callable[[Handle], Any]], finish: Callable[[Any], None]
    ) -> None:
        self._errors, self._begin, self._finish = errors, begin, finish
        self.job: Job[Any] | None = None
        self.start = w.Button(description=label, button_style="primary", layout=w.Layout(width="auto"))
        self.cancel = w.Button(description="Cancel", disabled=True, layout=w.Layout(width="auto"))
        self.bar = w.FloatProgress(0.0, min=0.0, max=1.0, layout=w.Layout(width="160px", display="none"))
        self.label = w.HTML()
        self.label.add_class(f"moa-{name}-status")
        self.start.on_click(errors.guard(self._started))
        self.cancel.on_click(lambda _: self.stop())
        self.box = w.HBox([self.start, self.cancel, self.bar, self.label], layout=w.Layout(align_items="center", flex_flow="row wrap"))
        self.box.add_class(f"moa-{name}")

    @property
    def is_running(self) -> bool:
        """True from the press of the button to the end of the job."""
        return self.job is not None and self.job.is_running

    def stop(self) -> None:
        """Ask the job, if there is one, to stop."""
        if self.job is not None:
            self.job.cancel()
            if self.job.is_running:
                self.label.value = "stopping at the next step"

    def _started(self, _: object) -> None:
        if self.is_running:
            raise ValueError("it is running already: cancel it first, or wait for its end")
        self.job = Job(self._begin(), self._told)
        self.job.start()

    def _told(self, job: Job[Any]) -> None:
        self.start.disabled, self.cancel.disabled = job.is_running, not job.is_running
        self.bar.layout.display = "" if job.is_running else "none"
        self.bar.max, self.bar.value = max(job.total, 1), job.done
        self.label.value = told_progress(job) if job.is_running else f"{job.status} after {job.elapsed_s:.1f} s"
        if job.status == "failed":
            self._errors.show(job.error)
        elif job.status == "done":
            self._errors.guard(self._finish)(job.result)


def told_progress(job: Job[Any]) -> str:
    """How far a running job is: of the work over all steps where it names them, or else of what it counts."""
    left = f", about {job.left_s:.0f} s left" if job.left_s is not None else ""
    if job.step:
        return f"running: {job.step}, {job.done / max(job.total, 1):.0%} of all{left}"
    return f"running {job.done:.0f} of {job.total:.0f}{left}" if job.total else "running"


def row(*children: w.Widget) -> w.HBox:
    """Widgets side by side, wrapping where there is no room."""
    return w.HBox(list(children), layout=w.Layout(flex_flow="row wrap", align_items="center", grid_gap="6px 10px"))


def side_by_side(*children: w.Widget) -> w.HBox:
    """Figures and what is said of them, from the top, below each other where there is no room."""
    return w.HBox(list(children), layout=w.Layout(flex_flow="row wrap", align_items="flex-start", grid_gap="0 12px"))


def without_null(widget: w.Widget) -> None:
    """Give an empty tooltip to all boxes within `widget` that have none: a page shows "null" where there is none."""
    if isinstance(widget, w.DOMWidget) and isinstance(widget, w.widget_description.DescriptionWidget) and widget.tooltip is None:
        widget.tooltip = ""
    for child in getattr(widget, "children", ()):
        without_null(child)


def number(label: str, value: float, low: float, high: float, step: float, name: str, width: str = "190px") -> w.BoundedFloatText:
    """A number box, which unlike a slider has a name for screen readers."""
    box = w.BoundedFloatText(value=value, min=low, max=high, step=step, description=label, layout=w.Layout(width=width), style=OWN_WIDTH)
    box.add_class(f"moa-{name}")
    return box


def whole(label: str, value: int, low: int, high: int, name: str, width: str = "150px") -> w.BoundedIntText:
    """A box for a whole number."""
    box = w.BoundedIntText(value=value, min=low, max=high, description=label, layout=w.Layout(width=width), style=OWN_WIDTH)
    box.add_class(f"moa-{name}")
    return box


def choice(label: str, options: Any, name: str, width: str = "230px") -> w.Dropdown:
    """A list to choose from."""
    box = w.Dropdown(options=options, description=label, layout=w.Layout(width=width), style=OWN_WIDTH)
    box.add_class(f"moa-{name}")
    return box


def button(label: str, name: str, tooltip: str = "") -> w.Button:
    """A button as wide as its words."""
    made = w.Button(description=label, tooltip=tooltip, layout=w.Layout(width="auto"))
    made.add_class(f"moa-{name}")
    return made


def facts(rows: list[tuple[str, str]]) -> str:
    """A small table of names and values."""
    cells = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in rows)
    return f'<div class="moa-facts"><table>{cells}</table></div>'


def grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with a head, which scrolls where it is too large."""
    cells = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    titles = "".join(f"<th>{html.escape(title)}</th>" for title in head)
    return f'<div class="moa-history"><table><thead><tr>{titles}</tr></thead><tbody>{cells}</tbody></table></div>'
