"""Loss tables from the effect of whole spans: signed curves per sample."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moa_lab.plan import DENSE, SpanRule
from moa_lab.records import BLOCK_TOKENS, Form
from moa_lab.search import loss_table
from tests.search.tables import SINK, curve_profile, random_profile, small_geometry

LENGTH = 1024
ONE_QUERY_PER_KV = small_geometry(layers=2, kv_heads=3, group=1)


def _curves(seed: int, samples: int = 4) -> np.ndarray:
    """Signed curves (samples, 2, 3, 16) of equal total effect, so that every sample counts the same."""
    curves = np.random.default_rng(seed).normal(0, 1, (samples, 2, 3, LENGTH // BLOCK_TOKENS))
    return curves / np.abs(curves).max(axis=-1).sum(axis=(1, 2))[:, None, None, None]


def _losses(curves: np.ndarray, spans: list[int], form: Form) -> np.ndarray:
    """Rows of one form, for rules of the given spans (tokens)."""
    profile = curve_profile(curves, LENGTH, geometry=ONE_QUERY_PER_KV)
    return loss_table(profile, [SpanRule(float(span), 0.0) for span in spans], forms=(form,), estimator="span", use_lengths=()).losses


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_at_windows_of_whole_blocks_the_sum_is_the_mean_over_samples_of_the_absolute_curve(seed: int) -> None:
    curves = _curves(seed)
    blocks = np.arange(1, 15)
    found = _losses(curves, [SINK + BLOCK_TOKENS * int(b) for b in blocks], "sum")[0]
    expected = np.abs(curves).mean(axis=0)[..., blocks]
    np.testing.assert_allclose(found, expected / expected[..., 0].sum(), rtol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 13), st.integers(1, 63))
def test_between_whole_blocks_each_signed_curve_is_interpolated(seed: int, block: int, tokens: int) -> None:
    curves = _curves(seed)
    found = _losses(curves, [SINK + BLOCK_TOKENS, SINK + BLOCK_TOKENS * block + tokens], "sum")[0]
    part = tokens / BLOCK_TOKENS
    expected = np.abs((1 - part) * curves[..., block] + part * curves[..., block + 1]).mean(axis=0)
    np.testing.assert_allclose(found[..., 1], expected / np.abs(curves[..., 1]).mean(axis=0).sum(), rtol=1e-4, atol=1e-8)


def test_opposite_samples_do_not_cancel() -> None:
    one = _curves(0, samples=1)
    spans = [128, 256, 512]
    np.testing.assert_allclose(_losses(np.concatenate([one, -one]), spans, "sum"), _losses(one, spans, "sum"), rtol=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_a_distance_bucket_loses_the_absolute_change_of_the_curve_across_it_and_never_less_than_nothing(seed: int) -> None:
    curves = _curves(seed)
    found = _losses(curves, [128, 384, 640], "worst_distance")
    ends = np.concatenate([curves, np.zeros((*curves.shape[:-1], 1))], axis=-1)
    # Beyond the floor's window of one block lie 15 blocks, in ten buckets of a block and a half.
    edges = np.linspace(1, 16, 11)
    assert len(found) == 10
    assert found.min() >= 0
    at = [ends[..., int(e)] if e == int(e) else ends[..., int(e) : int(e) + 2].mean(axis=-1) for e in edges]
    expected = np.stack([np.abs(near - far).mean(axis=0) for near, far in pairwise(at)])
    np.testing.assert_allclose(found[..., 0], expected / expected.sum(axis=(1, 2)).max(), rtol=1e-4, atol=1e-8)


def test_all_or_nothing_loses_the_whole_effect_beyond_the_floor_at_any_cut() -> None:
    curves = _curves(1)
    found = _losses(curves, [128, 320, 960, 1024], "all_or_nothing")[0]
    expected = np.abs(curves[..., 1]).mean(axis=0)
    for rule in range(3):
        np.testing.assert_allclose(found[..., rule], expected / expected.sum(), rtol=1e-5)
    assert (found[..., 3] == 0).all()


@pytest.mark.parametrize("estimator", ["span", "element"])
def test_the_dense_span_of_a_layer_with_its_own_window_loses_nothing(estimator: str) -> None:
    geometry = small_geometry(layers=2, layer_windows=(384, None))
    profile = random_profile(geometry=geometry, keys=(("questions", LENGTH),))
    rules = (SpanRule(128.0, 0.0), SpanRule(320.0, 0.0), SpanRule(384.0, 0.0), SpanRule(640.0, 0.0), DENSE)
    table = loss_table(profile, rules, estimator=estimator)  # type: ignore[arg-type]
    assert (table.losses[:, 0, :, 2:] == 0).all()
    assert (table.losses[:, :, :, 4] == 0).all()
    for objective in table.objectives:
        rows = table.losses[slice(*objective.rows)]
        assert (rows[:, 0, :, :2].sum(axis=0) > 0).all()
        assert (rows[:, 1, :, 2:4].sum(axis=0) > 0).all()


def test_max_pooling_keeps_the_strongest_query_head_and_sum_and_mean_weigh_all_alike() -> None:
    geometry = small_geometry(layers=1, kv_heads=2, group=3)
    curves = np.zeros((1, 1, 6, LENGTH // BLOCK_TOKENS))
    # Query heads 0, 1, 2 read KV head 0; the others KV head 1.
    curves[0, 0, :, 1] = [6.0, 0.0, 0.0, 3.0, 3.0, 6.0]
    profile = curve_profile(curves, LENGTH, geometry=geometry)
    shares = {
        pool: loss_table(profile, [SpanRule(128.0, 0.0), DENSE], forms=("sum",), pool=pool).losses[0, 0, :, 0]  # type: ignore[arg-type]
        for pool in ("max", "sum", "mean")
    }
    np.testing.assert_allclose(shares["max"], [0.5, 0.5])
    np.testing.assert_allclose(shares["sum"], [1 / 3, 2 / 3])
    # The scale of an objective takes out the size of the group.
    np.testing.assert_allclose(shares["mean"], shares["sum"])


def test_span_effects_are_used_where_they_are_and_asked_for_where_they_are_not() -> None:
    whole = random_profile()
    single = replace(whole, span_effects={})
    partly = replace(whole, span_effects={key: value for key, value in whole.span_effects.items() if key != whole.keys[0]})
    np.testing.assert_array_equal(loss_table(whole).losses, loss_table(whole, estimator="span").losses)
    np.testing.assert_array_equal(loss_table(single).losses, loss_table(whole, estimator="element").losses)
    assert not np.allclose(loss_table(whole).losses, loss_table(single).losses)
    for profile in (single, partly):
        with pytest.raises(ValueError, match="estimator 'span' needs a profile with span effects"):
            loss_table(profile, estimator="span")
    with pytest.raises(ValueError, match="estimator must be one of"):
        loss_table(whole, estimator="entry")  # type: ignore[arg-type]


def test_span_effects_that_are_not_finite_are_refused() -> None:
    profile = random_profile()
    key = profile.keys[0]
    broken = {**profile.span_effects, key: np.full_like(profile.span_effects[key], np.nan)}
    with pytest.raises(ValueError, match=f"not finite for {key[0]}@{key[1]}"):
        loss_table(replace(profile, span_effects=broken))
