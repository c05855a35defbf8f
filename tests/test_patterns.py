"""The kinds of heads, by the rule that `moa_lab.records.patterns` states, on profiles made to be of one kind."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moa_lab.geometry import ModelGeometry
from moa_lab.records import KINDS, InfluenceProfile, head_patterns

GEOMETRY = ModelGeometry(layers=2, query_heads=4, kv_heads=2, head_dim=16, max_length=4096)
KEY, BLOCKS = ("questions", 512), 8
NEAR, FIRST, FAR = 0, 1, 2


def profile_of(shares: np.ndarray, lost: np.ndarray, noise: float = 0.0, samples: int = 6) -> InfluenceProfile:
    """shares: (layers, query_heads, 3) of influence near, on the first block, and far. lost: (layers, query_heads) nats beyond 128."""
    lag = np.subtract(*np.indices((BLOCKS, BLOCKS)))
    first = np.broadcast_to(np.arange(BLOCKS) == 0, lag.shape)
    places = [(lag >= 0) & (lag < 2), (lag >= 2) & first, (lag >= 2) & ~first]
    blocks = np.zeros((2, 4, BLOCKS, BLOCKS))
    for share, where in enumerate(places):
        blocks += shares[..., share, None, None] * where / where.sum()
    effects = np.zeros((samples, 2, 4, BLOCKS))
    effects[..., :3] = lost[None, :, :, None]
    effects[..., 2] += noise * np.where(np.arange(samples) % 2, 1.0, -1.0)[:, None, None]
    distances = np.full((samples, 2, 4, BLOCKS), 1e-3)
    return InfluenceProfile(GEOMETRY, 64, {KEY: blocks.astype("f4")}, {KEY: distances.astype("f4")}, span_effects={KEY: effects})


def even(*shares: float) -> np.ndarray:
    return np.broadcast_to(np.array(shares), (2, 4, 3)).copy()


def test_where_influence_goes_decides_between_sink_local_and_mixed() -> None:
    shares = even(0.7, 0.2, 0.1)
    shares[0, 2:] = (0.2, 0.7, 0.1)
    shares[1, :2] = (0.3, 0.3, 0.4)
    found = head_patterns(profile_of(shares, np.full((2, 4), 0.01)), *KEY)
    assert found.kinds.tolist() == [["local", "sink"], ["mixed", "local"]]
    assert np.allclose(np.stack([found.near, found.first, found.far], axis=-1).sum(axis=-1), 1)
    assert found.first[0, 1] == pytest.approx(0.7)


def test_a_head_without_whose_far_past_the_loss_rises_most_is_a_retrieval_head_whatever_else_it_reads() -> None:
    lost = np.full((2, 4), 0.001)
    lost[0, 3] = 0.2
    found = head_patterns(profile_of(even(0.1, 0.8, 0.1), lost), *KEY)
    assert found.kinds.tolist() == [["sink", "retrieval"], ["sink", "sink"]]
    assert found.lost[0, 1] == pytest.approx(0.201), "the sum of its query heads"
    assert found.lost[0, 1] >= 2 * found.lost.mean()


def test_what_samples_do_not_agree_on_makes_no_retrieval_head() -> None:
    lost = np.full((2, 4), 0.001)
    lost[0, 3] = 0.2
    loud = profile_of(even(0.1, 0.8, 0.1), lost, noise=1.0)
    assert "retrieval" not in head_patterns(loud, *KEY).kinds
    one = replace(loud, span_effects={KEY: np.abs(loud.span_effects[KEY][:1])})
    assert head_patterns(one, *KEY).sure.all(), "of one sample nothing is known but its sign"


def test_equal_heads_are_no_retrieval_heads_and_a_loss_that_falls_is_none() -> None:
    for lost in (np.full((2, 4), 0.1), np.full((2, 4), -0.1)):
        assert set(head_patterns(profile_of(even(0.1, 0.2, 0.7), lost), *KEY).kinds.ravel()) == {"mixed"}


def test_a_profile_of_single_values_goes_by_the_influence_of_far_keys() -> None:
    plain = profile_of(even(0.6, 0.2, 0.2), np.zeros((2, 4)))
    distances = plain.distances[KEY].copy()
    distances[:, 1, 0, 5] = 1.0
    found = head_patterns(replace(plain, span_effects={}, distances={KEY: distances}), *KEY)
    assert found.kinds.tolist() == [["local", "local"], ["retrieval", "local"]]
    assert found.lost[1, 0] == pytest.approx(1 + 2 * 6e-3 - 1e-3, rel=1e-4)
    assert set(np.unique(found.kinds)) <= set(KINDS)
    with pytest.raises(ValueError, match="no 'poems' at 512 tokens"):
        head_patterns(plain, "poems", 512)


def test_without_blocks_retrieval_heads_are_known_and_where_others_look_is_not() -> None:
    lost = np.zeros((2, 4))
    lost[1, 0] = 0.5
    whole = profile_of(even(0.1, 0.7, 0.2), lost)
    found = head_patterns(replace(whole, blocks={}), *KEY)
    assert found.kinds.tolist() == [["unknown", "unknown"], ["retrieval", "unknown"]]
    assert np.isnan([found.near, found.first, found.far]).all()
    assert np.array_equal(found.lost, head_patterns(whole, *KEY).lost)
    assert not replace(whole, blocks={KEY: np.zeros((2, 4, 0, 0))}).has_blocks(*KEY)
    with pytest.raises(ValueError, match="has no 'questions' at 1024"):
        head_patterns(whole, "questions", 1024)
