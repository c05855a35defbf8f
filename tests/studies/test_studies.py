from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import exit_code

from moa_lab.evaluate.intervals import Interval
from moa_lab.evaluate.suites import Suites
from moa_lab.pipeline import Run
from moa_lab.presets import PRESETS
from moa_lab.records import Measurement
from moa_lab.storage import RecordError
from moa_lab.studies import StudyGoal, StudyRecord, table
from moa_lab.studies.densities.costs import retrieval_goals
from moa_lab.text import interval_text
from tests.studies.sketch import Sketch


def test_a_study_measures_dense_uniform_and_chosen_plans_at_equal_bytes(records: dict[str, StudyRecord]) -> None:
    for record in (records["retrieval"], records["quality"]):
        plans = {row.plan for row in record.rows if not row.plan.startswith(("snapkv", "h2o"))}
        assert plans == {"dense", "uniform-50", "moa-50", "uniform-75", "moa-75"}
        for density in (50, 75):
            for moa in record.select(plan=f"moa-{density}"):
                assert moa.density <= density / 100 + 1e-9
                if moa.metric in ("kl", "token_match"):
                    continue
                (uniform,) = record.select(plan=f"uniform-{density}", task=moa.task, length=moa.length, metric=moa.metric)
                # Whole tokens a head, rounded down: never more bytes than the plan has.
                assert moa.density - 1 / moa.length < uniform.density <= moa.density


def test_evictions_that_see_the_question_stand_beside_the_plans(records: dict[str, StudyRecord]) -> None:
    rows = [row for row in records["retrieval"].rows if row.plan.startswith(("snapkv", "h2o"))]
    assert {row.plan for row in rows} == {f"{name}-{density}" for name in ("snapkv", "h2o") for density in (50, 75)}
    assert all(abs(row.density - float(row.plan.split("-")[1]) / 100) < 0.02 for row in rows)
    assert "against eviction that reads the question" in records["retrieval"].answer


def test_quality_counts_the_tokens_that_dense_and_plan_agree_on(records: dict[str, StudyRecord]) -> None:
    for metric, low, high in (("kl", 0, 100), ("token_match", 0, 1)):
        rows = records["quality"].select(metric=metric)
        assert {row.plan for row in rows} == {"uniform-50", "moa-50", "uniform-75", "moa-75"}
        assert all(low <= row.value <= high for row in rows)
    assert "the same next token is likeliest" in records["quality"].answer


def test_a_record_says_which_candidate_validation_chose(records: dict[str, StudyRecord]) -> None:
    for name in ("retrieval", "quality", "speed"):
        chosen = records[name].settings["chosen"]
        assert set(chosen) == {row.plan for row in records[name].rows if row.plan.startswith("moa-")}
    assert set(records["refine"].settings["chosen"]) >= {"search-50", "learned-50", "refined-50"}
    assert records["refine"].settings["chosen"]["learned-50"].startswith("learned")


def test_a_density_below_the_floor_is_left_out_and_says_why(records: dict[str, StudyRecord]) -> None:
    assert "moa-10" in records["retrieval"].settings["left_out"]
    assert "densit" in records["retrieval"].settings["left_out"]["moa-10"]


def test_studies_share_what_was_made_on_the_way(
    sketch: Sketch, records: dict[str, StudyRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise AssertionError("scored again")

    monkeypatch.setattr("moa_lab.evaluate.scoring.score_answers", fails)
    monkeypatch.setattr("moa_lab.pipeline.calibrate", fails)
    monkeypatch.setattr("moa_lab.pipeline.profile", fails)
    monkeypatch.setattr("moa_lab.pipeline.learn_spans", fails)
    assert exit_code(monkeypatch, *sketch.line("retrieval", tmp_path / "again.json")) == 0
    again = StudyRecord.load(tmp_path / "again.json")
    assert again.rows == records["retrieval"].rows
    assert again.answer == records["retrieval"].answer


def test_one_sample_decides_nothing() -> None:
    assert StudyGoal.of("found", Interval(1.0, 1, 1.0, 1.0), 0.95).meets
    assert not StudyGoal.of("found", Interval(1.0, 1, 1.0, 1.0), 0.95).decided
    assert not StudyGoal("lower end", 0.0, 0.0, at_most=True, n=1).decided
    assert StudyGoal.of("found", Interval(1.0, 128, 1.0, 1.0), 0.95).decided


def test_a_goal_is_met_by_its_numbers_and_not_by_what_a_file_says(records: dict[str, StudyRecord], tmp_path: Path) -> None:
    assert StudyGoal("more", 0.95, 0.95).meets
    assert not StudyGoal("more", 0.94, 0.95).meets
    assert StudyGoal("less", 0.02, 0.02, at_most=True).meets
    assert not StudyGoal("less", 0.03, 0.02, at_most=True).meets
    path = records["quality"].save(tmp_path / "quality.json")
    data = json.loads(path.read_text())
    data["goals"] = [{"name": "less", "value": 1.0, "goal": 0.5, "at_most": True, "meets": True}]
    path.write_text(json.dumps(data))
    assert not StudyRecord.load(path).goals[0].meets


def test_the_table_shows_every_plan_goal_and_the_answer(records: dict[str, StudyRecord]) -> None:
    for record in records.values():
        text = table(record)
        assert record.question in text
        assert record.answer in text
        assert all(row.plan in text for row in record.rows)
        assert all(f"{row.value:.3f} {interval_text(row.low, row.high, '.2f')}" in text for row in record.rows)
        assert all(goal.name in text for goal in record.goals)
    assert all(records[name].goals for name in ("retrieval", "quality", "search", "refine"))


def test_a_plan_held_against_two_others_has_two_lines_in_the_table() -> None:
    rows = [
        Measurement("capped", "nats_saved", "documents", 512, value, 4, value, value, 0.5, {"against": name})
        for value, name in ((0.125, "linear"), (0.25, "uniform"))
    ]
    lines = table(StudyRecord("rules", "Which?", "Both.", tuple(rows), ())).splitlines()
    assert [line.split("  ")[0] for line in lines if "0.125" in line] == ["capped against linear"]
    assert [line.split("  ")[0] for line in lines if "0.250" in line] == ["capped against uniform"]


def test_an_unknown_study_and_a_foreign_file_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(monkeypatch, "study", "nothing", "--out", tmp_path / "a.json") == 2
    assert "retrieval, quality" in capsys.readouterr().err
    (tmp_path / "b.json").write_text("{}")
    with pytest.raises(RecordError):
        StudyRecord.load(tmp_path / "b.json")


def test_a_run_at_another_density_keeps_its_own_settings(run: Run) -> None:
    other = run.at(0.75)
    assert other.settings.density == 0.75
    assert run.settings.density == 0.5
    assert (other.folder / "profile.safetensors").read_bytes() == (run.folder / "profile.safetensors").read_bytes()
    assert other.plan().density(512) <= 0.75


def test_another_test_seed_draws_other_tests_and_nothing_else(run: Run) -> None:
    other = replace(run.suites, seeds={**run.suites.seeds, "test": 1}, _tested={})
    length = max(run.test_lengths)

    def drawn(suites: Suites) -> list[list[str]]:
        return [[sample.identity for sample in found] for found in suites.test(length)]

    tasks = [found[0].task for found in run.suites.test(length)]
    assert {"needles", "lines", "documents", "summaries"} == set(tasks)
    assert all(set(before).isdisjoint(after) for before, after in zip(drawn(run.suites), drawn(other), strict=True))
    assert drawn(replace(run.suites, _tested={})) == drawn(run.suites)
    assert [one.identity for one in other.validation] == [one.identity for one in run.suites.validation]


def test_how_far_a_plan_reaches_is_sure_only_where_whole_intervals_are() -> None:
    def row(length: int, low: float, value: float, high: float) -> Measurement:
        return Measurement("moa-25", "retrieval", "needles", length, value, 40, low, high, 0.25)

    rows = [row(1024, 0.92, 0.95, 0.98), row(2048, 0.85, 0.92, 0.95), row(4096, 0.8, 0.85, 0.91)]
    rows = [replace(one, density=share) for one, share in zip(rows, (0.5, 0.25, 0.2), strict=True)]
    (goal,) = retrieval_goals(rows, {"moa-25": (2048, 4.0)})
    assert (goal.low, goal.value, goal.high) == (2.0, 4.0, 5.0)
    assert goal.meets
    assert not goal.decided


def test_a_preset_that_learns_nothing_has_no_learned_plan_and_no_lessons_of_its_own(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    learned = run.at(0.5).learned()
    # Each descent's own plan, and some with floors that grow.
    names = [point.plan.name for point in learned]
    assert {"learned", "learned-words"} <= set(names)
    assert all(name.startswith("learned") for name in names)
    assert learned.settings["learned"]["weights"] == {"questions": 3.0}
    monkeypatch.setitem(PRESETS, "sketch", replace(PRESETS["sketch"], learning_steps=0))
    assert not len(run.at(0.5).learned())
    assert run.lessons().identity == run.samples().identity
