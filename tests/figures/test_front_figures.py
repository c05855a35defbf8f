import dataclasses

import plotly.graph_objects as go
import pytest
from figure_records import make_baselines, make_front, make_measurements

from moa_lab import figures
from moa_lab.figures.front import goal
from moa_lab.figures.plan_kinds import kind_styles
from moa_lab.records import Front, FrontPoint, Measurements

X, Y = "questions@2048/all_or_nothing", "summaries@2048/sum"


def named(fig: go.Figure) -> dict[str, go.Scatter]:
    return {trace.name: trace for trace in fig.data if trace.name}


def test_points_are_grouped_by_origin_with_a_marker_each() -> None:
    front = make_front()
    traces = named(figures.front_scatter(front, X, Y))
    assert set(traces) == {"searched: as the slider does", "searched: NSGA-II", "searched: exact"}
    assert len({trace.marker.symbol for trace in traces.values()}) == 3
    assert sum(len(trace.x) for trace in traces.values()) == len(front)


def test_a_plan_looks_as_its_kind_does_where_it_was_measured() -> None:
    points = [
        dataclasses.replace(point, origin=origin)
        for point, origin in zip(make_front(), ("uniform", "ranked", "default", "paper", "worst-questions"), strict=False)
    ]
    front, styles = Front(tuple(points), (X, Y)), kind_styles()
    traces = named(figures.front_scatter(front, X, Y))
    names = ["uniform spans", "searched spans", "searched: the paper's goals", "searched: questions at their worst distance"]
    assert list(traces) == [*names, "whole heads over a floor"]
    for kind in ("uniform spans", "searched spans", "whole heads over a floor"):
        assert (traces[kind].marker.color, traces[kind].marker.symbol) == (styles[kind].color, styles[kind].symbol)
    assert {traces[name].marker.color for name in names[1:]} == {styles["searched spans"].color}
    assert len({trace.marker.symbol for trace in traces.values()}) == 5
    lines = figures.parallel_goals(front).data[0].line
    steps = dict(lines.colorscale)
    drawn = [steps[min(1.0, max(end for end in steps if end <= (place + 0.5) / 5 + 1e-9))] for place in lines.color]
    assert drawn == [styles[kind].color for kind in ("uniform spans", "whole heads over a floor", *["searched spans"] * 3)]


def test_the_line_joins_only_points_that_nothing_beats_in_the_picture() -> None:
    front = make_front()
    line = figures.front_scatter(front, X, Y).data[0]
    corners = set(zip(line.x, line.y, strict=True))
    values = [(point.predicted[X], point.predicted[Y]) for point in front]
    best = {p for p in values if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in values)}
    assert corners == best


def test_the_chosen_plan_is_found_though_it_was_renamed() -> None:
    front = make_front()
    chosen = front.points[4].plan
    ring = named(figures.front_scatter(front, X, Y, chosen=chosen.renamed("moa")))[f"chosen: {chosen.name}"]
    assert (ring.x[0], ring.y[0]) == (front.points[4].predicted[X], front.points[4].predicted[Y])
    assert f"chosen: {chosen.name}" in named(figures.front_scatter(front, X, Y, chosen=chosen.name))


def test_reference_plans_are_drawn_in_with_open_markers() -> None:
    _, uniform = make_baselines()
    reference = FrontPoint(uniform, {X: 0.4, Y: 0.3}, {"2048": 0.5}, "uniform")
    trace = named(figures.front_scatter(make_front(), X, Y, reference=[reference]))["uniform"]
    assert (trace.x[0], trace.y[0]) == (0.4, 0.3)
    assert trace.marker.symbol.endswith("-open")


@pytest.mark.parametrize(("name", "length"), [("density", "4096"), ("density@1024", "1024")])
def test_density_is_a_goal_at_the_longest_or_a_named_length(name: str, length: str) -> None:
    point = make_front().points[0]
    assert goal(point, name) == point.density[length]
    assert "density" in figures.front_scatter(make_front(), name, X).layout.xaxis.title.text


def test_a_goal_that_no_point_has_is_refused_with_the_ones_there_are() -> None:
    with pytest.raises(ValueError, match="summaries@2048/sum"):
        figures.front_scatter(make_front(), X, "poems@2048/sum")
    with pytest.raises(ValueError, match="no points"):
        figures.front_scatter(Front((), ()), X, Y)


def test_predictions_meet_their_measurements_by_plan_name() -> None:
    front = make_front()
    measured = make_measurements(front=front)
    fig = figures.predicted_against_measured(front, measured)
    seen = {(x, y) for trace in fig.data for x, y in zip(trace.x, trace.y, strict=True)}
    expected = {(p.predicted[X], measured.select(plan=p.plan.name, metric="retrieval")[0].value) for p in front}
    assert seen == expected


def test_rank_correlation_is_one_when_the_prediction_sorts_the_plans_as_the_loss_does() -> None:
    front = make_front(count=6)
    rows = [
        dataclasses.replace(row, plan=point.plan.name, metric="cross_entropy", value=point.predicted[X] ** 2, low=0.0, high=1.0)
        for point in front
        for row in make_measurements({"moa": 0.5}, (2048,)).rows[:1]
    ]
    fig = figures.predicted_against_measured(front, Measurements(tuple(rows)))
    assert fig.layout.meta["rank_correlation"] == pytest.approx(1)


def test_an_unmeasured_front_is_refused_with_the_cure() -> None:
    with pytest.raises(ValueError, match="validate the front first"):
        figures.predicted_against_measured(make_front(), make_measurements())


def test_densities_that_are_almost_one_have_an_axis_whose_marks_differ() -> None:
    points = [dataclasses.replace(point, density={"2048": 0.5 - 1e-5 * index}) for index, point in enumerate(make_front())]
    axis = figures.front_scatter(Front(tuple(points), (X, Y)), "density", X).layout.xaxis
    assert axis.range[1] - axis.range[0] > 0.04
    assert axis.range[0] < 0.5 < axis.range[1]
    points[0] = dataclasses.replace(points[0], density={"2048": 0.25})
    assert figures.front_scatter(Front(tuple(points), (X, Y)), "density", X).layout.xaxis.range is None
