from __future__ import annotations

import pytest

from moa_lab.figures import score_by_density
from moa_lab.records import Measurement


def row(plan: str, density: float, value: float, length: int = 2048) -> Measurement:
    return Measurement(plan, "retrieval", "needles", length, value, 64, value - 0.05, value + 0.04, density)


ROWS = [
    row("dense", 1.0, 0.95), row("moa-50", 0.5, 0.9), row("moa-25", 0.25, 0.8), row("uniform-25", 0.25, 0.2),
    row("uniform-50", 0.5, 0.45), row("moa-25", 0.25, 0.1, length=4096),
]  # fmt: skip


def test_a_family_is_a_line_over_its_densities_at_one_length() -> None:
    fig = score_by_density(ROWS, "needles", 2048)
    lines = {trace.name: trace for trace in fig.data}
    assert set(lines) == {"dense", "moa", "uniform"}
    assert list(lines["moa"].x) == [25, 50]
    assert list(lines["moa"].y) == pytest.approx([80, 90])
    assert list(lines["moa"].error_y.arrayminus) == pytest.approx([5, 5])
    assert list(lines["moa"].error_y.array) == pytest.approx([4, 4])


def test_dense_is_a_level_and_families_differ_by_shape_as_well_as_colour() -> None:
    lines = {trace.name: trace for trace in score_by_density(ROWS, "needles", 2048).data}
    assert list(lines["dense"].y) == [95, 95]
    assert lines["moa"].marker.symbol != lines["uniform"].marker.symbol
    assert lines["moa"].marker.color != lines["uniform"].marker.color


def test_axes_tell_their_units() -> None:
    fig = score_by_density(ROWS, "needles", 2048)
    assert "%" in fig.layout.xaxis.title.text
    assert "%" in fig.layout.yaxis.title.text


def test_what_was_not_measured_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'lines' at 2048"):
        score_by_density(ROWS, "lines", 2048)
