"""Whole heads by influence over a floor."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moa_lab.plan import DENSE
from moa_lab.search import (
    InfeasibleError,
    loss_table,
    ranked_plan,
)
from tests.search.instances import skewed_profile
from tests.search.tables import FLOOR, keeps, random_table, small_geometry


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.2, 1.0))
def test_a_ranked_plan_keeps_every_limit_and_no_other_whole_head_would_fit(seed: int, density: float) -> None:
    table = random_table(seed, geometry=small_geometry(3, 4))
    targets = {1024: density, 4096: density}
    choice = table.choice(ranked_plan(table, targets, floor_tokens=128))
    floor, dense = table.rules.index(FLOOR), table.rules.index(DENSE)
    assert keeps(table, choice[None], targets).all()
    assert set(choice.ravel().tolist()) <= {floor, dense}
    for head in zip(*(choice == floor).nonzero(), strict=True):
        more = choice.copy()
        more[head] = dense
        assert not keeps(table, more[None], targets).all()


def test_a_floor_above_the_density_names_the_length_and_what_it_needs() -> None:
    with pytest.raises(InfeasibleError, match=r"density 0\.1 at length 1024 is infeasible: floor_tokens 128 needs at least 0\.125"):
        ranked_plan(random_table(0), {1024: 0.1}, floor_tokens=128)


def test_ranked_plan_uses_all_tasks_without_questions_and_names_a_floor_it_lacks() -> None:
    table = loss_table(skewed_profile(tasks=("essays",)))
    assert ranked_plan(table, 0.8, floor_tokens=128).name == "ranked-128"
    with pytest.raises(ValueError, match=r"constant floors are \[128, 192"):
        ranked_plan(table, 0.8, floor_tokens=200)
    with pytest.raises(InfeasibleError, match="floor_tokens 256 needs at least"):
        ranked_plan(table, 0.6, floor_tokens=256)
