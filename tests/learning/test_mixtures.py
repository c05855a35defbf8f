"""Chances keep the density on average, evidence moves against the slope, and the last choice keeps the density for sure."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moa_lab.engines import EngineLimits, meets
from moa_lab.learning.mixtures import Mixtures
from moa_lab.records import LossTable
from moa_lab.search import InfeasibleError
from moa_lab.search.problem import Usage
from tests.search.tables import random_table, small_geometry

TARGETS = {2048: 0.4, 4096: 0.4}


@pytest.fixture(scope="module")
def table() -> LossTable:
    return random_table(geometry=small_geometry(3, 2))


def usage(table: LossTable, chances: np.ndarray) -> np.ndarray:
    """Mean share of the dense cache at the lengths of TARGETS."""
    return np.asarray((Usage(table, TARGETS).limits(TARGETS).usage * chances).sum(axis=(1, 2)))


@pytest.mark.parametrize("share", [0.95, 0.7, 0.5, 0.4, 0.2])
@pytest.mark.parametrize("spread", [0.0, 3.0, 30.0])
def test_the_mean_usage_is_the_limit_somewhere_and_above_it_nowhere(table: LossTable, share: float, spread: float) -> None:
    mixtures = Mixtures(table, TARGETS, rate=0.1)
    mixtures.evidence = spread * np.random.default_rng(0).standard_normal(mixtures.evidence.shape)
    chances = mixtures.chances(np.array([share, share]))
    assert chances.sum(axis=1) == pytest.approx(1.0)
    used = usage(table, chances)
    assert (used <= share + 1e-3).all()
    assert used.max() == pytest.approx(share, abs=2e-3)


def test_without_evidence_all_heads_are_alike(table: LossTable) -> None:
    chances = Mixtures(table, TARGETS, rate=0.1).chances(np.array([0.5, 0.5]))
    assert np.ptp(chances, axis=0).max() < 1e-9


def test_evidence_goes_to_the_rules_that_would_have_lost_less(table: LossTable) -> None:
    mixtures = Mixtures(table, TARGETS, rate=0.1)
    slope = np.zeros(mixtures.evidence.shape)
    slope[2, 1], slope[4, 3] = -1.0, 1.0
    for _ in range(5):
        chances = mixtures.chances(mixtures.limit)
        mixtures.step(chances, slope)
    assert mixtures.evidence[2].argmax() == 1
    assert mixtures.evidence[4].argmin() == 3
    # Heads in which all rules are alike have learned nothing.
    assert np.abs(np.delete(mixtures.evidence, [2, 4], axis=0)).max() == 0.0


def test_what_all_rules_of_a_head_lose_is_no_evidence_and_the_scale_of_slopes_does_not_matter(table: LossTable) -> None:
    slopes = np.random.default_rng(1).standard_normal((3, 6, len(table.rules)))
    found = []
    for scale, shift in ((1.0, 0.0), (1e-6, 5.0)):
        mixtures = Mixtures(table, TARGETS, rate=0.1)
        for slope in slopes:
            mixtures.step(mixtures.chances(mixtures.limit), scale * (slope + shift))
        found.append(mixtures.evidence)
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)


def test_no_slope_at_all_changes_nothing(table: LossTable) -> None:
    mixtures = Mixtures(table, TARGETS, rate=0.1)
    mixtures.step(mixtures.chances(mixtures.limit), np.zeros(mixtures.evidence.shape))
    assert not mixtures.evidence.any()


def test_the_choice_has_the_most_evidence_that_the_density_pays_for(table: LossTable) -> None:
    mixtures = Mixtures(table, TARGETS, rate=0.1)
    whole = len(table.rules) - 1
    mixtures.evidence[1, whole], mixtures.evidence[5, whole] = 9.0, 8.0
    choice = mixtures.choice()
    assert choice[0, 1] == choice[2, 1] == whole
    assert all(table.density(choice, n) <= TARGETS[n] for n in TARGETS)
    one = mixtures.choice(max_rules_per_layer=1)
    assert (one[:, 0] == one[:, 1]).all()
    assert all(table.density(one, n) <= TARGETS[n] for n in TARGETS)


def test_the_choice_is_one_that_the_engine_of_the_table_holds(table: LossTable) -> None:
    engine = EngineLimits("some", windows_per_model=2, windows_per_layer=1, block_tokens=64, tokens_in_flight=32)
    plans = {}
    for name, searched in (("free", table), ("held", replace(table, engine=engine))):
        mixtures = Mixtures(searched, TARGETS, rate=0.1)
        mixtures.evidence = np.random.default_rng(0).normal(size=mixtures.evidence.shape)
        plans[name] = table.plan(mixtures.choice(), name)
    assert meets(plans["held"], engine, TARGETS)
    assert not meets(plans["free"], engine, TARGETS)


def test_a_density_below_the_floor_is_refused(table: LossTable) -> None:
    with pytest.raises(InfeasibleError, match="infeasible"):
        Mixtures(table, {2048: 0.01}, rate=0.1)
