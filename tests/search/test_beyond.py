"""Influence at lengths that were not profiled."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moa_lab.records import BLOCK_TOKENS
from moa_lab.search import loss_table
from moa_lab.search.beyond import at_length, growth, lost_at, stretched
from tests.search.instances import skewed_profile


def near_curve(length: int, reach: float = 600.0) -> np.ndarray:
    """What a head that reads its neighbourhood loses: it depends on the window in tokens."""
    starts = BLOCK_TOKENS * np.arange(length // BLOCK_TOKENS)
    return np.exp(-starts / reach)[None, None, None]


def far_curve(length: int) -> np.ndarray:
    """What a head that fetches facts from anywhere loses: it depends on the window as a share of the length."""
    starts = BLOCK_TOKENS * np.arange(length // BLOCK_TOKENS)
    return (1 - starts / length)[None, None, None]


def joined(length: int, share: float) -> np.ndarray:
    return share * far_curve(length) + (1 - share) * near_curve(length)


@settings(max_examples=20, deadline=None)
@given(st.floats(0.0, 1.0))
def test_the_share_that_moves_with_the_length_is_found_and_the_unseen_length_foretold(share: float) -> None:
    curves = {1024: joined(1024, share), 2048: joined(2048, share)}
    found = growth(curves, near_bins=1, windows=[None])
    assert found.moving == pytest.approx(share, abs=0.1)
    assert found.error is not None
    assert found.error < 0.05
    foretold = at_length(curves, 4096, found.moving, [None])
    assert foretold.shape == (1, 1, 1, 64)
    assert np.abs(foretold - joined(4096, share)).max() < 0.1


def test_one_profiled_length_promises_nothing_for_a_longer_one() -> None:
    found = growth({1024: near_curve(1024)}, near_bins=1, windows=[None])
    assert (found.moving, found.error) == (1.0, None)
    # A window of half the length loses the same share, whatever the length.
    assert lost_at(at_length({1024: near_curve(1024)}, 4096, 1.0, [None]), np.array([2048.0])) == pytest.approx(
        lost_at(near_curve(1024), np.array([512.0]))
    )


def test_a_layer_with_a_window_of_its_own_does_not_grow() -> None:
    curve = np.concatenate([near_curve(2048), near_curve(2048)], axis=1)
    found = at_length({2048: curve}, 4096, 1.0, [None, 512])
    np.testing.assert_allclose(found[:, 1, :, :32], curve[:, 1])
    np.testing.assert_allclose(found[:, 0, :, ::2], curve[:, 0])


def test_a_curve_at_its_own_length_is_unchanged_and_a_shorter_one_is_cut() -> None:
    curve = far_curve(2048)
    np.testing.assert_allclose(stretched(curve, 2048, 2048, 0.3), curve)
    np.testing.assert_allclose(stretched(curve, 2048, 1024, 0.0), curve[..., :16])


def test_a_span_that_was_enough_where_it_was_profiled_is_not_free_beyond() -> None:
    table = loss_table(skewed_profile(lengths=(256, 512)), use_lengths=(2048,))
    assert (table.lengths, table.profiled_lengths) == ((256, 512, 2048), (256, 512))
    whole = next(index for index, rule in enumerate(table.rules) if rule.beta == 0 and rule.alpha == 512)
    dense = next(index for index, rule in enumerate(table.rules) if rule.keeps_everything)
    for objective in table.objectives:
        losses = table.losses[slice(*objective.rows)]
        assert not losses[..., dense].any()
        assert losses[..., whole].any() == (objective.length == 2048)
    assert {objective.profiled for objective in table.objectives if objective.length == 2048} == {False}
    assert all((objective.error is None) == objective.profiled for objective in table.objectives)
