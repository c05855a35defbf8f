"""Every study end to end, through the command that a user types."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from command_line import exit_code

from moa_lab import run_inputs
from moa_lab.commands import study as study_command
from moa_lab.figures.measurements import metric_label
from moa_lab.studies import MODULES, StudyRecord, table
from tests.studies.sketch import Sketch


def test_the_help_names_every_study() -> None:
    # Named there a second time, so that a help text costs no import of torch.
    assert tuple(MODULES) == tuple(study_command.NAMES.split(", "))


@pytest.mark.parametrize("name", MODULES)
def test_every_study_leaves_a_record_with_rows_an_answer_and_its_origin(name: str, sketch: Sketch, records: dict[str, StudyRecord]) -> None:
    record = records[name]
    assert record.name == name
    assert record.rows
    assert record.question.endswith("?")
    assert record.answer.endswith(".")
    assert record.answer in table(record)
    assert all(row.plan in table(record) for row in record.rows)
    assert record.settings["run"]["preset"] == "sketch"
    # Figures name the unit of every metric.
    assert all(metric_label(row.metric)[1] != "score" for row in record.rows)
    origin = record.provenance
    assert (origin.model, origin.seed) == (sketch.run.settings.model, 0)
    assert origin.command.startswith("moa-lab study all ")
    assert all((origin.weights, origin.tokenizer, origin.calibration, origin.device, origin.versions, origin.created))


@pytest.mark.parametrize("name", MODULES)
def test_no_number_is_lost_and_no_sentence_is_broken(name: str, records: dict[str, StudyRecord]) -> None:
    record = records[name]
    for row in record.rows:
        assert all(map(math.isfinite, (row.value, row.density))), row
        # One observation has no interval.
        assert all(map(math.isfinite, (row.low, row.high))) or (row.n, row.low, row.high) == (1, -math.inf, math.inf), row
        # An interval's end at the value itself may be off by a rounding.
        assert row.low - 1e-9 <= row.value <= row.high + 1e-9, row
        assert row.n > 0
    for sentence in (record.answer, record.question):
        assert not re.search(r"\b(nan|inf|None)\b|  | [.,;:]|[;,]\.|\(\)|[{}]", sentence), sentence


def test_the_same_command_again_runs_nothing(
    sketch: Sketch, records: dict[str, StudyRecord], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    before = {path: path.read_bytes() for path in sketch.records.iterdir()}
    assert set(before) == {sketch.records / f"{name}.json" for name in records}
    monkeypatch.setattr(run_inputs, "load_model", fails)
    assert exit_code(monkeypatch, *sketch.line("all", sketch.records)) == 0
    assert f"all {len(MODULES)} records are in {sketch.records}" in capsys.readouterr().out
    assert before == {path: path.read_bytes() for path in sketch.records.iterdir()}


def test_a_missing_record_alone_is_made_again_and_a_study_that_fails_is_named_and_costs_no_other(
    sketch: Sketch, records: dict[str, StudyRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def breaks(*_: object) -> StudyRecord:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("moa_lab.studies.searching.space.space", breaks)
    records["speed"].save(tmp_path / "speed.json")
    assert exit_code(monkeypatch, *sketch.line("space,rules,speed", tmp_path)) == 2
    shown = capsys.readouterr()
    assert "without a record: space (out of memory)" in shown.err
    assert {path.name for path in tmp_path.iterdir()} == {"rules.json", "speed.json"}
    assert records["rules"].question in shown.out
    assert records["speed"].question not in shown.out


def test_another_model_in_the_folder_of_a_run_is_refused_also_where_all_records_exist(
    sketch: Sketch, records: dict[str, StudyRecord], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = sketch.line("all", sketch.records)
    line[line.index("--model") + 1] = "smollm2"
    assert exit_code(monkeypatch, *line) == 2
    assert "holds a run with another model" in capsys.readouterr().err


def test_show_prints_the_table_of_a_study(
    sketch: Sketch, records: dict[str, StudyRecord], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = sketch.records / "quality.json"
    assert exit_code(monkeypatch, "show", path) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("study 'quality'\n")
    assert table(records["quality"]) in shown
    assert f"made {json.loads(path.read_text())['provenance']['created']} on " in shown
    assert "by: moa-lab study all" in shown
