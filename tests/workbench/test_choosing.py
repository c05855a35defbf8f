"""Choosing from a front without a widget: searches, picks, comparisons, brushes; and the axes that are brushed."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest
from figure_records import make_front, make_plan, make_profile

from moa_lab.bench.lifelike import lifelike_table
from moa_lab.figures import parallel_goals
from moa_lab.figures.front import goal_text
from moa_lab.records import Front, LossTable
from moa_lab.search import InfeasibleError, limit_lengths
from moa_lab.storage import RecordError
from moa_lab.workbench.choosing import EPSILON, PYMOO, SOLVERS, Choosing, Generation
from moa_lab.workbench.jobs import Handle
from moa_lab.workbench.state import State

X, Y = "questions@2048/all_or_nothing", "summaries@2048/sum"
DEMO = Path(__file__).resolve().parents[2] / "data" / "runs" / "demo"


@pytest.fixture(scope="module")
def table() -> LossTable:
    return lifelike_table(quick=True)


@pytest.fixture
def choosing() -> Choosing:
    return Choosing(State(profile=make_profile(lengths=(1024, 4096)), front=make_front()))


def handle(heard: list[tuple[int, int]] | None = None, stopped: bool = False) -> Handle:
    stop, told = threading.Event(), [] if heard is None else heard
    if stopped:
        stop.set()
    return Handle(stop, lambda done, total: told.append((done, total)))


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_search_finds_plans_that_keep_the_density_and_tells_how_far_it_is(solver: str, table: LossTable) -> None:
    choosing, heard = Choosing(State(table=table)), []
    front = choosing.search(solver, 0.5, 3, handle(heard))
    assert len(front) > 1
    assert all(point.plan.density(n) <= 0.5 + 1e-9 for point in front for n in limit_lengths(table))
    assert heard[-1][0] == heard[-1][1]
    assert [done for done, _ in heard] == sorted(done for done, _ in heard)
    assert choosing.points == (), "a search alone shows nothing"
    volume = choosing.keep(front)
    assert choosing.points == front.points
    assert volume is not None
    assert volume > 0


def test_an_evolution_tells_its_plans_and_their_hypervolume_which_never_falls(table: LossTable) -> None:
    told: list[Generation] = []
    choosing = Choosing(State(table=table))
    front = choosing.search(PYMOO, 0.5, 4, handle(), told.append)
    assert [each.number for each in told] == [1, 2, 3, 4]
    assert all(each.values.shape == (len(each.values), len(front.objectives)) and len(each.values) for each in told)
    assert told[0].goals == front.objectives
    volumes = [each.volume for each in told]
    assert volumes == sorted(volumes) == choosing.volumes["pymoo at 50.0%"]
    assert choosing.keep(front) == pytest.approx(volumes[-1])
    assert choosing.seconds["pymoo at 50.0%"] == sorted(choosing.seconds["pymoo at 50.0%"])
    exact = choosing.search(EPSILON, 0.5, 2, handle())
    assert choosing.levels == {"epsilon at 50.0%": pytest.approx(choosing.keep(exact))}


def test_an_evolution_that_is_stopped_keeps_what_it_has(table: LossTable) -> None:
    stop = threading.Event()
    choosing = Choosing(State(table=table))
    front = choosing.search(PYMOO, 0.5, 500, Handle(stop, lambda done, _: stop.set() if done == 3 else None))
    assert len(choosing.volumes["pymoo at 50.0%"]) == 3
    choosing.keep(front)
    assert len(choosing.points) > 1


def test_dense_and_the_largest_uniform_plan_stand_beside_a_front_and_can_be_picked(table: LossTable) -> None:
    choosing = Choosing(State(table=table))
    assert choosing.references() == ()
    choosing.keep(choosing.search(PYMOO, 0.5, 2, handle()))
    dense, uniform = choosing.references()
    assert (dense.plan.name, uniform.plan.name) == ("dense", "uniform")
    assert all(value == pytest.approx(0) for value in dense.predicted.values())
    n = max(limit_lengths(table))
    assert dense.plan.density(n) == 1
    assert len({rule for row in uniform.plan.rules for rule in row}) == 1
    assert uniform.plan.density(n) <= max(point.plan.density(n) for point in choosing.points) + 1e-9
    assert set(choosing.state.front.objectives) <= set(uniform.predicted)
    best = min(choosing.points, key=lambda point: sum(point.predicted[name] for name in choosing.state.front.objectives))
    assert sum(uniform.predicted[name] for name in choosing.first_goals) > sum(best.predicted[name] for name in choosing.first_goals)
    choosing.pick(best.plan.name)
    choosing.pick("uniform")
    assert (choosing.state.plan.name, choosing.state.other) == ("uniform", best.plan)
    choosing.pick("uniform")
    assert choosing.state.other is None, "a plan is not compared with itself"


def test_without_a_table_nothing_is_known_of_other_plans(choosing: Choosing) -> None:
    assert choosing.references() == ()


def test_goals_of_whole_tasks_are_seen_first(choosing: Choosing) -> None:
    assert choosing.first_goals == (X, Y)
    choosing.state.set(front=Front.load(DEMO / "front.json"))
    assert choosing.first_goals == ("questions", "summaries")


@pytest.mark.parametrize("as_folder", [True, False])
def test_a_front_is_loaded_from_a_path(as_folder: bool, tmp_path: Path) -> None:
    front, choosing = make_front(), Choosing(State(plan=make_plan()))
    front.save(tmp_path / "front.json")
    assert choosing.load(tmp_path if as_folder else tmp_path / "front.json") == front
    assert choosing.points == front.points


def test_what_is_no_front_of_this_model_is_refused_and_changes_nothing(table: LossTable, tmp_path: Path) -> None:
    choosing = Choosing(State(table=table))
    make_front().save(tmp_path / "foreign.json")
    (tmp_path / "broken.json").write_text("[]")
    for name, error, words in (
        ("foreign.json", ValueError, "another geometry"),
        ("broken.json", RecordError, "broken"),
        ("", OSError, "no front"),
    ):
        with pytest.raises(error, match=words):
            choosing.load(tmp_path / name if name else "")
    assert choosing.points == ()


def test_a_search_without_a_table_an_unknown_solver_and_too_little_density_are_refused(table: LossTable) -> None:
    with pytest.raises(ValueError, match="needs a loss table"):
        Choosing(State()).search(EPSILON, 0.5, 2, handle())
    with pytest.raises(ValueError, match="'guess'"):
        Choosing(State(table=table)).search("guess", 0.5, 2, handle())
    with pytest.raises(InfeasibleError):
        Choosing(State(table=table)).search(EPSILON, 0.01, 2, handle())


def test_a_search_that_is_stopped_leaves_the_front_as_it_was(table: LossTable, choosing: Choosing) -> None:
    before = choosing.state.front
    found = Choosing(State(table=table)).search(EPSILON, 0.5, 3, handle(stopped=True))
    with pytest.raises(ValueError, match="stopped early finds none"):
        choosing.keep(found)
    assert choosing.state.front is before


def test_picks_become_the_states_plan_and_the_one_it_is_compared_with(choosing: Choosing) -> None:
    state, points = choosing.state, choosing.points
    choosing.pick(points[2].plan.name)
    assert (state.plan, state.other) == (points[2].plan, None)
    choosing.pick(points[5].plan.name)
    assert (state.plan, state.other) == (points[5].plan, points[2].plan)
    choosing.pick(points[7].plan.name)
    assert (state.plan, state.other) == (points[7].plan, points[5].plan)
    choosing.pick(points[7].plan.name)
    assert (state.plan, state.other) == (points[7].plan, None), "a plan is not compared with itself"
    with pytest.raises(ValueError, match="'poem' is not a plan"):
        choosing.pick("poem")
    assert state.plan == points[7].plan


def test_two_picks_are_compared_by_density_goals_and_the_heads_that_differ(choosing: Choosing) -> None:
    assert choosing.compared([X]) == []
    first, last = choosing.points[0], choosing.points[9]
    choosing.pick(first.plan.name)
    assert "heads that differ" not in dict(choosing.compared([X, Y]))
    choosing.pick(last.plan.name)
    rows, n = dict(choosing.compared([X, Y, "poems"])), choosing.state.n_tokens
    assert rows["plan"] == [first.plan.name, last.plan.name]
    assert rows[f"density at {n:,}"] == [f"{point.plan.density(n):.1%}" for point in (first, last)]
    assert rows[goal_text(X)] == [f"{point.predicted[X]:.4f}" for point in (first, last)]
    assert rows["poems"] == ["-", "-"], "a goal that a plan has not"
    differ = (first.plan.spans(n) != last.plan.spans(n)).sum()
    assert rows["heads that differ"] == [f"{differ} of 90"]
    assert "stored in" not in rows
    choosing.picked[1] = replace(last, plan=last.plan.with_bits(8))
    assert dict(choosing.compared())["stored in"] == ["16 bits", "8 bits"]


def test_brushes_keep_the_plans_within_any_range_of_every_brushed_goal(choosing: Choosing) -> None:
    values = sorted(point.predicted[X] for point in choosing.points)
    low, high = (values[0], values[2]), (values[-1], values[-3])
    assert choosing.kept() == choosing.points
    assert choosing.brush({X: (high, low)})
    assert {point.predicted[X] for point in choosing.kept()} == {*values[:3], *values[-3:]}
    assert not choosing.brush({X: (low, tuple(reversed(high)))}), "the same ranges the other way round"
    middle = sorted(point.predicted[Y] for point in choosing.kept())[2]
    choosing.brush({X: (low, high), Y: ((0.0, middle),)})
    assert len(choosing.kept()) == 3
    head, rows = choosing.listed()
    assert head == ["plan", "kind", goal_text(X), goal_text(Y), "density"]
    assert [row[0] for row in rows] == [point.plan.name for point in choosing.kept()]
    assert rows[0][2] == f"{choosing.kept()[0].predicted[X]:.4f}"
    choosing.brush({X: ()})
    assert choosing.kept() == choosing.points


def test_a_brush_on_what_there_is_not_is_refused_and_one_on_a_goal_that_a_plan_lacks_leaves_it_out(choosing: Choosing) -> None:
    with pytest.raises(ValueError, match="no goal 'poems'"):
        choosing.brush({"poems": ((0, 1),)})
    front = make_front()
    bare = replace(front.points[3], predicted={Y: front.points[3].predicted[Y]})
    choosing.state.set(front=replace(front, points=(*front.points[:3], bare, *front.points[4:])))
    choosing.brush({X: ((-1.0, 9.0),)})
    assert [point.plan.name for point in choosing.points if point not in choosing.kept()] == [bare.plan.name]


def test_a_new_front_ends_picks_and_brushes(choosing: Choosing) -> None:
    choosing.pick(choosing.points[0].plan.name)
    choosing.brush({X: ((0, 1),)})
    choosing.state.set(front=make_front(count=5))
    assert (choosing.picked, choosing.brushes) == ([], {})
    assert len(choosing.kept()) == 5


def test_axes_carry_their_goals_and_a_goal_that_some_plan_lacks_is_told_and_not_drawn() -> None:
    front = make_front()
    axes = parallel_goals(front).data[0].dimensions
    assert [axis.name for axis in axes] == [X, Y, "density"]
    assert list(axes[0].values) == [point.predicted[X] for point in front]
    bare = replace(front.points[0], predicted={Y: 0.1})
    fig = parallel_goals(replace(front, points=(bare, *front.points[1:])))
    assert [axis.name for axis in fig.data[0].dimensions] == [Y, "density"]
    assert X in fig.layout.title.text
    with pytest.raises(ValueError, match="no goal is common"):
        parallel_goals(Front((replace(bare, density={}), replace(front.points[1], predicted={X: 1.0}, density={})), (X, Y)))


def test_the_recorded_front_can_be_brushed_along_every_axis() -> None:
    choosing = Choosing(State(front=Front.load(DEMO / "front.json")))
    for axis in parallel_goals(choosing.state.front).data[0].dimensions:
        choosing.brush({axis.name: ((float(min(axis.values)), float(min(axis.values))),)})
        assert 1 <= len(choosing.kept()) < len(choosing.points) or len(set(axis.values)) == 1
