"""What the figures of studies draw: which rows, where, with which intervals, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from figure_records import DIFFERENCES, SPEEDS, rate_row, score_row

from moa_lab.evaluate.intervals import Interval
from moa_lab.figures import differences, matrix, predicted_vs_measured, score_by, speed_by_accuracy
from moa_lab.records import Measurement


def test_speed_stands_over_what_is_found_with_a_marker_per_density_and_both_intervals() -> None:
    lines = {trace.name: trace for trace in speed_by_accuracy(SPEEDS).data}
    assert set(lines) == {"moa", "uniform", "dense", "transformers dense"}
    moa = lines["moa"]
    # moa-15 was not timed, so it is not drawn.
    assert list(moa.text) == ["25%", "50%"]
    assert list(moa.x) == pytest.approx([70, 75])
    assert list(moa.y) == [4000, 2000]
    assert list(moa.error_x.array) == pytest.approx([14, 15])
    assert list(moa.error_y.arrayminus) == pytest.approx([400, 200])
    assert len({trace.marker.symbol for trace in lines.values()}) == 4


def test_another_codes_dense_model_finds_what_the_dense_model_finds() -> None:
    lines = {trace.name: trace for trace in speed_by_accuracy(SPEEDS).data}
    assert list(lines["transformers dense"].x) == list(lines["dense"].x)
    assert list(lines["transformers dense"].y) == [400]


def test_a_length_can_be_asked_for() -> None:
    fig = speed_by_accuracy(SPEEDS, 1024)
    assert [list(trace.y) for trace in fig.data] == [[9000]]
    assert "1,024" in fig.layout.title.text


def test_speed_without_accuracy_is_refused() -> None:
    with pytest.raises(ValueError, match="no plan has both"):
        speed_by_accuracy([rate_row("moa-25", 4000, 0.25)])
    with pytest.raises(ValueError, match="at 77 tokens"):
        speed_by_accuracy(SPEEDS, 77)


def test_differences_are_in_the_order_given_and_open_where_the_interval_holds_none() -> None:
    fig = differences(DIFFERENCES, "A against B", "needles found, A less B (%)")
    found = {trace.name: trace for trace in fig.data}
    assert list(found["decided"].y) == ["better", "worse"]
    assert list(found["not decided"].y) == ["unclear"]
    assert found["not decided"].marker.symbol.endswith("-open")
    assert not found["decided"].marker.symbol.endswith("-open")
    assert list(fig.layout.yaxis.categoryarray) == list(DIFFERENCES)
    assert list(found["decided"].x) == pytest.approx([20, -30])
    assert list(found["decided"].error_x.array) == pytest.approx([10, 10])
    assert fig.layout.shapes[0].x0 == 0


def test_ratios_are_held_against_one_and_units_that_are_no_percent_are_left_alone() -> None:
    fig = differences({"a": Interval(1.5, 3, 1.2, 1.8), "b": Interval(1.1, 3, 0.9, 1.3)}, "A over B", "ratio", none=1.0, goal=2.0)
    assert [trace.name for trace in fig.data] == ["decided", "not decided"]
    assert list(fig.data[0].x) == [1.5]
    assert [shape.x0 for shape in fig.layout.shapes] == [1, 2]


def test_rows_of_a_record_can_be_drawn_as_they_are() -> None:
    assert list(differences({"a": score_row("moa-25", 0.5)}, "Needles", "found (%)").data[0].x) == [50]


@pytest.mark.parametrize(("found", "match"), [({}, "at least one"), ({"a": Interval(0.5, 3, 0.6, 0.7)}, "no interval")])
def test_what_is_no_interval_is_refused(found: dict[str, Interval], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        differences(found, "nothing", "ratio")


def test_predictions_stand_against_measurements_with_their_rank_correlation() -> None:
    fig = predicted_vs_measured([1, 2, 3, 4], [1.1, 1.2, 5.0, 1.3], ["a", "b", "c", "<d>"], series=["x", "x", "y", "y"])
    # Ranks 1 2 4 3 against 1 2 3 4: 1 - 6 * 2 / (4 * 15).
    assert fig.layout.meta["rank_correlation"] == pytest.approx(0.8)
    assert "+0.80" in fig.layout.title.text
    assert [list(trace.x) for trace in fig.data] == [[1, 2], [3, 4]]
    assert fig.data[0].marker.symbol != fig.data[1].marker.symbol
    assert list(fig.data[1].text) == ["c", "&lt;d&gt;"]


def test_two_plans_have_no_rank_correlation() -> None:
    assert "correlation" not in predicted_vs_measured([1, 2], [1, 2]).layout.title.text


@pytest.mark.parametrize(("x", "y"), [([], []), ([1.0], [1.0, 2.0])])
def test_lists_of_other_lengths_are_refused(x: list[float], y: list[float]) -> None:
    with pytest.raises(ValueError, match="equally long"):
        predicted_vs_measured(x, y)


NAMES = {"title": "Transfer", "unit": "needles found (%)", "row_title": "profiled on", "column_title": "tested on"}


def test_a_matrix_shows_its_numbers_rows_from_the_top_and_nothing_where_nothing_was_measured() -> None:
    fig = matrix([[0.9, 0.5], [np.nan, 0.7]], ["prose", "code"], ["prose", "code"], **NAMES)
    heat = fig.data[0]
    assert heat.z[0] == pytest.approx((90, 50))
    assert heat.z[1][0] is None
    assert heat.texttemplate == "%{z:.0f}"
    assert fig.layout.yaxis.autorange == "reversed"
    assert (fig.layout.yaxis.title.text, fig.layout.xaxis.title.text) == ("profiled on", "tested on")
    assert "%" in heat.colorbar.title.text


def test_differences_in_a_matrix_are_coloured_about_zero() -> None:
    heat = matrix([[0.1, -0.4]], ["a"], ["b", "c"], **{**NAMES, "unit": "nats per token"}, difference=True).data[0]
    assert (heat.zmin, heat.zmax) == (-0.4, 0.4)


@pytest.mark.parametrize("values", [[], [[1.0]], [[np.nan, np.nan]]])
def test_a_matrix_that_its_labels_do_not_fit_is_refused(values: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="values must be 1 x 2"):
        matrix(values, ["a"], ["b", "c"], **NAMES)


WHOLE = [
    score_row("dense", 0.9, density=1.0), score_row("moa-25", 0.8, whole_heads=15), score_row("moa-25", 0.2, whole_heads=8),
    score_row("uniform-25", 0.1, whole_heads=8),
]  # fmt: skip


def test_a_score_stands_over_a_number_of_the_detail_and_rows_without_it_are_levels() -> None:
    fig = score_by(WHOLE, "whole_heads", "whole heads (of 90)")
    lines = {trace.name: trace for trace in fig.data}
    assert list(lines["moa"].x) == [8, 15]
    assert list(lines["moa"].y) == pytest.approx([20, 80])
    assert list(lines["moa"].error_y.array) == pytest.approx([4, 16])
    assert list(lines["dense"].x) == [8, 15]
    assert list(lines["dense"].y) == pytest.approx([90, 90])
    assert lines["dense"].mode == "lines"
    assert "needles, 4,096 tokens" in fig.layout.title.text
    assert fig.layout.xaxis.title.text == "whole heads (of 90)"


def test_lines_are_told_apart_by_what_is_asked_for_and_a_number_may_be_worked_out() -> None:
    rows = [score_row("moa-25", value, task=task, length=n) for task, n, value in (("a", 1024, 0.5), ("a", 4096, 0.4), ("b", 1024, 0.3))]
    fig = score_by(rows, lambda found: found.length / 1024, "length (k tokens)", series="task", log=True)
    assert {trace.name: list(trace.x) for trace in fig.data} == {"a": [1, 4], "b": [1]}
    assert fig.layout.xaxis.type == "log"


@pytest.mark.parametrize(
    ("rows", "match"),
    [([], "one metric, got none"), ([*WHOLE, rate_row("moa-25", 4000, 0.25)], "one metric"), (WHOLE[:1], "no row has the number")],
)
def test_scores_that_cannot_be_drawn_are_refused(rows: list[Measurement], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        score_by(rows, "whole_heads", "whole heads")
