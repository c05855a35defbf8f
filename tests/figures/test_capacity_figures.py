from __future__ import annotations

import pytest

from moa_lab import figures


def test_requests_stand_over_the_density_beside_what_it_promises() -> None:
    figure = figures.requests_by_density({"pages": [(0.5, 11.0), (0.25, 23.0)], "a layer": [(0.25, 12.0)]}, 5.7, "4,096 tokens")
    promised, pages, layer = figure.data
    assert list(promised.x) == [0.25, 0.5, 1.0]
    assert list(promised.y) == pytest.approx([22.8, 11.4, 5.7])
    assert (list(pages.x), list(pages.y)) == ([0.25, 0.5], [23.0, 11.0])
    assert layer.name == "a layer"


@pytest.mark.parametrize("found", [{}, {"pages": []}])
def test_no_requests_are_no_figure(found: dict[str, list[tuple[float, float]]]) -> None:
    with pytest.raises(ValueError, match="no requests to draw"):
        figures.requests_by_density(found, 5.7, "")
