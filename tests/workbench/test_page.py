"""A figure on the page: what a busy page lost while it drew is sent again."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go
import pytest

from moa_lab.workbench.canvas import Canvas

LINE = {"type": "line", "x0": 1, "x1": 1, "y0": 0, "y1": 1}


def test_what_the_page_drew_without_is_sent_again_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    canvas = Canvas("test", 400)
    canvas.draw(go.Figure(go.Scatter(x=[0, 1], y=[0, 1])))
    canvas.widget.layout.shapes = [LINE]
    canvas.resize(500)
    sent: list[dict[str, Any]] = []
    monkeypatch.setattr(canvas.widget, "_send_relayout_msg", sent.append)
    canvas.widget._handle_custom_msg({"drawn": {"width": 500, "shapes": 1}}, [])
    assert sent == []
    canvas.widget._handle_custom_msg({"drawn": {"width": 400, "shapes": 0}}, [])
    (missed,) = sent
    assert missed["width"] == 500
    assert missed["shapes"][0]["x0"] == 1
