"""Losses of spans and of rounding in one table."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moa_lab.plan import DENSE, read_mixes
from moa_lab.records import InfluenceProfile
from moa_lab.search import default_goals, loss_table, mean_goal, solve_milp
from moa_lab.search.rounding import mix_losses
from tests.search.tables import random_profile, rounded_profile

MIXES = read_mixes("16,8,8+4,4")


def test_k_and_v_add_up_and_fewer_bits_never_lose_less() -> None:
    # One sample, layer and head: of 4 and 8 bits, of K and V. By chance V lost more in 8 bits.
    rounding = np.array([[0.5, 0.1], [0.2, 0.3]])[None, None, None]
    np.testing.assert_allclose(mix_losses(rounding, [(16, 16), (8, 8), (8, 4), (4, 16), (4, 4)])[0, 0], [0, 0.5, 0.5, 0.5, 0.8])
    two = np.concatenate([rounding, 3 * rounding])
    np.testing.assert_allclose(mix_losses(two, [(4, 4)])[0, 0], [1.6])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.booleans())
def test_in_16_bits_a_table_of_mixes_is_the_plain_one_and_the_others_lose_the_same_more_with_every_rule(seed: int, spans: bool) -> None:
    profile = rounded_profile(random_profile(seed, span_effects=spans), seed)
    plain, table = loss_table(profile), loss_table(profile, mixes=MIXES)
    assert (table.objectives, table.rules, table.mixes) == (plain.objectives, plain.rules * 4, MIXES)
    by_mix = table.losses.reshape(*plain.losses.shape[:3], 4, -1)
    np.testing.assert_array_equal(by_mix[..., 0, :], plain.losses)
    more = by_mix - plain.losses[..., None, :]
    np.testing.assert_allclose(more, np.broadcast_to(more[..., :1], more.shape), atol=1e-9)
    assert (np.diff(more[..., 0], axis=-1) >= 0).all()
    whole = {o.name: more[slice(*o.rows)].sum(axis=0) for o in table.objectives}
    for objective in (o for o in table.objectives if o.form == "worst_distance"):
        # Its buckets share what a sum loses, each objective in its own unit.
        ours, theirs = whole[objective.name], whole[f"{objective.task}@{objective.length}/sum"]
        np.testing.assert_allclose(ours / ours.max(), theirs / theirs.max())


def test_at_a_length_nobody_profiled_rounding_loses_what_it_does_at_the_nearest() -> None:
    profile = rounded_profile(random_profile(1))
    table = loss_table(profile, [DENSE], mixes=MIXES, use_lengths=[4096])
    raw = (
        profile.rounding["questions", 1024] / np.abs(profile.span_effects["questions", 1024]).max(-1).sum((1, 2))[:, None, None, None, None]
    )
    (objective,) = (o for o in table.objectives if (o.task, o.length, o.form) == ("questions", 4096, "sum"))
    found = table.losses[objective.rows[0]]
    np.testing.assert_allclose(found / found.max(), mix_losses(raw, MIXES) / mix_losses(raw, MIXES).max(), rtol=1e-6)


def test_heads_that_rounding_harms_keep_more_bits() -> None:
    profile = random_profile(0, samples=2)
    rounding = {key: np.full((2, 2, 2, 2, 2), 1e-3, np.float32) for key in profile.keys}
    for array in rounding.values():
        array[:, 1, 0] = 30.0
    table = loss_table(replace(profile, rounding=rounding), mixes=read_mixes("16,4"))
    answer = solve_milp(table, 0.5, goal=mean_goal(default_goals(table)))
    bits = table.plan(answer.choice, "found").widths()[..., 0]
    assert bits[1, 0] == 16
    assert (bits == 4).sum() >= 2


def test_a_profile_without_rounding_is_refused_with_the_cure() -> None:
    profile = random_profile()
    with pytest.raises(ValueError, match=r"profile again with rounding=True \(--rounding; a run"):
        loss_table(profile, mixes=MIXES)
    partly: InfluenceProfile = rounded_profile(profile)
    partly.rounding.pop(profile.keys[0])
    with pytest.raises(ValueError, match="profile again"):
        loss_table(partly, mixes=MIXES)
