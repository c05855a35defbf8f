"""Buttons in the flow of a text or one below the other: tokens, heads, plans tried."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import ipywidgets as w


@dataclass(frozen=True)
class Chip:
    """A button: its words (lines, where they hold line ends), a tooltip, and CSS classes."""

    text: str
    tooltip: str = ""
    classes: tuple[str, ...] = ()


class Chips:
    """As many buttons as there are to show; a click calls `on_click` with the button's number. Buttons are used again, not made anew.

    stacked: one below the other, instead of side by side.
    """

    def __init__(self, name: str, on_click: Callable[[int], object], stacked: bool = False) -> None:
        self._on_click = on_click
        self._made: list[w.Button] = []
        layout = w.Layout(flex_flow="column" if stacked else "row wrap", overflow="auto", max_height="300px")
        self.box = w.Box([], layout=layout)
        self.box.add_class(f"moa-{name}")
        self.box.add_class("moa-chips")

    def show(self, chips: Sequence[Chip]) -> None:
        """Show these and no others."""
        while len(self._made) < len(chips):
            self._made.append(self._button(len(self._made)))
        for button, chip in zip(self._made, chips, strict=False):
            button.description, button.tooltip = chip.text, chip.tooltip
            button._dom_classes = ("moa-chip", *chip.classes)
        shown = tuple(self._made[: len(chips)])
        if self.box.children != shown:
            self.box.children = shown

    def _button(self, number: int) -> w.Button:
        made = w.Button(layout=w.Layout(width="auto", height="auto"))
        made.on_click(lambda _: self._on_click(number))
        return made
