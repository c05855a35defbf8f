import dataclasses

import numpy as np
import pytest
from figure_records import make_plan, make_profile

from moa_lab import figures
from moa_lab.figures.influence import _visible_outline
from moa_lab.geometry import ModelGeometry
from moa_lab.masks import visible
from moa_lab.plan import SpanRule, dense_plan, uniform_plan
from moa_lab.records import InfluenceProfile

SMALL = ModelGeometry(layers=4, query_heads=6, kv_heads=2, head_dim=8, max_length=2048)


@pytest.fixture(scope="module")
def profile() -> InfluenceProfile:
    return make_profile(SMALL, lengths=(512, 1024), samples=3)


def test_influence_map_sums_what_lies_beyond_the_distance(profile: InfluenceProfile) -> None:
    heat = figures.influence_map(profile, "questions", 1024, beyond_tokens=128).data[0]
    expected = profile.distances["questions", 1024].astype(float).mean(axis=0)[..., 2:].sum(axis=-1)
    assert np.allclose(heat.z, expected.T)
    kv_head, share, rank, _ = heat.customdata[4, 2]
    assert kv_head == 4 // SMALL.group_size
    assert share == pytest.approx(100 * expected[2, 4] / profile.distance("questions", 1024)[2, 4].sum())
    assert rank == 1 + (expected > expected[2, 4]).sum()


def test_influence_map_separates_the_groups_of_query_heads(profile: InfluenceProfile) -> None:
    assert [shape.y0 for shape in figures.influence_map(profile, "questions", 512).layout.shapes] == [2.5]


@pytest.mark.parametrize("pool", ["max", "mean", "sum"])
def test_pooled_query_heads_make_one_row_per_kv_head(profile: InfluenceProfile, pool: str) -> None:
    far = figures.long_range_influence(profile, "questions", 1024)
    heat = figures.influence_map(profile, "questions", 1024, pool=pool).data[0]
    assert np.allclose(np.array(heat.z)[1], getattr(np, pool)(far[:, 3:], axis=1))
    kv_head, share, _, _ = heat.customdata[1, 2]
    assert kv_head == 1
    assert share == pytest.approx(100 * far[2, 3:].sum() / profile.distance("questions", 1024)[2, 3:].sum())
    with pytest.raises(ValueError, match="'median'"):
        figures.influence_map(profile, "questions", 1024, pool="median")


def test_the_difference_of_two_lengths_is_symmetric_around_nothing(profile: InfluenceProfile) -> None:
    here, there = ("questions", 1024), ("questions", 512)
    fig = figures.difference_map(profile, here, profile, there, against="the shorter & one")
    heat = fig.data[0]
    expected = figures.long_range_influence(profile, *here) - figures.long_range_influence(profile, *there)
    assert np.allclose(heat.z, expected.T)
    assert heat.zmax == -heat.zmin == pytest.approx(np.abs(expected).max())
    assert heat.colorscale[0][1] != heat.colorscale[-1][1]
    assert list(heat.customdata[4, 2]) == [1, *(figures.long_range_influence(profile, *key)[2, 4] for key in (here, there))]
    assert fig.layout.title.text == "questions, 1,024 tokens, less the shorter &amp; one"
    assert not np.any(figures.difference_map(profile, here, profile, here).data[0].z)
    assert np.shape(figures.difference_map(profile, here, profile, there, pool="sum").data[0].z) == (2, 4)


def test_profiles_of_two_models_have_no_difference(profile: InfluenceProfile) -> None:
    other = make_profile(ModelGeometry(4, 6, 3, 8, 2048), lengths=(512,), samples=1)
    with pytest.raises(ValueError, match="different geometry"):
        figures.difference_map(profile, ("questions", 512), other, ("questions", 512))


def test_curve_shows_the_mean_over_samples_with_its_band(profile: InfluenceProfile) -> None:
    band, curve = figures.influence_by_distance(profile, "questions", 1024, 1, 3).data
    assert np.allclose(curve.y, profile.distance("questions", 1024)[1, 3])
    assert list(curve.x[:2]) == [32, 96]
    assert len(band.y) == 2 * len(curve.y)


def test_the_cut_is_drawn_at_the_window_and_its_loss_is_written(profile: InfluenceProfile) -> None:
    plan = uniform_plan(SMALL, 0.5)
    fig = figures.influence_by_distance(profile, "questions", 1024, 1, 3, plan)
    assert {shape.x0 for shape in fig.layout.shapes} == {512 - 64}
    mean = profile.distance("questions", 1024)[1, 3]
    kept = np.floor(1000 * mean[:7].sum() / mean.sum()) / 10
    assert fig.layout.annotations[0].text == f"span 512 tokens keeps {kept}%"


def test_a_cut_never_reads_as_nothing_lost(profile: InfluenceProfile) -> None:
    curves = profile.distances["questions", 1024].copy()
    curves[:, 1, 3, 8:] = 1e-7
    fig = figures.influence_by_distance(
        dataclasses.replace(profile, distances={("questions", 1024): curves}), "questions", 1024, 1, 3, uniform_plan(SMALL, 0.5)
    )
    assert "100" not in fig.layout.annotations[0].text


def test_a_dense_head_has_no_cut(profile: InfluenceProfile) -> None:
    fig = figures.influence_by_distance(profile, "questions", 512, 0, 0, dense_plan(SMALL))
    assert not fig.layout.shapes
    assert "nothing is cut" in fig.layout.annotations[0].text


def test_a_span_of_all_that_a_layers_own_window_shows_cuts_nothing() -> None:
    hybrid = make_profile(dataclasses.replace(SMALL, layer_windows=(160, None, 160, None)), lengths=(512,), samples=1)
    plan = uniform_plan(hybrid.geometry, 0.5, [512], sink_tokens=4, min_span=8)
    whole = dataclasses.replace(plan, rules=((SpanRule(200.0, 0.0),) * 2,) * 4)
    fig = figures.influence_by_distance(hybrid, "questions", 512, 0, 0, whole)
    assert not fig.layout.shapes
    assert fig.layout.annotations[0].text == "span 160 tokens: nothing is cut"
    # Where less is kept, what is cut off ends where the layer sees no further.
    fig = figures.influence_by_distance(hybrid, "questions", 512, 0, 0, dataclasses.replace(plan, rules=((SpanRule(100.0, 0.0),) * 2,) * 4))
    assert {(shape.x0, shape.x1) for shape in fig.layout.shapes} == {(96, 160), (96, 96)}


def test_a_head_without_influence_still_has_a_figure(profile: InfluenceProfile) -> None:
    silent = InfluenceProfile(SMALL, 64, {("q", 512): np.zeros((4, 6, 8, 8), np.float32)}, {("q", 512): np.zeros((1, 4, 6, 8), np.float32)})
    plan = uniform_plan(SMALL, 0.5)
    for fig in (figures.influence_map(silent, "q", 512), figures.influence_by_distance(silent, "q", 512, 0, 0, plan)):
        assert fig.to_json()
    assert np.isnan(figures.head_blocks(silent, "q", 512, 0, 0, plan).data[0].z).all()


def test_blocks_of_long_texts_are_summed_to_at_most_128_a_side() -> None:
    geometry = ModelGeometry(1, 1, 1, 8, 32768)
    random = np.random.default_rng(0)
    blocks = {("q", 19200): random.random((1, 1, 300, 300), dtype=np.float32)}
    profile = InfluenceProfile(geometry, 64, blocks, {("q", 19200): np.ones((1, 1, 1, 300), np.float32)})
    heat = figures.head_blocks(profile, "q", 19200, 0, 0).data[0]
    assert heat.z.shape == (100, 100)
    assert heat.customdata.sum() == pytest.approx(float(blocks["q", 19200].sum()), rel=1e-5)


@pytest.mark.parametrize("own", [None, 100, 300, 5000])
@pytest.mark.parametrize("span", [128, 200, 480, 512])
def test_the_outline_encloses_what_the_head_sees(own: int | None, span: int) -> None:
    geometry = ModelGeometry(1, 1, 1, 8, 1024, (own,))
    plan = dataclasses.replace(dense_plan(geometry), rules=((SpanRule(float(span), 0.0),),))
    keys, queries = _visible_outline(plan, 512, 0, 0)
    area = abs(sum(keys[i] * queries[i + 1] - keys[i + 1] * queries[i] for i in range(len(keys) - 1))) / 2
    query, key = np.arange(512)[:, None], np.arange(512)[None, :]
    # A span of all that the layer's own window shows hides nothing of it.
    window = span - 64 if own is None or span < own else max(span - 64, own)
    seen = visible(query, key, 64, window) & (query - key < (own or 512))
    # Corners lie between tokens: along a diagonal of 512 tokens the two counts differ by at most a token a row and edge.
    assert abs(area - seen.sum()) <= 2 * 512


def test_unknown_tasks_and_heads_are_refused_by_name(profile: InfluenceProfile) -> None:
    with pytest.raises(ValueError, match=r"no 'poems' at 512 tokens; it has 'questions' at 512"):
        figures.influence_map(profile, "poems", 512)
    with pytest.raises(ValueError, match="head must be below 4 and 6, got 0 and 6"):
        figures.influence_by_distance(profile, "questions", 512, 0, 6)
    with pytest.raises(ValueError, match="another geometry"):
        figures.head_blocks(profile, "questions", 512, 0, 0, make_plan())
