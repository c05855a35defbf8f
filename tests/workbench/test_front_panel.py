"""The front panel without a browser: clicks, strokes along an axis, searches, and what it says when it cannot."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from figure_records import make_chosen, make_front, make_validation

from moa_lab.bench.lifelike import lifelike_table
from moa_lab.figures.front import goal_text
from moa_lab.records import Front, LossTable
from moa_lab.workbench import front_panel
from moa_lab.workbench.front_panel import FrontPanel
from moa_lab.workbench.state import State
from tests.workbench.hands import at_last, drawn, ended, press, said

DEMO = Path(__file__).resolve().parents[2] / "data" / "runs" / "demo"
X, Y = "questions@2048/all_or_nothing", "summaries@2048/sum"


@pytest.fixture(scope="module")
def table() -> LossTable:
    return lifelike_table(quick=True)


@pytest.fixture
def front() -> FrontPanel:
    return FrontPanel(State(front=make_front(), n_tokens=2048))


def test_clicks_choose_plans_and_the_second_is_compared_with_the_first(front: FrontPanel) -> None:
    assert "click a plan" in front.compared.value
    names = [point.plan.name for point in front.choosing.points]
    front.scatter._on_click(names[0])
    front.scatter._on_click([names[4]])
    assert (front.state.plan.name, front.state.other.name) == (names[4], names[0])
    assert f"{names[0]} | {names[4]}" in front.compared.value
    assert "less" in front.difference.widget.layout.title.text
    front.scatter._on_click("poem")
    assert "not a plan of this front" in said(front)
    assert front.state.plan.name == names[4]


def test_another_axis_is_drawn_and_compared_by(front: FrontPanel) -> None:
    front.pick(front.choosing.points[0].plan.name)
    front.y.value = "density"
    assert "density" in front.scatter.widget.layout.yaxis.title.text
    assert "summaries@2048/sum" not in front.compared.value


def selected(panel: FrontPanel) -> set[str]:
    """The plans that the scatter does not dim."""
    traces = [trace for trace in panel.scatter.widget.data if trace.customdata is not None and not trace.name.startswith("chosen")]
    return {trace.customdata[index] for trace in traces for index in trace.selectedpoints}


def drag(panel: FrontPanel, ranges: dict[str, Any]) -> None:
    """What the page sends when a stroke on an axis ends: {goal: [low, high], or None where it was taken away}."""
    names = [axis.name for axis in panel.parallel.widget.data[0].dimensions]
    style = {f"dimensions[{names.index(name)}].constraintrange": None if kept is None else [kept] for name, kept in ranges.items()}
    panel.parallel.widget._js2py_restyle = {"style_data": style, "style_traces": [0], "source_view_id": "page"}


def test_a_stroke_along_an_axis_dims_the_other_plans_and_lists_those_it_keeps(front: FrontPanel) -> None:
    points = front.choosing.points
    assert selected(front) == {point.plan.name for point in points}
    assert front.clear.disabled
    values = sorted(point.predicted[X] for point in points)
    drag(front, {X: [values[0], values[4]]})
    kept = {point.plan.name for point in points if point.predicted[X] <= values[4]}
    assert selected(front) == kept
    assert len(kept) == 5
    assert f"5 of {len(points)} plans kept by {goal_text(X)}" in front.kept.value
    assert all(f"<td>{name}</td>" in front.kept.value for name in kept)
    assert f"{values[0]:.4f}" in front.kept.value
    drag(front, {X: [[values[0], values[1]], [values[-1], 9.0]], "density": [0.0, 1.0]})
    assert len(selected(front)) == 3
    drag(front, {X: None, "density": None})
    assert selected(front) == {point.plan.name for point in points}
    assert "drag along an axis" in front.kept.value


def test_a_brush_outlives_a_pick_a_change_of_colours_and_moved_axes_and_ends_with_its_button(front: FrontPanel) -> None:
    values = sorted(point.predicted[Y] for point in front.choosing.points)
    drag(front, {Y: [values[0], values[2]]})
    kept = selected(front)
    front.pick(front.choosing.points[0].plan.name)
    front.state.set(dark=True)
    assert selected(front) == kept
    brushed = {axis.name: axis.constraintrange for axis in front.parallel.widget.data[0].dimensions}
    assert brushed == {X: None, Y: (values[0], values[2]), "density": None}
    moved = [axis.to_plotly_json() for axis in front.parallel.widget.data[0].dimensions][::-1]
    front.parallel.widget._js2py_restyle = {"style_data": {"dimensions": [moved]}, "style_traces": [0], "source_view_id": "page"}
    assert selected(front) == kept
    press(front, "Clear brushes")
    assert len(selected(front)) == len(front.choosing.points)
    assert all(axis.constraintrange is None for axis in front.parallel.widget.data[0].dimensions)


def test_four_axes_are_drawn_until_others_are_chosen_and_brushes_of_those_that_go_end() -> None:
    panel = FrontPanel(State(front=Front.load(DEMO / "front.json")))
    assert [axis.name for axis in panel.parallel.widget.data[0].dimensions] == ["questions", "summaries", "questions@1024/sum", "density"]
    values = sorted(point.predicted["questions@1024/sum"] for point in panel.choosing.points)
    drag(panel, {"questions@1024/sum": [values[0], values[1]]})
    assert "2 of" in panel.kept.value
    panel.axes.value = ("questions", "questions@1024/sum", "density")
    assert panel.parallel.widget.data[0].dimensions[1].constraintrange == (values[0], values[1])
    assert "2 of" in panel.kept.value
    panel.axes.value = ("questions", "density")
    assert [axis.name for axis in panel.parallel.widget.data[0].dimensions] == ["questions", "density"]
    assert "drag along an axis" in panel.kept.value
    panel.axes.value = ()
    assert len(panel.parallel.widget.data[0].dimensions) == 4
    assert said(panel) == ""


@pytest.mark.parametrize("solver", ["epsilon (exact)", "pymoo"])
def test_a_search_shows_its_front_and_forgets_what_was_chosen_of_the_other(solver: str, table: LossTable) -> None:
    panel = FrontPanel(State(table=table))
    assert "press Search" in panel.compared.value
    panel.solver.value, panel.effort.value = solver, 3
    press(panel, "Search")
    ended(panel.work)
    at_last(lambda: re.match(r"\d+ plans, hypervolume", panel.volume.value))
    assert said(panel) == ""
    assert "click a plan" in panel.compared.value
    assert (panel.x.value, panel.y.value) == panel.choosing.first_goals
    assert {"dense", "uniform"} <= {trace.name for trace in panel.scatter.widget.data}
    assert {"dense", "uniform"} < selected(panel), "they are not brushed away"
    assert (panel.live.layout.display == "") is (solver == "pymoo")
    drag(panel, {panel.x.value: [0.0, 0.0]})
    assert "0 of" in panel.kept.value


def test_a_running_search_is_drawn_generation_by_generation(table: LossTable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front_panel, "DRAW_S", 0.0)
    panel = FrontPanel(State(table=table))
    titles, curves = drawn(panel.archive, monkeypatch), drawn(panel.volumes, monkeypatch)
    panel.solver.value, panel.effort.value = "pymoo", 3
    press(panel, "Search")
    ended(panel.work)
    at_last(lambda: len(curves) == 4)
    assert [title.partition(":")[0] for title in titles] == ["Generation 1", "Generation 2", "Generation 3"]
    assert list(panel.volumes.widget.data[0].x) == [1, 2, 3]


def test_figures_of_a_search_that_has_ended_follow_the_page_into_the_dark(table: LossTable) -> None:
    panel = FrontPanel(State(table=table))
    panel.solver.value, panel.effort.value = "pymoo", 2
    press(panel, "Search")
    ended(panel.work)
    at_last(lambda: re.match(r"\d+ plans, hypervolume", panel.volume.value))

    def inks() -> set[str]:
        return {canvas.widget.layout.template.layout.font.color for canvas in (panel.archive, panel.volumes, panel.scatter)}

    light = inks()
    panel.state.set(tab="Front", dark=True)
    assert len(light) == len(inks()) == 1
    assert light.isdisjoint(inks())


def test_a_front_is_loaded_from_a_path_or_refused_in_words(tmp_path: Path) -> None:
    panel = FrontPanel(State())
    assert "load one" in panel.compared.value
    panel.path.value = str(tmp_path)
    press(panel, "Load front")
    assert "there is no front at" in said(panel)
    make_front().save(tmp_path / "front.json")
    press(panel, "Load front")
    assert said(panel) == ""
    assert "click a plan" in panel.compared.value


def test_a_click_on_the_difference_of_two_plans_chooses_that_head(front: FrontPanel) -> None:
    names = [point.plan.name for point in front.choosing.points]
    front.pick(names[0])
    front.pick(names[1])
    front.difference._on_click((2, 17))
    assert (front.state.layer, front.state.kv_head) == (17, 2)
    marker = next(trace for trace in front.difference.widget.data if trace.name == "selected")
    assert (marker.x[0], marker.y[0]) == (17, 2)


def test_a_search_that_cannot_start_or_end_says_why(table: LossTable) -> None:
    panel = FrontPanel(State(front=make_front(), n_tokens=2048))
    press(panel, "Search")
    assert "needs a loss table" in said(panel)
    panel = FrontPanel(State(table=table))
    panel.density.value = 0.01
    press(panel, "Search")
    ended(panel.work)
    at_last(lambda: "infeasible" in said(panel))
    assert panel.state.front is None


def test_a_run_with_its_validation_shows_the_measured_front_and_which_candidate_won() -> None:
    state = State(front=make_front(), n_tokens=2048, validation=make_validation(), plans=(make_chosen(),))
    panel = FrontPanel(state)
    ring = next(trace for trace in panel.measured.widget.data if (trace.name or "").startswith("chosen"))
    assert list(ring.customdata) == ["refined-1"]
    assert "moa is refined-1 (refined spans), chosen by needles and words" in panel.won.value
    panel.measured._on_click("milp-00")
    assert state.plan.name == "milp-00"
    state.set(dark=True)
    assert panel.measured.widget.layout.template.layout.font.color == "#e8eaed"


def test_another_front_hides_what_was_measured_of_the_first_and_brings_its_own(tmp_path: Path) -> None:
    panel = FrontPanel(State(front=make_front(), n_tokens=2048, validation=make_validation(), plans=(make_chosen(),)))
    assert panel.measured.box.layout.display == ""
    make_front(count=3).save(tmp_path / "bare" / "front.json")
    panel.choosing.load(tmp_path / "bare")
    assert (panel.measured.box.layout.display, panel.won.layout.display) == ("none", "none")
    make_front().save(tmp_path / "run" / "front.json")
    make_validation(chosen="layers").save(tmp_path / "run" / "validation.json")
    panel.choosing.load(tmp_path / "run")
    assert panel.measured.box.layout.display == ""
    assert "refined-1" not in panel.won.value, "the card at hand is not of this validation"
