"""Spans and bits under one budget of bytes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moa_lab.plan import mix_of, mixed_name, read_mixes, tokens_bought, told_bits, uniform_plan
from moa_lab.plan.mixes import stored_plan
from moa_lab.search import InfeasibleError, search
from tests.search.instances import skewed_profile
from tests.search.tables import small_geometry

LENGTHS = (1024, 2048)


def test_mixes_are_read_each_once_the_most_bits_first() -> None:
    assert read_mixes(16) == ((16, 16),)
    assert read_mixes("4, 8+4,16,8, 8+4") == ((16, 16), (8, 8), (8, 4), (4, 4))
    assert [told_bits(mix) for mix in read_mixes("16,8+4,4")] == ["16", "8+4", "4"]
    assert [mixed_name("moa", mix) for mix in read_mixes("16,8+4")] == ["moa", "moa@8+4"]
    # The last takes the fewest bytes, whichever of K and V has them.
    assert read_mixes("4+16,8") == ((4, 16), (8, 8))
    for wrong in ("", "5", "8+", "8+4+4", "8;4", "fp8", "-8"):
        with pytest.raises(ValueError, match="bits must be"):
            read_mixes(wrong)


def test_a_plan_has_a_mix_where_all_its_heads_are_stored_alike() -> None:
    plan = uniform_plan(small_geometry(layers=4, kv_heads=2, max_length=8192), 0.5)
    assert [mix_of(stored_plan(plan, mix)) for mix in read_mixes("16,8,8+4")] == [(16, 16), (8, 8), (8, 4)]
    with pytest.raises(ValueError, match=r"one mix of bits.*4, 8"):
        mix_of(plan.with_bits(np.array([8, 4])[None, :, None]))


@pytest.mark.parametrize("bits", ["8", "8+4", "4"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_tokens_bought_take_the_bytes_asked_for(bits: str, head_dim: int) -> None:
    geometry, (mix,) = replace(small_geometry(layers=4, kv_heads=2, max_length=8192), head_dim=head_dim), read_mixes(bits)
    bought = tokens_bought({4096: 0.25, 8192: 0.9}, mix, geometry)
    assert bought[8192] == 1.0
    plan = stored_plan(uniform_plan(geometry, bought[4096], [4096]), mix)
    assert plan.name == f"uniform@{bits}"
    assert 0.99 * 0.25 < plan.density(4096) <= 0.25


def test_every_mix_buys_spans_of_its_own_and_all_keep_the_bytes() -> None:
    front = search(skewed_profile(6, 4, 2, LENGTHS), 0.3, bits="16,8,4", time_limit_s=6, max_points=9)
    by_bits: dict[int, list[float]] = {}
    for point in front:
        widths = point.plan.widths()
        assert (widths == widths[0, 0, 0]).all()
        assert point.plan.name.endswith({16: point.origin, 8: "@8", 4: "@4"}[int(widths[0, 0, 0])]) or widths[0, 0, 0] == 16
        for n in LENGTHS:
            assert point.density[str(n)] == point.plan.density(n) <= 0.3 + 1e-9
        by_bits.setdefault(int(widths[0, 0, 0]), []).append(float(np.mean(point.plan.spans(2048))))
    assert sorted(by_bits) == [4, 8, 16]
    assert min(by_bits[8]) > 1.3 * max(by_bits[16]), "head_dim is small: grids weigh much"
    assert {point.origin for point in front if point.plan.bits} >= {"uniform", "ranked"}
    assert front.settings["bits"] == ["16", "8", "4"]
    assert len({point.plan.name for point in front}) == len(front)


def test_a_budget_that_only_fewer_bits_can_keep_leaves_the_others_out() -> None:
    profile = skewed_profile(6, 4, 2, LENGTHS)
    front = search(profile, 0.1, bits="16,8", time_limit_s=4, max_points=6)
    assert all(point.plan.bits for point in front)
    with pytest.raises(InfeasibleError):
        search(profile, 0.02, bits="16,8", time_limit_s=4)


def test_bits_that_hold_every_token_leave_nothing_to_choose() -> None:
    front = search(skewed_profile(4, 4, 2, LENGTHS), 0.7, bits="4", time_limit_s=4)
    assert all((point.plan.spans(2048) == 2048).all() for point in front)
    assert all(point.plan.density(2048) < 0.7 for point in front)


def test_a_budget_that_no_mix_can_keep_is_refused_in_bytes_of_the_fewest_bits() -> None:
    profile = skewed_profile(6, 4, 2, LENGTHS)
    with pytest.raises(InfeasibleError, match=r"density 0.01 at length 1024 .* at least ([0-9.]+); raise density") as refused:
        search(profile, 0.01, bits="16,8", time_limit_s=1)
    least = float(str(refused.value).split("at least ")[1].split(";")[0])
    assert least < 0.125
    assert len(search(profile, least, bits="16,8", time_limit_s=1, max_points=2))
    with pytest.raises(InfeasibleError, match=f"density {least - 1e-4:.4g} at"):
        search(profile, least - 1e-4, bits=8, time_limit_s=1)
