from functools import cache
from pathlib import Path

import plotly.graph_objects as go
import pytest
from figure_records import DIFFERENCES, SPEEDS, make_baselines, make_front, make_measurements, make_plan, make_profile

from moa_lab import figures
from moa_lab.bench import BenchRecord
from moa_lab.figures import theme
from moa_lab.records import head_patterns

BENCHMARKS = Path(__file__).resolve().parents[2] / "data" / "benchmarks"
FIGURES = (
    "span_map",
    "mask_preview",
    "influence_map",
    "difference_map",
    "influence_by_distance",
    "head_blocks",
    "front_scatter",
    "predicted_against_measured",
    "retrieval_heatmap",
    "score_bars",
    "kv_bytes_bars",
    "hypervolume_curve",
    "rank_confidence",
    "throughput_by_kv_bytes",
    "kernel_roofline",
    "score_by",
    "speed_by_accuracy",
    "differences",
    "predicted_vs_measured",
    "matrix",
    "kind_map",
    "score_map",
    "ranks_compared",
)
LABELLED = ("kv_bytes_bars", "differences")
"""Figures whose y axis carries names, not a quantity."""


@cache
def all_figures() -> dict[str, go.Figure]:
    plan, profile, front = make_plan(), make_profile(lengths=(512,), samples=2), make_front()
    measured = make_measurements(front=front)
    kinds = head_patterns(profile, "questions", 512).kinds
    ours, theirs = (figures.long_range_influence(profile, task, 512, pool="sum") for task in ("questions", "summaries"))
    return {
        "kind_map": figures.kind_map(kinds),
        "score_map": figures.score_map(theirs, "DuoAttention: mine"),
        "ranks_compared": figures.ranks_compared(ours, theirs, "ours", "theirs", kinds),
        "span_map": figures.span_map(plan, 2048),
        "mask_preview": figures.mask_preview(plan, 3, 1, 2048),
        "influence_map": figures.influence_map(profile, "questions", 512),
        "difference_map": figures.difference_map(profile, ("questions", 512), profile, ("summaries", 512)),
        "influence_by_distance": figures.influence_by_distance(profile, "questions", 512, 4, 5, plan),
        "head_blocks": figures.head_blocks(profile, "questions", 512, 4, 5, plan),
        "front_scatter": figures.front_scatter(front, front.objectives[0], front.objectives[1], chosen=front.points[2].plan),
        "predicted_against_measured": figures.predicted_against_measured(front, measured),
        "retrieval_heatmap": figures.retrieval_heatmap(measured, "uniform"),
        "score_bars": figures.score_bars(measured, "cross_entropy"),
        "kv_bytes_bars": figures.kv_bytes_bars(make_baselines(), 2048),
        "hypervolume_curve": figures.hypervolume_curve({"pymoo": [0.1, 0.3]}, {"pymoo": [1.0, 2.5]}, {"exact": 0.4}),
        "rank_confidence": figures.rank_confidence(
            {task: figures.long_range_influence(profile, task, 512) for task in ("questions", "summaries")}, group_size=3
        ),
        "throughput_by_kv_bytes": figures.throughput_by_kv_bytes(BenchRecord.load(BENCHMARKS / "generate.json")),
        "kernel_roofline": figures.kernel_roofline(*(BenchRecord.load(BENCHMARKS / f"{name}.json") for name in ("decode", "prefill"))),
        "score_by": figures.score_by(SPEEDS[:4], "density", "density"),
        "speed_by_accuracy": figures.speed_by_accuracy(SPEEDS),
        "differences": figures.differences(DIFFERENCES, "A against B", "difference (nats per token)"),
        "predicted_vs_measured": figures.predicted_vs_measured([1.0, 2.0, 3.0], [1.0, 3.0, 2.0]),
        "matrix": figures.matrix([[0.5]], ["a"], ["b"], title="Transfer", unit="found (%)", row_title="from", column_title="to"),
    }


def luminance(color: str) -> float:
    channels = [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_has_a_title_axis_titles_with_units_and_a_transparent_background(name: str) -> None:
    fig = all_figures()[name]
    assert fig.layout.title.text
    assert fig.layout.xaxis.title.text
    assert fig.layout.yaxis.title.text or name in LABELLED
    assert fig.layout.template.layout.paper_bgcolor == "rgba(0,0,0,0)"
    assert fig.layout.template.layout.plot_bgcolor == "rgba(0,0,0,0)"


@pytest.mark.parametrize("name", FIGURES)
def test_dark_changes_the_template_and_nothing_else(name: str) -> None:
    light = all_figures()[name]
    dark = figures.with_theme(light, dark=True)
    assert dark.layout.template.layout.font.color != light.layout.template.layout.font.color
    assert dark.update_layout(template=figures.template()) == light


@pytest.mark.parametrize("page", ["#ffffff", "#1c2027"])
def test_series_colours_and_text_stand_out_on_both_backgrounds(page: str) -> None:
    styles = theme.series_styles(["dense", "uniform", "moa", "a", "b", "c", "d"])
    assert min(contrast(style.color, page) for style in styles.values()) >= 3
    ink = theme.template(dark=page != "#ffffff").layout
    assert min(contrast(color, page) for color in (ink.font.color, ink.xaxis.tickfont.color)) >= 4.5


@pytest.mark.parametrize("page", ["#ffffff", "#111111"])
def test_a_figure_of_unknown_background_is_read_on_white_and_on_jupyterlabs_black(page: str) -> None:
    layout = figures.hypervolume_curve({"pymoo": [0.1]}).layout.template.layout
    # 4.35 is the most that one colour can have to both.
    assert min(contrast(color, page) for color in (layout.font.color, layout.title.font.color, layout.xaxis.tickfont.color)) >= 4.3
    assert layout.xaxis.gridcolor.startswith("rgba("), "a grid that lets the page through is quiet on either"


def test_series_differ_in_shape_and_not_only_in_colour() -> None:
    styles = theme.series_styles(["dense", "uniform", "moa", "a", "b", "c", "d"])
    assert len({style.symbol for style in styles.values()}) == len(styles) == len({style.color for style in styles.values()})


def test_a_plan_looks_the_same_whoever_stands_beside_it() -> None:
    alone, crowd = theme.series_styles(["uniform"]), theme.series_styles(["x", "moa", "uniform", "dense"])
    assert alone["uniform"] == crowd["uniform"]


def test_config_offers_neither_logo_nor_upload() -> None:
    assert figures.CONFIG["displaylogo"] is False
    assert figures.CONFIG["showSendToCloud"] is False
    assert figures.CONFIG["plotlyServerURL"] == ""


def test_names_from_files_are_shown_as_they_are_not_as_markup() -> None:
    name = '<a href="http://example.org">x</a> & y'
    plan = make_plan(name=name)
    measured = make_measurements({name: 0.5})
    for fig in (figures.span_map(plan, 512), figures.retrieval_heatmap(measured, name), figures.score_bars(measured, "retrieval")):
        assert "<a " not in fig.to_json().replace("\\u003c", "<")
