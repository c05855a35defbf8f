from __future__ import annotations

import numpy as np
import pytest

from moa_lab.figures import token_map


def test_a_map_of_heads_is_symmetric_and_crosses_those_that_miss_their_source() -> None:
    values = np.array([[0.5, -2.0], [0.0, 1.0], [0.1, 0.2]])
    spans, misses = np.full((3, 2), 128), np.zeros((3, 2), dtype=int)
    misses[2, 1] = 700
    fig = token_map(values, spans, misses, "What brought “4”", "nats")
    heat, crosses = fig.data
    assert np.array_equal(heat.z, values.T)
    assert (heat.zmin, heat.zmax) == (-2, 2)
    assert heat.customdata[1, 2].tolist() == [2, 1, 128, 700]
    assert (list(crosses.x), list(crosses.y)) == ([2], [1])
    with pytest.raises(ValueError, match="one shape"):
        token_map(values, spans.T, misses, "", "")


def test_a_map_of_nothing_has_a_range() -> None:
    nothing = np.zeros((2, 2))
    assert token_map(nothing, nothing, nothing, "", "nats").data[0].zmax > 0
