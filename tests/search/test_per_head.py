"""A search in which every head may have bits of its own."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest

from moa_lab.engines import EngineLimits
from moa_lab.plan import mixes_of, read_mixes, told_mixes, uniform_plan
from moa_lab.records import Front, InfluenceProfile
from moa_lab.search import InfeasibleError, loss_table, search
from tests.search.instances import skewed_profile
from tests.search.tables import random_profile, rounded_profile, small_geometry

LENGTHS = (1024, 2048)
BITS = "16,8,8+4"


@pytest.fixture(scope="module")
def profile() -> InfluenceProfile:
    return rounded_profile(skewed_profile(6, 4, 2, LENGTHS))


@pytest.fixture(scope="module")
def front(profile: InfluenceProfile) -> Front:
    return search(profile, 0.3, bits=BITS, time_limit_s=6, max_points=12)


def test_candidates_are_those_of_every_mix_and_some_whose_heads_differ(front: Front) -> None:
    names = [point.plan.name for point in front]
    assert len(set(names)) == len(names)
    assert front.settings["bits"] == ["16", "8", "8+4", "per-head"]
    by_end: dict[str, list[int]] = {}
    for point in front:
        by_end.setdefault(point.plan.name.partition("@")[2], []).append(len(mixes_of(point.plan)))
    assert set(by_end) == {"", "8", "8+4", "per-head"}
    assert {max(by_end[end]) for end in ("", "8", "8+4")} == {1}
    assert min(by_end["per-head"]) > 1
    assert {point.origin for point in front if "@per-head" in point.plan.name} >= {"ranked", "default"}


def test_all_keep_the_bytes_and_are_predicted_with_their_rounding(front: Front, profile: InfluenceProfile) -> None:
    table = loss_table(profile, mixes=read_mixes(BITS), use_lengths=(2048, 4096))
    for point in front:
        for n, density in point.density.items():
            assert 0.28 < density <= 0.3
            assert density == point.plan.density(int(n))
        wide = table.with_plans(point.plan)
        for name, value in wide.predict(wide.choice(point.plan)).items():
            if name in point.predicted:
                assert value == pytest.approx(point.predicted[name])
    # Which holds the prediction to something: what is exact per head predicts no more than what is exact in one mix.
    best = {end: min(p.predicted["questions"] for p in front if p.plan.name.endswith(end)) for end in ("@8", "@8+4", "@per-head")}
    assert best["@per-head"] <= 1.02 * min(best["@8"], best["@8+4"])


def test_of_16_bits_alone_nothing_is_else_for_a_profile_that_knows_rounding(profile: InfluenceProfile) -> None:
    plain = skewed_profile(6, 4, 2, LENGTHS)
    for bits in (16, 8):
        ours, theirs = (search(one, 0.3, bits=bits, methods=("ranked", "budget"), max_points=6) for one in (profile, plain))
        assert ours.points == theirs.points


def test_a_profile_that_knows_no_rounding_is_searched_mix_by_mix_and_the_cure_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = search(skewed_profile(4, 4, 2, LENGTHS), 0.3, bits="16,8", time_limit_s=2, max_points=4, methods=("ranked", "budget"))
    assert found.settings["bits"] == ["16", "8"]
    assert [record.getMessage() for record in caplog.records] == [
        "one mix of bits holds for all heads of each plan: the profile does not know what stored bits cost each head: "
        "profile again with rounding=True (--rounding; a run in a new folder)"
    ]


def test_a_table_of_several_mixes_is_searched_head_by_head(profile: InfluenceProfile) -> None:
    table = loss_table(profile, mixes=read_mixes("8,4"))
    found = search(table, 0.2, methods=("budget", "milp", "evolve"), time_limit_s=4, max_points=6)
    assert all(set(mixes_of(point.plan)) <= {(8, 8), (4, 4)} and point.plan.name.endswith("@per-head") for point in found)
    with pytest.raises(ValueError, match="the table says in which heads may be stored, 8, 4; leave bits out"):
        search(table, 0.2, bits=8)
    with pytest.raises(InfeasibleError, match=r"density 0\.01 at length"):
        search(table, 0.01)


def test_an_engine_that_cuts_whole_layers_stores_all_heads_of_a_layer_alike(profile: InfluenceProfile) -> None:
    engine = EngineLimits("rows", windows_per_layer=1, stores_bits=True)
    found = search(profile, 0.3, bits="16,8", engine=engine, time_limit_s=4, max_points=8, methods=("ranked", "milp"))
    mixed = [point.plan for point in found if len(mixes_of(point.plan)) > 1]
    assert mixed
    for plan in mixed:
        assert (plan.widths() == plan.widths()[:, :1]).all()
        assert plan.search["engine"]["allocated"]["2048"] <= 0.3


def test_it_is_told_in_how_many_heads_each_mix_is() -> None:
    plan = uniform_plan(small_geometry(2, 2), 0.5)
    widths = np.full((2, 2, 2), 8)
    widths[0, 0, 1] = 4
    assert told_mixes(plan) == "16 bits"
    assert told_mixes(plan.with_bits(8)) == "8 bits"
    assert told_mixes(plan.with_bits(widths)) == "8 bits for 75% of heads, 8+4 for 25%"


def test_single_values_are_searched_per_head_as_well() -> None:
    profile = rounded_profile(random_profile(3, geometry=small_geometry(4, 2)))
    # Large enough for some heads to stay as they are.
    profile = replace(profile, rounding={key: 40 * lost for key, lost in profile.rounding.items()})
    found = search(profile, 0.3, bits="16,4", methods=("element",), time_limit_s=2, max_points=6)
    assert {point.plan.name.partition("@")[2] for point in found} == {"", "4", "per-head"}
