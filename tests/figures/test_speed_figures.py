from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moa_lab.bench import BenchRecord
from moa_lab.figures import archive_scatter, hypervolume_curve, kernel_roofline, throughput_by_kv_bytes
from moa_lab.figures.roofline import roofline_points

BENCHMARKS = Path(__file__).resolve().parents[2] / "data" / "benchmarks"


@pytest.fixture(scope="module")
def records() -> dict[str, BenchRecord]:
    return {name: BenchRecord.load(BENCHMARKS / f"{name}.json") for name in ("decode", "prefill", "generate")}


def test_no_prefill_lies_above_the_roof_and_decoding_lies_where_its_bytes_say(records: dict[str, BenchRecord]) -> None:
    ceilings = records["prefill"].settings["ceilings"]
    assert all(point.rate < ceilings["matmul_TFLOP/s"] for point in roofline_points(records["prefill"]))
    row = records["decode"].select("D1")[0]
    ours = next(point for point in roofline_points(records["decode"]) if point.who == "ours")
    assert ours.rate == pytest.approx(row.ours * ours.intensity / 1e3)


def test_the_roof_bends_where_the_read_meets_the_matrix_product(records: dict[str, BenchRecord]) -> None:
    roof = next(trace for trace in kernel_roofline(records["decode"], records["prefill"]).data if trace.mode == "lines")
    ceilings = records["decode"].settings["ceilings"]
    assert np.asarray(roof.x)[1] == pytest.approx(1e3 * ceilings["matmul_TFLOP/s"] / ceilings["read_GB/s"])
    assert np.asarray(roof.y)[2] == pytest.approx(ceilings["matmul_TFLOP/s"])
    older = replace(records["decode"], settings={**records["decode"].settings, "ceilings": {"copy_GB/s": 2000.0, "matmul_TFLOP/s": 600.0}})
    roof = next(trace for trace in kernel_roofline(older).data if trace.mode == "lines")
    assert np.asarray(roof.x)[1] == pytest.approx(300)
    assert roof.name == "roof: copy, matrix product"


def test_a_record_without_ceilings_or_kernels_is_refused(records: dict[str, BenchRecord]) -> None:
    decode = records["decode"]
    with pytest.raises(ValueError, match="ceilings"):
        kernel_roofline(replace(decode, settings={**decode.settings, "ceilings": {}}))
    with pytest.raises(ValueError, match="records"):
        kernel_roofline(replace(decode, rows=()))


def test_a_quarter_of_the_cache_is_a_quarter_of_the_bytes_and_faster(records: dict[str, BenchRecord]) -> None:
    lines = {trace.name: trace for trace in throughput_by_kv_bytes(records["generate"], "Llama-2-7B").data}
    ours, dense = lines["ours standard-25 compiled"], lines["transformers StaticCache compiled"]
    assert np.asarray(ours.x) / np.asarray(dense.x) == pytest.approx(0.25, rel=0.1)
    assert (np.asarray(ours.y) > 3 * np.asarray(dense.y)).all()


def test_a_side_that_was_measured_compiled_and_not_is_drawn_once_and_failures_never(records: dict[str, BenchRecord]) -> None:
    generate = records["generate"]
    failed = {"model": "Llama-2-7B", "prompt": 4096, "side": "lost", "found": {"failed": "out of memory"}}
    sides = [*generate.settings["sides"], failed]
    drawn = [trace.name for trace in throughput_by_kv_bytes(replace(generate, settings={**generate.settings, "sides": sides})).data]
    assert sorted(drawn) == [
        "ours dense", "ours standard-25 compiled", "ours standard-50 compiled", "transformers DynamicCache",
        "transformers StaticCache compiled",
    ]  # fmt: skip


def test_a_group_of_query_heads_makes_as_many_flop_per_byte(records: dict[str, BenchRecord]) -> None:
    # bfloat16: two bytes a number, two FLOP a number and query head.
    assert {point.intensity for point in roofline_points(records["decode"])} == {1.0, 4.0, 7.0}


def test_fewer_bits_make_more_flop_per_byte(records: dict[str, BenchRecord]) -> None:
    row = records["decode"].select("D1")[0]
    assert row.shape["head_dim"] == 128
    packed = replace(row, id="B1", shape={**row.shape, "bits": "8"})
    points = [point for point in roofline_points(replace(records["decode"], rows=(row, packed))) if point.who == "ours"]
    assert points[1].intensity == pytest.approx(points[0].intensity * 256 / 132)
    assert points[1].told.endswith("in 8 bits")


def test_rows_of_one_measurement_are_one_point(records: dict[str, BenchRecord]) -> None:
    points = roofline_points(records["prefill"])
    # A chunk over a ring reads what no prompt of its shape reads: no point.
    rows = [row for row in records["prefill"] if row.id != "P4"]
    shapes = {tuple(row.shape.values()) for row in rows}
    assert len([point for point in points if point.who == "ours"]) == len(shapes) < len(rows)


def test_a_model_that_was_not_measured_is_refused_with_those_that_were(records: dict[str, BenchRecord]) -> None:
    with pytest.raises(ValueError, match="Llama-2-7B"):
        throughput_by_kv_bytes(records["generate"], "Llama-9")


def test_a_hypervolume_stays_until_the_next_generation_and_tells_its_seconds() -> None:
    fig = hypervolume_curve({"pymoo": [0.1, 0.3]}, {"pymoo": [1.0, 2.5]}, {"exact": 0.4})
    searched, level = fig.data
    assert (*searched.x,) == (1, 2)
    assert searched.line.shape == "hv"
    assert (*searched.customdata,) == (1.0, 2.5)
    assert {*level.y} == {0.4}


@pytest.mark.parametrize("volumes", [{}, {"pymoo": []}, {"pymoo": [float("nan")]}])
def test_a_search_without_generations_is_refused(volumes: dict[str, list[float]]) -> None:
    with pytest.raises(ValueError, match="volumes"):
        hypervolume_curve(volumes)


def test_a_generations_plans_are_drawn_in_its_first_two_goals_and_what_does_not_fit_is_refused() -> None:
    values = np.array([[0.1, 0.4, 0.9], [0.3, 0.2, 0.8]])
    fig = archive_scatter(values, ("questions", "summaries", "density"), 12)
    assert (list(fig.data[0].x), list(fig.data[0].y)) == ([0.1, 0.3], [0.4, 0.2])
    assert fig.layout.title.text == "Generation 12: 2 plans"
    assert "summaries" in fig.layout.yaxis.title.text
    for shape, goals in (((2, 3), ("one", "two")), ((2, 1), ("one",))):
        with pytest.raises(ValueError, match="values must be"):
            archive_scatter(np.zeros(shape), goals, 1)
