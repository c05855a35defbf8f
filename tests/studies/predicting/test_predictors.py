"""Predictors and random plans: equal density, another plan each time, and a regression that sees no plan it predicts."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from moa_lab.records import InfluenceProfile, LossTable
from moa_lab.search import loss_table
from moa_lab.studies.predicting.predictors import merged, predictors, random_choices, regressed
from tests.search.instances import skewed_profile
from tests.search.tables import random_profile, small_geometry

DENSITY = 0.5


@pytest.fixture(scope="module")
def profile() -> InfluenceProfile:
    return skewed_profile(6, 4, 2, (512, 1024))


@pytest.fixture(scope="module")
def table(profile: InfluenceProfile) -> LossTable:
    return loss_table(profile)


def test_random_plans_have_the_same_density_and_differ(table: LossTable) -> None:
    choices = random_choices(table, DENSITY, 20, seed=1)
    densities = [max(table.density(choice, n) for n in (512, 1024, 2048)) for choice in choices]
    assert max(densities) <= DENSITY
    assert min(densities) > DENSITY - 0.06
    assert len({choice.tobytes() for choice in choices}) == 20
    assert (random_choices(table, DENSITY, 3, seed=1)[2] == choices[2]).all()


def test_every_predictor_says_nothing_is_lost_by_the_dense_plan_and_most_by_the_floor(profile: InfluenceProfile, table: LossTable) -> None:
    dense, floor = (np.full((6, table.geometry.kv_heads), index) for index in (len(table.rules) - 1, 0))
    told = predictors(profile)
    assert len(told) >= 4
    for predict in told.values():
        assert predict(dense) == pytest.approx(0.0)
        assert predict(floor) == pytest.approx(1.0)


def test_merged_profiles_hold_every_sample(profile: InfluenceProfile) -> None:
    one, other = (random_profile(seed, geometry=small_geometry()) for seed in (0, 1))
    both = merged([one, other])
    for key in one.keys:
        assert len(both.span_effects[key]) == len(one.span_effects[key]) + len(other.span_effects[key])
        assert both.distance(*key) == pytest.approx((one.distance(*key) + other.distance(*key)) / 2)


def test_a_regression_corrects_heads_that_the_profile_gets_wrong(table: LossTable) -> None:
    choices = random_choices(table, DENSITY, 150)
    rng = np.random.default_rng(0)
    spans = table.span_tokens(1024) / 1024
    kept = np.stack([np.take_along_axis(spans, choice, axis=1).ravel() for choice in choices])
    true = (1 - kept) @ rng.exponential(size=kept.shape[1]) + 0.05 * rng.standard_normal(150)
    predicted = regressed(table, choices, list(true))
    plain = predictors(skewed_profile(6, 4, 2, (512, 1024)))["element, sum"]
    assert stats.spearmanr(predicted, true).statistic > stats.spearmanr([plain(choice) for choice in choices], true).statistic + 0.1


def test_a_regression_never_sees_the_plan_that_it_predicts(table: LossTable) -> None:
    choices = random_choices(table, DENSITY, 40)
    noise = np.random.default_rng(0).standard_normal(40)
    assert abs(stats.spearmanr(regressed(table, choices, list(noise)), noise).statistic) < 0.45
