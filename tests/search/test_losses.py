"""The loss table against a naive computation from a full matrix, and its fixed points."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moa_lab.geometry import ModelGeometry
from moa_lab.masks import visible
from moa_lab.plan import DENSE, SpanRule
from moa_lab.records import FORMS, InfluenceProfile, LossTable
from moa_lab.search import loss_table, rule_grid
from tests.search.instances import skewed_profile

SINK = 64


def _from_matrices(matrices: np.ndarray, geometry: ModelGeometry) -> InfluenceProfile:
    """Profile of one sample from |E| (layers, query_heads, N, N): distance bins of the keys beyond the sink."""
    n = matrices.shape[-1]
    query, key = np.indices((n, n))
    bins = np.zeros((1, *matrices.shape[:2], n // 64), dtype=np.float32)
    for b in range(n // 64):
        inside = (query >= key) & (key >= SINK) & ((query - key) // 64 == b)
        bins[0, :, :, b] = (matrices * inside).sum(axis=(-1, -2))
    return InfluenceProfile(geometry, SINK, {("questions", n): np.zeros((1, 1, 1, 1), np.float32)}, {("questions", n): bins})


def _row(table: LossTable, form: str) -> np.ndarray:
    objective = next(o for o in table.objectives if o.form == form)
    return table.losses[slice(*objective.rows)]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([256, 320]))
def test_loss_table_equals_what_the_mask_of_a_rule_hides_in_the_full_matrix(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    geometry = ModelGeometry(layers=2, query_heads=4, kv_heads=2, head_dim=8, max_length=1024)
    matrices = np.tril(rng.lognormal(0, 2, (2, 4, n, n)))
    rules = (SpanRule(128.0, 0.0), SpanRule(192.0, 0.0), SpanRule(256.0, 0.0), DENSE)
    table = loss_table(_from_matrices(matrices, geometry), rules, forms=("sum", "all_or_nothing"))

    position = np.arange(n)
    lost = np.zeros((2, 4, len(rules)))
    for index, rule in enumerate(rules):
        window = max(rule.span_tokens(n) - SINK, 1)
        hidden = ~visible(position[:, None], position[None, :], SINK, window)
        lost[..., index] = (matrices * hidden).sum(axis=(-1, -2))
    pooled = lost.reshape(2, 2, 2, len(rules)).max(axis=2)
    np.testing.assert_allclose(_row(table, "sum")[0], pooled / pooled[..., 0].sum(), rtol=1e-4, atol=1e-9)

    dense = np.array([rule.span_tokens(n) == n for rule in rules])
    nothing = np.where(dense, 0.0, pooled[..., :1])
    np.testing.assert_allclose(_row(table, "all_or_nothing")[0], nothing / nothing[..., 0].sum(), rtol=1e-4, atol=1e-9)


def test_windows_between_bins_are_interpolated_linearly() -> None:
    histogram = np.zeros((1, 1, 1, 8), dtype=np.float32)
    histogram[..., 1:5] = [8.0, 4.0, 2.0, 1.0]
    geometry = ModelGeometry(layers=1, query_heads=1, kv_heads=1, head_dim=8, max_length=1024)
    profile = InfluenceProfile(geometry, SINK, {}, {("summaries", 512): histogram})
    # Windows 64, 80, 128, 320: the second has a quarter of bin 1 in view.
    rules = (SpanRule(128.0, 0.0), SpanRule(144.0, 0.0), SpanRule(192.0, 0.0), SpanRule(384.0, 0.0))
    table = loss_table(profile, rules, forms=("sum",))
    np.testing.assert_allclose(table.losses[0, 0, 0], np.array([15.0, 13.0, 7.0, 0.0]) / 15.0)


def test_worst_distance_rows_split_the_sum_and_the_largest_counts() -> None:
    table = loss_table(skewed_profile(lengths=(1024,)), forms=("sum", "worst_distance"))
    pooled_by_one = loss_table(skewed_profile(lengths=(1024,), query_heads=2, kv_heads=2), forms=("sum", "worst_distance"))
    rows, total = _row(pooled_by_one, "worst_distance"), _row(pooled_by_one, "sum")[0]
    # Without pooling the buckets beyond the floor add up to the sum, up to the scale of either form.
    ratio = rows.sum(axis=0)[total > 0] / total[total > 0]
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-6)
    assert 8 <= len(_row(table, "worst_distance")) <= 12
    choice = np.zeros((2, 2), dtype=int)
    assert table.predict(choice)["questions@1024/worst_distance"] == pytest.approx(
        _row(table, "worst_distance")[:, :, :, 0].sum(axis=(1, 2)).max()
    )


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.sampled_from(["max", "sum", "mean"]), st.booleans())
def test_floor_scores_one_dense_scores_zero_and_longer_spans_never_lose_more(seed: int, pool: str, own_window: bool) -> None:
    profile = skewed_profile(lengths=(256, 1024), seed=seed, windows=(512, None) if own_window else ())
    table = loss_table(profile, pool=pool)  # type: ignore[arg-type]
    assert {o.form for o in table.objectives} == set(FORMS)
    floor = np.full((2, 2), table.rules.index(SpanRule(128.0, 0.0)))
    dense = np.full((2, 2), table.rules.index(DENSE))
    assert list(table.predict(floor).values()) == pytest.approx([1.0] * len(table.objectives))
    assert set(table.predict(dense).values()) == {0.0}
    for objective in table.objectives:
        order = np.argsort(table.span_tokens(objective.length)[-1], kind="stable")
        losses = table.losses[slice(*objective.rows)][..., order]
        assert (np.diff(losses, axis=-1) <= 1e-12).all()


def test_pooling_maps_query_head_h_to_kv_head_h_over_group_and_keeps_its_strongest() -> None:
    profile = skewed_profile(layers=1, query_heads=6, kv_heads=2, tasks=("questions",), lengths=(512,))
    for strong in range(6):
        histogram = np.full((1, 1, 6, 8), 1e-6, dtype=np.float32)
        histogram[0, 0, strong, 3] = 1.0
        one = replace(profile, distances={("questions", 512): histogram})
        losses = loss_table(one, forms=("sum",)).losses[0, 0, :, 0]
        assert losses.argmax() == strong // 3
        assert losses.max() > 1000 * losses.min()


def test_a_layer_with_its_own_window_loses_nothing_once_the_rule_spans_that_window() -> None:
    profile = skewed_profile(layers=2, lengths=(1024,), windows=(256, None))
    rules = (SpanRule(128.0, 0.0), SpanRule(256.0, 0.0), SpanRule(512.0, 0.0), DENSE)
    table = loss_table(profile, rules)
    assert (table.losses[:, 0, :, 1:] == 0).all()
    assert (_row(table, "sum")[:, 1, :, 1:3] > 0).all()


def test_lengths_at_which_all_rules_coincide_have_no_loss_and_stay_finite() -> None:
    # At 64 and 128 tokens, a floor of 128 keeps everything.
    table = loss_table(skewed_profile(lengths=(64, 128, 512)), use_lengths=())
    for objective in table.objectives:
        losses = table.losses[slice(*objective.rows)]
        assert np.isfinite(losses).all()
        assert losses.any() == (objective.length == 512)


def test_a_table_survives_saving(tmp_path: object) -> None:
    table = loss_table(skewed_profile())
    loaded = LossTable.load(table.save(f"{tmp_path}/table.safetensors"))
    assert (loaded.rules, loaded.objectives) == (table.rules, table.objectives)
    np.testing.assert_array_equal(loaded.losses, table.losses)


def test_bad_arguments_of_a_table_are_named() -> None:
    profile = skewed_profile()
    for arguments, message in [
        ({"pool": "median"}, "pool must be one of"),
        ({"forms": ("total",)}, "forms must be some of"),
        ({"rules": ()}, "rules is empty"),
        ({"min_span": 64}, "min_span .64. must exceed"),
        ({"use_lengths": (0,)}, "at least 1 token"),
        ({"use_lengths": (10**6,)}, "length 1000000 is beyond the model"),
    ]:
        with pytest.raises(ValueError, match=message):
            loss_table(profile, **arguments)  # type: ignore[arg-type]
    broken = {key: np.full_like(array, np.nan) for key, array in profile.distances.items()}
    with pytest.raises(ValueError, match="not finite for questions@256"):
        loss_table(replace(profile, distances=broken))
    with pytest.raises(ValueError, match="profile holds no"):
        loss_table(replace(profile, distances={}))
    assert rule_grid((*profile.lengths, 2 * max(profile.lengths))) == loss_table(profile).rules
