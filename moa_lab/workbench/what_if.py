"""What if: buttons that cut, restore or set spans and answer again, undo and redo, and the plans tried."""

from __future__ import annotations

from collections.abc import Callable

import ipywidgets as w

from moa_lab.workbench.chips import Chips
from moa_lab.workbench.state import State
from moa_lab.workbench.trace_views import TRIED, heading, trial_chips
from moa_lab.workbench.trials import Trials
from moa_lab.workbench.widgets import Errors, button, choice, row, whole

HEAD, LAYER = "this head", "its whole layer"

Change = Callable[[int, int | None, int | None], object]
"""Answers again with a span in a layer and KV head (None: all of the layer); the span is None for everything, 0 for the shortest."""


class WhatIf:
    """change: see `Change`; go: answers again with the trial that undo, redo or a click in the history made the current one."""

    def __init__(self, state: State, errors: Errors, change: Change, go: Callable[[], object], longest: int) -> None:
        self.state, self._change, self._go = state, change, go
        self._trials = Trials()
        self.where = w.HTML()
        self.scope = choice("change", [HEAD, LAYER], "what-if-scope", "210px")
        self.span = whole("span (tokens)", min(256, longest), 1, longest, "what-if-span", "190px")
        cut = button("Cut", "what-if-cut", "keep the plan's shortest span alone")
        restore = button("Restore", "what-if-restore", "keep everything")
        to_span = button("Set span", "what-if-set")
        self.undo, self.redo = button("Undo", "what-if-undo"), button("Redo", "what-if-redo")
        cut.on_click(errors.guard(lambda _: self._set(0)))
        restore.on_click(errors.guard(lambda _: self._set(None)))
        to_span.on_click(errors.guard(lambda _: self._set(self.span.value)))
        self.undo.on_click(errors.guard(lambda _: self._move(self._trials.undo)))
        self.redo.on_click(errors.guard(lambda _: self._move(self._trials.redo)))
        self.tried = Chips("tried", errors.guard(self._back), stacked=True)
        columns = w.HTML(f'<div class="moa-columns">{TRIED}</div>')
        hint = "Change the head that is selected on the map, or its layer: the prompt is answered again. A click on a plan goes back to it."
        self.box = w.VBox(
            [
                w.HTML(heading("What if", hint)),
                row(self.where, self.scope, cut, restore, self.span, to_span, self.undo, self.redo),
                columns,
                self.tried.box,
            ]
        )
        self.show(self._trials)

    def show(self, trials: Trials) -> None:
        """Show the plans tried, and which head would be changed."""
        self._trials = trials
        self.undo.disabled, self.redo.disabled = not trials.can_undo, not trials.can_redo
        self.where.value = f"layer {self.state.layer}, KV head {self.state.kv_head}"
        self.tried.show(trial_chips(trials.tried, trials.index))

    def _set(self, tokens: int | None) -> None:
        self._change(self.state.layer, self.state.kv_head if self.scope.value == HEAD else None, tokens)

    def _move(self, step: Callable[[], object]) -> None:
        step()
        self._go()

    def _back(self, number: int) -> None:
        # The latest is on top.
        self._move(lambda: self._trials.choose(len(self._trials.tried) - 1 - number))
