"""Records come back as they were saved; a broken one, or one of another kind, is refused by the name of the file."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest

from moa_lab.geometry import ModelGeometry
from moa_lab.plan import Plan, SpanRule, uniform_plan
from moa_lab.provenance import Provenance
from moa_lab.records import Front, FrontPoint, InfluenceProfile, LossTable, Measurement, Measurements, Objective
from moa_lab.storage import RecordError, read_tensors, write_json, write_tensors

GEOMETRY = ModelGeometry(layers=2, query_heads=4, kv_heads=2, head_dim=8, max_length=4096, layer_windows=(None, 512))
ORIGIN = Provenance(model="tiny", weights="w", tokenizer="t", calibration="c", seed=3, versions={"torch": "2"}, command="x", created="now")


class Record(Protocol):
    def save(self, path: str | Path) -> Path: ...


def make_profile() -> InfluenceProfile:
    random = np.random.default_rng(0)
    keys = [("questions", 128), ("questions", 256), ("a/b", 256)]
    blocks = {(task, n): random.random((2, 4, n // 64, n // 64), dtype=np.float32) for task, n in keys}
    distances = {(task, n): random.random((3, 2, 4, n // 64), dtype=np.float32) for task, n in keys}
    rounding = {key: random.random((3, 2, 2, 2, 2), dtype=np.float32) for key in keys}
    return InfluenceProfile(GEOMETRY, 64, blocks, distances, ORIGIN, rounding=rounding)


def make_table() -> LossTable:
    objectives = (Objective("questions", 1024, "all_or_nothing", (0, 1)), Objective("summaries", 2048, "worst_distance", (1, 3)))
    rules = (SpanRule(128, 0), SpanRule(0, 0.5), SpanRule(0, 1))
    losses = np.random.default_rng(1).random((3, 2, 2, 3))
    return LossTable(GEOMETRY, rules, 64, 128, objectives, losses, ORIGIN)


def make_front() -> Front:
    points = tuple(
        FrontPoint(uniform_plan(GEOMETRY, density, (1024,)), {"questions@1024/sum": 1 - density}, {"1024": density}, "milp", gap)
        for density, gap in ((0.25, 0.0), (0.5, None))
    )
    return Front(points, ("questions@1024/sum", "density"), {"seed": 1}, ORIGIN)


def make_measurements() -> Measurements:
    row = Measurement("moa", "retrieval", "needle", 2048, 0.75, 64, 0.63, 0.84, 0.5, {"by_depth": {"0.5": 1.0}})
    return Measurements((row, replace(row, plan="dense", value=1.0)), {"seed": 1}, ORIGIN)


def make_plan() -> Plan:
    return uniform_plan(GEOMETRY, 0.5, (1024,))


KINDS: dict[str, tuple[Callable[[], Record], Callable[[Path], Any], str]] = {
    "plan": (make_plan, Plan.load, "json"),
    "profile": (make_profile, InfluenceProfile.load, "safetensors"),
    "table": (make_table, LossTable.load, "safetensors"),
    "front": (make_front, Front.load, "json"),
    "measurements": (make_measurements, Measurements.load, "json"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep", [0.0, 0.3, 0.98])
def test_a_truncated_record_is_refused_by_name(tmp_path: Path, kind: str, keep: float) -> None:
    make, load, suffix = KINDS[kind]
    path = make().save(tmp_path / f"record.{suffix}")
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(RecordError, match="truncated") as caught:
        load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(("kind", "other"), list(itertools.permutations(KINDS, 2)))
def test_a_record_of_another_kind_is_refused_by_name(tmp_path: Path, kind: str, other: str) -> None:
    make, _, suffix = KINDS[other]
    path = make().save(tmp_path / f"record.{suffix}")
    with pytest.raises(RecordError) as caught:
        KINDS[kind][1](path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_record_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    with pytest.raises(RecordError, match=r"none.*no such file"):
        KINDS[kind][1](tmp_path / "none")


@pytest.mark.parametrize("kind", ["plan", "front", "measurements"])
def test_a_json_record_survives_saving_and_loading(tmp_path: Path, kind: str) -> None:
    make, load, suffix = KINDS[kind]
    record = make()
    assert load(record.save(tmp_path / f"record.{suffix}")) == record


def test_a_profile_survives_saving_and_loading(tmp_path: Path) -> None:
    profile = make_profile()
    loaded = InfluenceProfile.load(profile.save(tmp_path / "profile.safetensors"))
    assert (loaded.geometry, loaded.sink_tokens, loaded.provenance) == (GEOMETRY, 64, ORIGIN)
    assert loaded.keys == (("a/b", 256), ("questions", 128), ("questions", 256))
    for key in profile.keys:
        np.testing.assert_array_equal(loaded.blocks[key], profile.blocks[key])
        np.testing.assert_array_equal(loaded.distances[key], profile.distances[key])


def test_a_profile_lists_its_lengths_and_tasks_and_averages_samples() -> None:
    profile = make_profile()
    assert profile.lengths == (128, 256)
    assert profile.tasks == ("a/b", "questions")
    expected = profile.distances["questions", 128].astype(np.float64).mean(0)
    np.testing.assert_allclose(profile.distance("questions", 128), expected)


@pytest.mark.parametrize("name", ["blocks/questions/long", "weights/questions/128", "blocks", "distances/other/128"])
def test_a_profile_with_tensors_that_do_not_belong_is_refused(tmp_path: Path, name: str) -> None:
    path = make_profile().save(tmp_path / "profile.safetensors")
    tensors, description = read_tensors(path, "moa-lab/profile/1")
    write_tensors(path, {**tensors, name: np.zeros(1)}, description)
    with pytest.raises(RecordError, match=r"profile\.safetensors"):
        InfluenceProfile.load(path)


def test_a_loss_table_survives_saving_and_loading(tmp_path: Path) -> None:
    table = make_table()
    loaded = LossTable.load(table.save(tmp_path / "table.safetensors"))
    np.testing.assert_array_equal(loaded.losses, table.losses)
    assert replace(loaded, losses=table.losses) == table


def test_a_loss_table_whose_losses_do_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"losses must be .* = \(3, 2, 2, 3\), got \(3, 2, 2, 2\)"):
        replace(make_table(), losses=make_table().losses[..., :2])
    path = make_table().save(tmp_path / "table.safetensors")
    tensors, description = read_tensors(path, "moa-lab/loss-table/1")
    write_tensors(path, {"losses": tensors["losses"][:2]}, description)
    with pytest.raises(RecordError, match=r"table\.safetensors: losses must be"):
        LossTable.load(path)
    write_tensors(path, {"other": tensors["losses"]}, description)
    with pytest.raises(RecordError, match="without losses"):
        LossTable.load(path)


def test_a_table_and_its_plan_agree_on_spans_and_density() -> None:
    table = make_table()
    choice = np.array([[0, 2], [1, 1]])
    plan = table.plan(choice, "chosen")
    assert plan.provenance == ORIGIN
    for n_tokens in (100, 1024, 3000):
        spans = table.span_tokens(n_tokens)
        assert plan.spans(n_tokens).tolist() == [[int(spans[layer, pick]) for pick in choice[layer]] for layer in range(2)]
        assert table.density(choice, n_tokens) == pytest.approx(plan.density(n_tokens))
    np.testing.assert_array_equal(table.choice(plan), choice)


def test_a_plan_with_a_rule_outside_the_table_is_refused() -> None:
    with pytest.raises(ValueError, match="not among the table's 3 rules"):
        make_table().choice(uniform_plan(GEOMETRY, 0.123))


def test_the_prediction_sums_heads_and_takes_the_worst_row_of_an_objective() -> None:
    table = make_table()
    choice = np.array([[0, 2], [1, 1]])
    rows = [sum(table.losses[row, layer, head, choice[layer, head]] for layer in range(2) for head in range(2)) for row in range(3)]
    predicted = table.predict(choice)
    assert predicted == pytest.approx({"questions@1024/all_or_nothing": rows[0], "summaries@2048/worst_distance": max(rows[1:])})


@pytest.mark.parametrize(
    ("kind", "broken"),
    [
        ("front", {"schema": "moa-lab/front/1", "points": []}),
        ("front", {"schema": "moa-lab/front/1", "points": [{"origin": "x"}], "objectives": [], "settings": {}, "provenance": {}}),
        ("front", {"schema": "moa-lab/front/1", "points": 3, "objectives": [], "settings": {}, "provenance": {}}),
        ("front", {"schema": "moa-lab/front/1", "points": [{"plan": []}], "objectives": [], "settings": {}, "provenance": {}}),
        ("measurements", {"schema": "moa-lab/measurements/1"}),
        ("measurements", {"schema": "moa-lab/measurements/1", "rows": [{"plan": "x"}]}),
    ],
)
def test_a_record_with_fields_missing_is_refused_by_name(tmp_path: Path, kind: str, broken: dict[str, Any]) -> None:
    path = write_json(tmp_path / "record.json", broken)
    with pytest.raises(RecordError, match=r"record\.json"):
        KINDS[kind][1](path)


def test_measurements_are_selected_by_field_and_grow_without_changing() -> None:
    table = make_measurements()
    assert [row.value for row in table.select(plan="moa", length=2048)] == [0.75]
    assert table.select(plan="moa", length=1024) == ()
    more = table.plus([replace(table.rows[0], length=4096)])
    assert (len(list(more)), len(table.rows)) == (3, 2)
    assert more.provenance == table.provenance
