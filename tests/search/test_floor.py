"""What is said where heads at the floor alone exceed the density: only cures that help, and they do."""

from __future__ import annotations

import re

import pytest

from moa_lab.geometry import ModelGeometry
from moa_lab.search.problem import InfeasibleError, check_floor


def geometry(*windows: int | None) -> ModelGeometry:
    return ModelGeometry(
        layers=len(windows), query_heads=4, kv_heads=1, head_dim=16, max_length=2048, layer_windows=windows
    )  # fmt: skip


def told(asked: dict[int, float], *windows: int | None, min_span: int = 128) -> str:
    with pytest.raises(InfeasibleError) as caught:
        check_floor(geometry(*windows), asked, min_span)
    return str(caught.value)


def test_longer_lengths_are_named_only_where_they_help() -> None:
    assert told({256: 0.3}, None, None).endswith("raise density, lower min_span (--min-span) to at most 76, or take longer lengths")
    # Layers with windows of 200 tokens see no more at any length.
    assert told({600: 0.5, 1200: 0.5}, 200, 200).endswith("raise density or lower min_span (--min-span) to at most 100")


def test_where_windows_are_smaller_than_the_sink_and_the_floor_both_are_to_be_lowered() -> None:
    assert told({768: 0.5}, 48, 48).endswith("raise density or lower sink and floor (--sink 4 --min-span 24)")


@pytest.mark.parametrize("windows", [(48, 48), (160,) * 5 + (None,), (None,)])
@pytest.mark.parametrize("density", [0.02, 0.2])
def test_what_is_named_as_a_cure_is_one(windows: tuple[int | None, ...], density: float) -> None:
    asked = {300: density}
    message = told(asked, *windows)
    if found := re.search(r"--sink (\d+) --min-span (\d+)\)", message):
        check_floor(geometry(*windows), asked, int(found[2]), int(found[1]))
        assert int(found[1]) < int(found[2])
    if found := re.search(r"to at most (\d+)", message):
        check_floor(geometry(*windows), asked, int(found[1]))
    if found := re.search(r"raise density \(to ([\d.]+) with the lowest floor", message):
        check_floor(geometry(*windows), {300: float(found[1])}, 65)
