from __future__ import annotations

import numpy as np
import pytest

from moa_lab.figures import percentile_ranks, rank_confidence

SETS = {"a": np.array([[1.0, 2.0], [3.0, 4.0]]), "b": np.array([[4.0, 2.0], [3.0, 1.0]])}


def test_ranks_run_from_the_weakest_at_0_to_the_strongest_at_100() -> None:
    ranks = percentile_ranks(SETS)
    assert ranks.shape == (2, 2, 2)
    assert ranks[0].ravel() == pytest.approx([0, 100 / 3, 200 / 3, 100])
    assert ranks[1].ravel() == pytest.approx([100, 100 / 3, 200 / 3, 0])


def test_the_map_shows_how_far_a_rank_moves_by_query_head_and_layer() -> None:
    heat = rank_confidence(SETS).data[0]
    assert np.asarray(heat.z) == pytest.approx(np.array([[100, 0], [0, 100]]))


def test_a_head_is_marked_as_strong_in_every_set_or_in_some() -> None:
    every, some = rank_confidence({"a": SETS["a"], "same": SETS["a"], "b": SETS["b"]}, top=0.4).data[1:]
    assert [(*every.x,), (*every.y,)] == [(1,), (0,)]
    assert {*zip(some.x, some.y, strict=True)} == {(0, 0), (1, 1)}


@pytest.mark.parametrize("sets", [{"a": SETS["a"]}, {"a": SETS["a"], "b": np.ones((3, 2))}, {"a": SETS["a"], "b": np.full((2, 2), np.nan)}])
def test_one_set_other_shapes_and_nan_are_refused(sets: dict[str, np.ndarray]) -> None:
    with pytest.raises(ValueError, match="influence"):
        percentile_ranks(sets)
