"""How wide figures are: all the room that a panel has, and figures side by side where they can be read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from moa_lab.workbench.advice_panel import AdvicePanel
from moa_lab.workbench.budget_panel import BudgetPanel
from moa_lab.workbench.canvas import HALF, Canvas
from moa_lab.workbench.front_panel import FrontPanel
from moa_lab.workbench.heads_panel import HeadsPanel
from moa_lab.workbench.opening import open_run
from moa_lab.workbench.room import EDGES, GAP, NARROWEST, WIDEST, columns, room
from moa_lab.workbench.state import State

DEMO = Path(__file__).resolve().parents[2] / "data" / "runs" / "demo"


@pytest.mark.parametrize("free", [320, 700, 732, 777, 1417, 4000])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_figures_fill_the_room_and_stay_readable(free: int, count: int) -> None:
    each = columns(free, count)
    beside = max(n for n in range(1, count + 1) if n == 1 or n * NARROWEST + (n - 1) * GAP <= free)
    assert beside * each + (beside - 1) * GAP <= free
    if beside == 1:
        assert each == free
    else:
        assert each == WIDEST or free - beside * each - (beside - 1) * GAP < beside


def test_a_width_that_is_not_known_is_a_small_laptops() -> None:
    assert room(0) == room(790 + EDGES) == 790


@pytest.fixture
def state() -> State:
    return replace(open_run(DEMO))


def pixels(canvas: Canvas) -> int:
    """The width of a figure, which its box has too."""
    assert canvas.box.layout.width == f"{canvas.widget.layout.width}px"
    return int(canvas.widget.layout.width)


def test_the_budgets_figures_stand_side_by_side_and_follow_the_width(state: State) -> None:
    panel = BudgetPanel(state)
    for width, free in ((824, 824 - EDGES), (984, 984 - EDGES), (1488, 1488 - EDGES - 372), (1780, 1780 - EDGES - 372)):
        state.set(width=width)
        assert pixels(panel.map.canvas) == pixels(panel.curves.canvas) == (free - GAP) // 2
    before = panel.curves.canvas.widget.layout.width
    panel.number.value = 0.3
    state.set(dark=True)
    assert pixels(panel.curves.canvas) == before, "what is drawn anew is as wide"


def test_a_panel_in_the_background_follows_when_it_is_looked_at(state: State) -> None:
    panel = FrontPanel(state)
    state.set(tab="Heads", width=1488)
    assert pixels(panel.scatter) < HALF
    state.set(tab="Front")
    assert pixels(panel.scatter) == columns(room(1488))
    assert pixels(panel.parallel) == room(1488)


def test_all_figures_of_a_head_stand_side_by_side_on_a_wide_screen(state: State) -> None:
    panel = HeadsPanel(state)
    for width in (824, 1488, 1780):
        state.set(width=width)
        row = [pixels(canvas) for canvas in (panel.map, panel.blocks, panel.curve)]
        if width > 1400:
            assert sum(row) + 2 * GAP == room(width)
        else:
            assert row[0] == room(width)
            assert sum(row[1:]) + GAP <= room(width)


def test_the_advice_has_its_table_beside_its_figure_where_both_can_be_read(state: State) -> None:
    panel = AdvicePanel(state)
    state.set(width=1488)
    assert pixels(panel.canvas) == HALF
    state.set(width=824)
    assert pixels(panel.canvas) == room(824)
