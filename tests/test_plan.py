"""Plans: the span formula, what they cost, their card, and the authors' files."""

import json
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moa_lab.geometry import ModelGeometry
from moa_lab.plan import DENSE, Plan, SpanRule, as_plan, check_density, dense_plan, full_or_floor_plan, named_apart, uniform_plan
from moa_lab.provenance import Provenance
from moa_lab.storage import RecordError

MHA = ModelGeometry(layers=2, query_heads=2, kv_heads=2, head_dim=8, max_length=4096)
GQA = ModelGeometry(layers=1, query_heads=4, kv_heads=2, head_dim=8, max_length=4096)


def grown_plan(geometry: ModelGeometry) -> Plan:
    """A plan with a different rule for every head."""
    rules = tuple(tuple(SpanRule(-100.0 * layer, (head + 1) / 7) for head in range(geometry.kv_heads)) for layer in range(geometry.layers))
    return Plan(geometry, rules, name="grown", lengths=(512, 2048), search={"origin": "test"}, scores={"retrieval": {"n": 4}})


# --- spans


@pytest.mark.parametrize(
    ("rule", "n_tokens", "span"),
    [
        (SpanRule(256, 0.25), 4096, 1280),  # the formula
        (SpanRule(-2048, 0.5), 4096, 128),  # clipped from below
        (SpanRule(8192, 1.0), 4096, 4096),  # clipped from above
        (SpanRule(0, 0.01), 100, 100),  # shorter than the floor: everything
        (SpanRule(0, 0.3), 1001, 300),  # rounded down to a token
        (SpanRule(0, 0.29), 100_000, 29_000),  # 0.29 * 100000 is 28999.999... in binary
    ],
)
def test_span_is_the_clipped_line(rule: SpanRule, n_tokens: int, span: int) -> None:
    assert rule.span_tokens(n_tokens) == span


@settings(deadline=None)
@given(st.floats(-4096, 8192), st.floats(0, 1), st.integers(1, 20_000))
def test_a_span_lies_between_the_floor_and_the_length(alpha: float, beta: float, n_tokens: int) -> None:
    span = SpanRule(alpha, beta).span_tokens(n_tokens)
    assert min(128, n_tokens) <= span <= n_tokens
    if 128 < span < n_tokens:
        assert span == pytest.approx(alpha + beta * n_tokens, abs=1.0)


def test_published_spans_are_rounded_up_to_64_but_not_past_the_length() -> None:
    assert SpanRule(0, 0.5).span_tokens(1025, multiple=64) == 576
    assert SpanRule(0, 0.5).span_tokens(1024, multiple=64) == 512
    assert SpanRule(0, 0.99).span_tokens(1000, multiple=64) == 1000


@pytest.mark.parametrize("alpha", [math.nan, math.inf])
def test_a_rule_must_be_finite(alpha: float) -> None:
    with pytest.raises(ValueError, match="must be finite"):
        SpanRule(alpha, 0.5)


def test_a_layers_own_window_caps_the_span_but_not_the_window(geometry: ModelGeometry) -> None:
    plan = Plan(geometry, ((SpanRule(0.0, 0.5),) * 2,) * 2)
    assert plan.spans(4096).tolist() == [[2048, 2048], [512, 512]]
    # The model applies its own window by itself, on top of the plan's.
    assert plan.windows(4096).tolist() == [[1984, 1984], [1984, 1984]]


def test_a_window_is_the_span_less_the_sink_and_never_below_the_floor() -> None:
    assert uniform_plan(MHA, 0.5).windows(1024).tolist() == [[448, 448]] * 2
    assert uniform_plan(MHA, 0.5).windows(40).tolist() == [[64, 64]] * 2


def test_a_head_that_keeps_everything_keeps_it_beyond_the_length_the_plan_is_applied_at() -> None:
    assert full_or_floor_plan(MHA, [(0, 1)], 192).windows(100).tolist() == [[128, 4096], [128, 128]]


@pytest.mark.parametrize("method", ["spans", "windows", "density", "kv_bytes"])
def test_a_length_below_one_is_refused(method: str) -> None:
    with pytest.raises(ValueError, match="n_tokens must be at least 1, got 0"):
        getattr(dense_plan(MHA), method)(0)


# --- cost


def test_density_is_the_mean_share_of_the_dense_cache() -> None:
    plan = Plan(MHA, ((SpanRule(0, 1.0), SpanRule(0, 0.5)), (SpanRule(256, 0), SpanRule(0, 0.25))))
    assert plan.density(1024) == pytest.approx((1024 + 512 + 256 + 256) / (4 * 1024))


def test_density_is_against_the_dense_model_with_its_own_windows(geometry: ModelGeometry) -> None:
    # Dense keeps 2 x 4096 and 2 x 512; half of 4096 is more than the second layer keeps anyway.
    plan = Plan(geometry, ((SpanRule(0.0, 0.5),) * 2,) * 2)
    assert plan.density(4096) == pytest.approx((2 * 2048 + 2 * 512) / (2 * 4096 + 2 * 512))
    assert dense_plan(geometry).density(4096) == 1.0


@pytest.mark.parametrize("density", [0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("lengths", [(), (2048,), (1024, 2048, 4096), (256, 500), (256, 2048)])
def test_a_uniform_plan_keeps_its_density_on_layers_with_windows(geometry: ModelGeometry, density: float, lengths: tuple[int, ...]) -> None:
    plan = uniform_plan(geometry, density, lengths, sink_tokens=4, min_span=8)
    for length in lengths or (2048, 4096):
        assert plan.density(length) == pytest.approx(density, rel=0.01)
    assert plan.is_dense == (density == 1)


def test_what_the_floor_takes_in_a_window_the_other_layers_give(geometry: ModelGeometry) -> None:
    # A tenth of the window is 51 tokens, the floor 128.
    plan = uniform_plan(geometry, 0.1, [2048, 4096])
    assert plan.spans(4096).tolist() == [[332, 332], [128, 128]]
    assert plan.density(4096) == pytest.approx(0.1, rel=0.01)


@pytest.mark.parametrize("wrong", ["smollm2", None, object(), dense_plan(MHA)], ids=lambda wrong: type(wrong).__name__)
def test_a_plan_of_what_is_no_geometry_is_refused_in_words(wrong: Any) -> None:
    for make in (dense_plan, lambda given: uniform_plan(given, 0.5), lambda given: full_or_floor_plan(given, whole=())):
        with pytest.raises(ValueError, match="a ModelGeometry is needed, got"):
            make(wrong)


def test_a_uniform_plan_without_windows_is_one_rule() -> None:
    assert uniform_plan(GQA, 0.3, [64, 4096]).rules == ((SpanRule(0.0, 0.3),) * GQA.kv_heads,) * GQA.layers


def test_below_the_floor_everything_is_kept() -> None:
    assert uniform_plan(MHA, 0.01).density(100) == 1.0


def test_kv_bytes_are_kept_tokens_times_keys_and_values() -> None:
    plan = uniform_plan(GQA, 0.5)
    assert plan.kv_bytes(1024) == 2 * 512 * (2 * 8 * 2)
    assert plan.kv_bytes(1024, dtype_bytes=4) == 2 * plan.kv_bytes(1024)


@pytest.mark.parametrize("density", [0, -0.5, 1.5, math.nan, math.inf, "half", None])
def test_a_density_outside_0_and_1_is_refused(density: object) -> None:
    with pytest.raises(ValueError, match="density must be a number above 0 and at most 1"):
        uniform_plan(MHA, density)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="goal must be a number"):
        check_density(density, "goal")  # type: ignore[arg-type]


def test_full_or_floor_keeps_the_named_heads_whole() -> None:
    plan = full_or_floor_plan(MHA, [(1, 0)], floor_tokens=192)
    assert plan.spans(2048).tolist() == [[192, 192], [2048, 192]]


def test_only_the_dense_plan_is_dense() -> None:
    assert dense_plan(MHA).is_dense
    assert not uniform_plan(MHA, 0.999).is_dense


# --- what a plan must be


def test_rules_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rules must be 2 layers x 2 KV heads, got 1 layers of \[2\] heads"):
        Plan(MHA, ((DENSE, DENSE),))
    with pytest.raises(ValueError, match=r"got 2 layers of \[1, 2\] heads"):
        Plan(MHA, ((DENSE, DENSE), (DENSE,)))


@pytest.mark.parametrize("change", [{"sink_tokens": -1}, {"min_span": 64}, {"span_multiple": 0}])
def test_impossible_settings_are_refused_by_name(change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        replace(dense_plan(MHA), **change)


def test_identity_follows_what_the_plan_does_and_not_its_name() -> None:
    plan = grown_plan(MHA)
    assert plan.renamed("other", scores={}).identity() == plan.identity()
    assert replace(plan, sink_tokens=32).identity() != plan.identity()
    assert replace(plan, rules=plan.rules[::-1]).identity() != plan.identity()
    assert replace(plan, geometry=replace(MHA, max_length=5000)).identity() != plan.identity()


def test_another_geometry_is_refused_with_both_geometries_in_the_message() -> None:
    with pytest.raises(ValueError, match="another geometry") as caught:
        dense_plan(MHA).check_model(GQA)
    assert str(MHA) in str(caught.value)
    assert str(GQA) in str(caught.value)


def test_other_weights_warn_and_the_profiled_ones_do_not(caplog: pytest.LogCaptureFixture) -> None:
    plan = dense_plan(MHA).renamed("mine", provenance=Provenance(weights="aaaa"))
    plan.check_model(MHA, "aaaa")
    plan.check_model(MHA)
    dense_plan(MHA).check_model(MHA, "bbbb")
    assert not caplog.records
    plan.check_model(MHA, "bbbb")
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "aaaa" in caplog.text
    assert "bbbb" in caplog.text


# --- the config card


def test_config_card_round_trip(tmp_path: Path, geometry: ModelGeometry) -> None:
    plan = replace(grown_plan(geometry), provenance=Provenance(model="tiny", weights="w", seed=1, versions={"torch": "2"}))
    loaded = Plan.load(plan.save(tmp_path / "plan.json"), geometry)
    assert loaded == plan
    assert loaded.identity() == plan.identity()
    np.testing.assert_array_equal(loaded.spans(3000), plan.spans(3000))


def test_the_card_reports_density_and_bytes_at_its_lengths(tmp_path: Path) -> None:
    plan = grown_plan(MHA)
    card = json.loads(plan.save(tmp_path / "plan.json").read_text())
    assert card["density"] == {"512": plan.density(512), "2048": plan.density(2048)}
    assert card["kv_bytes"] == {"512": plan.kv_bytes(512), "2048": plan.kv_bytes(2048)}
    assert card["schema"] == "moa-lab/plan/1"


def test_a_card_with_bits_says_so_and_counts_bytes(tmp_path: Path) -> None:
    plan = grown_plan(MHA)
    stored = plan.with_bits(np.array([[[8, 4], [16, 8]], [[4, 4], [16, 16]]]), "stored")
    card = json.loads(stored.save(tmp_path / "plan.json").read_text())
    assert (card["schema"], card["key_bits"], card["value_bits"]) == ("moa-lab/plan/2", [[8, 16], [4, 16]], [[4, 8], [4, 16]])
    loaded = Plan.load(tmp_path / "plan.json", MHA)
    assert loaded == stored
    assert loaded.identity() == stored.identity() != plan.identity()
    assert card["density"]["2048"] == stored.density(2048) < plan.density(2048)
    assert stored.bits_of(1) == ((4, 4), (16, 16))
    assert stored.with_bits(16, plan.name) == plan, "16 bits are no bits of their own"
    assert not dense_plan(MHA).with_bits(8).is_dense
    with pytest.raises(ValueError, match="no word for bits"):
        stored.to_published()
    for wrong in (5, 8.0, np.full((3, 2, 2), 8)):
        with pytest.raises(ValueError, match=r"bits|broadcast"):
            plan.with_bits(wrong)


def test_loading_onto_another_geometry_is_refused(tmp_path: Path) -> None:
    path = grown_plan(MHA).save(tmp_path / "plan.json")
    with pytest.raises(ValueError, match="another geometry"):
        Plan.load(path, GQA)


def without(name: str) -> dict[str, object]:
    return {key: value for key, value in grown_plan(MHA).card().items() if key != name}


@pytest.mark.parametrize(
    ("card", "message"),
    [
        (without("alphas"), "lacks 'alphas'"),
        (without("geometry"), "lacks 'geometry'"),
        ({**grown_plan(MHA).card(), "alphas": [[0.0]]}, "two equal grids of numbers"),
        ({**grown_plan(MHA).card(), "betas": [["a", 0], [0, 0]]}, "two equal grids of numbers"),
        ({**grown_plan(MHA).card(), "betas": [[math.nan, 0], [0, 0]]}, "must be finite"),
        ({**grown_plan(MHA).card(), "alphas": [[0.0, 0.0]], "betas": [[0.0, 0.0]]}, "2 layers x 2 KV heads"),
        ({**grown_plan(MHA).card(), "min_span": 10}, "must exceed sink_tokens"),
        ({**grown_plan(MHA).card(), "geometry": {"layers": 2}}, "field geometry"),
        ({**grown_plan(MHA).card(), "schema": "moa-lab/plan/99"}, "schema is 'moa-lab/plan/99'"),
        ({**grown_plan(MHA).card(), "schema": "moa-lab/plan/2"}, "lacks 'key_bits'"),
        ({**grown_plan(MHA).with_bits(8).card(), "key_bits": [[8]]}, "for every layer and KV head"),
        ({**grown_plan(MHA).with_bits(8).card(), "key_bits": [[8, 8], [8, 3]]}, "bits must be 4, 8, 16"),
        ({"alphas": [[0]], "betas": [[0]]}, "one of the authors' plans.*from_published"),
        ([], "schema is None"),
    ],
)
def test_broken_and_foreign_cards_are_refused_by_name(tmp_path: Path, card: object, message: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(card))
    with pytest.raises(RecordError, match=message) as caught:
        Plan.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_truncated_card_is_refused(tmp_path: Path) -> None:
    path = grown_plan(MHA).save(tmp_path / "plan.json")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(RecordError, match="truncated"):
        Plan.load(path)


# --- the authors' files


def published(path: Path, alphas: object, betas: object) -> Path:
    path.write_text(json.dumps({"alphas": alphas, "betas": betas}))
    return path


def test_published_plan_of_an_mha_model_is_taken_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = published(tmp_path / "authors.json", [[0, 1024], [-2048, 0]], [[0.5, 0], [1, 0.1]])
    plan = Plan.from_published(path, MHA)
    # Floor 128, rounded up to 64, sink 64 inside the span.
    assert plan.spans(4000).tolist() == [[2048, 1024], [1984, 448]]
    assert plan.windows(4000).tolist() == [[1984, 960], [1920, 384]]
    assert (plan.name, plan.sink_tokens, plan.min_span) == ("authors", 64, 128)
    assert not caplog.records


def test_published_plan_of_a_gqa_model_is_pooled_by_max_and_says_what_that_costs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = published(tmp_path / "gqa.json", [[0, 512, 0, 0]], [[0.25, 0, 0.5, 1.0]])
    plan = Plan.from_published(path, GQA)
    assert plan.rules == ((SpanRule(0, 0.25), SpanRule(0, 1.0)),)
    assert plan.spans(4096).tolist() == [[1024, 4096]]
    # Kept: (1024 + 4096) / 2 of 4096; the file's heads average (1024 + 512 + 2048 + 4096) / 4.
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "density at 4096 is 62.5% (the file's own heads average 46.9%)" in caplog.text


def test_published_plan_with_one_entry_per_kv_head_needs_no_pooling(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plan = Plan.from_published(published(tmp_path / "kv.json", [[0, 0]], [[0.25, 0.5]]), GQA)
    assert plan.rules == ((SpanRule(0, 0.25), SpanRule(0, 0.5)),)
    assert not caplog.records


def test_published_round_trip(tmp_path: Path) -> None:
    first = Plan.from_published(published(tmp_path / "a.json", [[0, 1024], [-2048, 0]], [[0.5, 0], [1, 0.1]]), MHA)
    (tmp_path / "b.json").write_text(json.dumps(first.to_published()))
    again = Plan.from_published(tmp_path / "b.json", MHA)
    assert again.rules == first.rules
    assert again.identity() == first.identity()


def test_published_export_repeats_a_kv_heads_rule_for_its_query_heads() -> None:
    assert grown_plan(GQA).to_published()["betas"] == [[1 / 7, 1 / 7, 2 / 7, 2 / 7]]


def test_published_export_refuses_what_the_format_cannot_say() -> None:
    with pytest.raises(ValueError, match="means sink 64 and floor 128, this plan has 4 and 128"):
        replace(dense_plan(MHA), sink_tokens=4).to_published()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"alphas": [[0, 0]], "betas": [[0, 0]]}, r"plan has 1 layers of \[2\] heads; model has 2 layers"),
        ({"alphas": [[0] * 3] * 2, "betas": [[0] * 3] * 2}, r"2 layers of \[3\] heads"),
        ({"alphas": [[0, 0], [0]], "betas": [[0, 0], [0]]}, r"2 layers of \[1, 2\] heads"),
        ({"alphas": [[0, 0], [0, 0]], "betas": [[0, 0]]}, "two equal grids of numbers"),
        ({"alphas": [[0, None], [0, 0]], "betas": [[0, 0], [0, 0]]}, "two equal grids of numbers"),
        ({"alphas": 3, "betas": 4}, "two equal grids of numbers"),
        ({"alphas": [[0, 0], [0, 0]]}, "not a published plan"),
        ([1], "not a published plan"),
    ],
)
def test_published_files_of_another_shape_are_refused(tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "authors.json"
    path.write_text(json.dumps(content))
    with pytest.raises(RecordError, match=message):
        Plan.from_published(path, MHA)


def test_published_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "cut.json").write_text('{"alphas": [[')
    for path in (tmp_path / "cut.json", tmp_path / "none.json", tmp_path):
        with pytest.raises(RecordError, match="not a published plan"):
            Plan.from_published(path, MHA)


def test_a_path_is_as_good_as_the_plan_whose_card_is_there(tmp_path: Path) -> None:
    plan = grown_plan(GQA)
    path = plan.save(tmp_path / "plan.json")
    assert as_plan(plan) is plan
    assert as_plan(path) == as_plan(str(path)) == plan
    (tmp_path / "other.json").write_text(json.dumps(plan.to_published()))
    with pytest.raises(RecordError, match=r"one of the authors' plans.*Plan\.from_published"):
        as_plan(tmp_path / "other.json")
    for wrong in (None, 0.5, [plan]):
        with pytest.raises(ValueError, match="must be a Plan or the path"):
            as_plan(wrong)


def test_plans_of_one_name_are_told_apart_by_what_they_keep() -> None:
    half, quarter, dense = (uniform_plan(MHA, share, lengths=(2048,)).renamed("moa") for share in (0.5, 0.25, 1.0))
    assert [plan.name for plan in named_apart([half, quarter, dense.renamed("all")])] == ["moa-50%", "moa-25%", "all"]
    assert named_apart([half]) == [half]
    with pytest.raises(ValueError, match="names of their own"):
        named_apart([half, half])
