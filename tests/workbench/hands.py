"""Hands for panels without a browser: press a button, read what is said, wait for a job."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import pytest

from moa_lab.workbench.canvas import Canvas
from moa_lab.workbench.widgets import Work

PATIENCE_S = 60.0


def press(panel: Any, label: str) -> None:
    """Press the button with this label, wherever it is on the panel."""
    found = [widget for widget in below(panel.box) if getattr(widget, "description", None) == label]
    assert len(found) == 1, f"{len(found)} buttons {label!r}"
    found[0].click()


def below(widget: Any) -> list[Any]:
    return [widget, *(each for child in getattr(widget, "children", ()) for each in below(child))]


def said(panel: Any) -> str:
    """What the panel says went wrong."""
    return re.sub(r"<[^>]+>", "", panel.errors.box.value)


def drawn(canvas: Canvas, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The titles of what `canvas` draws from now on."""
    titles: list[str] = []
    draw = canvas.draw

    def counted(fig: Any, dark: bool = False) -> None:
        titles.append(fig.layout.title.text)
        draw(fig, dark)

    monkeypatch.setattr(canvas, "draw", counted)
    return titles


def ended(work: Work, timeout_s: float = PATIENCE_S) -> None:
    """Wait for the end of a job, and for what the panel does then."""
    deadline = time.monotonic() + timeout_s
    while work.cancel.disabled is False or work.job is None or work.job.is_running:
        assert time.monotonic() < deadline, "the job did not end"
        time.sleep(0.01)


def at_last(holds: Callable[[], object], pause: Callable[[], object] = lambda: time.sleep(0.01)) -> None:
    """Wait until `holds()`, as long as a busy machine may take."""
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline
        pause()
