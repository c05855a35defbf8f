"""Files that people edit, or get from others: read where harmless, else refused in one line with the place and the cure."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import exit_code
from figure_records import make_validation
from test_records import GEOMETRY, make_front, make_measurements, make_profile, make_table

from moa_lab.bench.record import GOALS, BenchRecord, judged
from moa_lab.calibration.samples import Sample, SampleSet
from moa_lab.commands.show import describe, kind_of
from moa_lab.evaluate.parity import Parity, ParityRow
from moa_lab.plan import Plan, uniform_plan
from moa_lab.presets import SETTINGS_SCHEMA, RunSettings
from moa_lab.provenance import Provenance
from moa_lab.run_inputs import RunInputs
from moa_lab.storage import RecordError, read_tensors, to_json, write_tensors
from moa_lab.studies.record import StudyGoal, StudyRecord

SCORE = {"value": 0.5, "low": 0.25, "high": 0.75, "n": 16}
PLAN = uniform_plan(GEOMETRY, 0.5, (512, 1024)).renamed(
    "mine", scores={"retrieval": SCORE}, search={"origin": "milp"}, provenance=Provenance(model="tiny", seed=1, versions={"torch": "2"})
)
# Written as text: 1e999 and NaN are read by Python's json, and no record may hold them.
NASTY = [
    *("null", "true", "0", "-1", "3", "0.5", "-0.5", "8.0", "1e20", "1e999", "NaN", "-Infinity", "1" + "0" * 30, "1" + "0" * 5000),
    *('"8"', '""', '"a\\nb"', '"\\ud800"', "[]", "[1]", "[[1]]", "{}", '{"a": 1}', "[" * 70 + "]" * 70, '{"x": 1, "x": 2}'),
]
PROJECT = Path(__file__).resolve().parents[1]
MARK = "the edited value"


def edited(data: Any) -> Iterator[tuple[str, str]]:
    """Texts of `data` with one value after the other replaced by every nasty one, and the place of each."""
    for place in places(data):
        changed = copy.deepcopy(data)
        inner = changed
        for step in place[:-1]:
            inner = inner[step]
        inner[place[-1]] = MARK
        text = json.dumps(changed)
        for value in NASTY:
            yield f"{place} = {value[:30]}", text.replace(json.dumps(MARK), value)


def places(data: Any) -> Iterator[tuple[Any, ...]]:
    for key, inner in data.items() if isinstance(data, dict) else enumerate(data):
        yield (key,)
        if isinstance(inner, dict | list):
            yield from ((key, *place) for place in places(inner))


def complaint(read: Callable[[], object]) -> ValueError | None:
    """What `read` refuses a file with; None where it reads it. Any other error is one."""
    try:
        read()
    except ValueError as error:
        return error
    return None


def is_told(error: Exception, path: Path) -> bool:
    message = str(error)
    return isinstance(error, RecordError) and str(path) in message and "\n" not in message and len(message) < 1000


def check_plan(plan: Plan) -> None:
    for n in (1, 200, 4096, *plan.lengths):
        spans, windows = plan.spans(n), plan.windows(n)
        assert spans.dtype == windows.dtype == np.int64
        assert 0 < spans.min() <= spans.max() <= n
        assert windows.min() > 0
        assert 0 < plan.density(n) <= 1
        assert plan.kv_bytes(n) > 0
    json.dumps(plan.card(), allow_nan=False)


def test_a_card_with_any_value_edited_is_right_or_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    read = 0
    for what, text in edited(PLAN.card()):
        path.write_text(text)
        error = complaint(lambda: Plan.load(path))
        if error is None:
            read += 1
            check_plan(Plan.load(path))
            assert describe(path, kind_of(path)), what
        else:
            assert is_told(error, path), what
            assert complaint(lambda: describe(path, kind_of(path))), what
    assert read > 20


def records() -> dict[str, Any]:
    front = make_front()
    shape = {"model": "tiny", "batch": 3, "n_tokens": 96, "plan": "half", "density": 0.5, "skew": 2.0}
    ran = {"relative_error": 0.1, "peers": {"one": {"rate": 2.0}}}
    bench = BenchRecord((judged("C1", GOALS["C1"], shape, 5.0, 10.0, "limit", "s", True, ran),), {"ceilings": {"copy": 2.0}})
    parity = Parity((ParityRow("one prompt", "96 tokens", 96, 1e-5, 1.0, 90, 1e-3, True),), {"left_out": ["beams"]})
    rows = replace(make_measurements().rows[0], detail={"against": "dense"})
    study = StudyRecord("space", "Which?", "None.", (rows,), (StudyGoal("loss", 0.5, 0.4, True, 0.3, 0.6, 16),))
    return {
        "front": replace(front, points=front.points[:1]),
        "measurements": make_measurements(),
        "validation": make_validation({"uniform": ("uniform", 1.0, 0.5, 0.5), "refined-1": ("refined", 0.5, 0.25, 0.0)}),
        "bench": bench,
        "parity": parity,
        "study": study,
    }


@pytest.mark.parametrize("kind", records())
def test_a_record_with_any_value_edited_is_shown_or_refused_by_name(kind: str, tmp_path: Path) -> None:
    path = records()[kind].save(tmp_path / f"{kind}.json")
    shown = 0
    for what, text in edited(json.loads(path.read_text())):
        path.write_text(text)
        error = complaint(lambda: describe(path, kind_of(path)))
        assert error is None or is_told(error, path), what
        shown += error is None
    assert shown > 20


@pytest.mark.parametrize("kind", ["samples", "profile", "table"])
def test_tensors_with_an_edited_description_are_shown_or_refused_by_name(kind: str, tmp_path: Path) -> None:
    sample = Sample("questions", np.arange(40), ((3, 5),), {"right": [True]})
    record = {"samples": SampleSet((sample,)), "profile": make_profile(), "table": make_table()}[kind]
    path = record.save(tmp_path / f"{kind}.safetensors")
    tensors, description = read_tensors(path, json.loads(json.dumps(kind_of(path))))
    for what, text in edited(description):
        try:
            changed = json.loads(text)
            write_tensors(path, tensors, changed)
        except ValueError:  # NaN: no record that is written holds it
            continue
        error = complaint(lambda: describe(path, kind_of(path)))
        assert error is None or is_told(error, path), what


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lengths": [10**30]}, "lengths must be at most"),
        ({"lengths": [0]}, "lengths must be at least 1"),
        ({"lengths": "1024"}, "field lengths: .*valid"),
        ({"lengths": [1024.5]}, r"field lengths\.0"),
        ({"alphas": [[1e20, 0], [0, 0]]}, "layer 0, head 0: alpha and beta must lie within"),
        ({"alphas": [[True, 0], [0, 0]]}, "two equal grids of numbers"),
        ({"alphas": ["12", "34"]}, "two equal grids of numbers"),
        ({"sink_tokens": True}, "field sink_tokens"),
        ({"sink_tokens": 10**6}, "must exceed sink_tokens"),
        ({"min_span": 128.0}, "field min_span"),
        ({"name": ""}, "name must be a line of text"),
        ({"scores": [1]}, "field scores"),
        ({"legnths": [1024]}, "field legnths: no such field here"),
        ({"geometry": {**to_json(GEOMETRY), "layer_windows": [None, 0]}}, r"layer_windows\[1\].* must be at least 1, got 0"),
        ({"geometry": {**to_json(GEOMETRY), "layer_windows": [-5, 512]}}, r"layer_windows\[0\]"),
        ({"geometry": {**to_json(GEOMETRY), "layer_window": [None, 512]}}, r"field geometry\.layer_window: no such field"),
        ({"geometry": {**to_json(GEOMETRY), "layers": 10**12, "layer_windows": []}}, "layers must be at most"),
        ({"geometry": {**to_json(GEOMETRY), "query_heads": 3}}, "must be a multiple of kv_heads"),
        ({"geometry": {**to_json(GEOMETRY), "kv_heads": "2"}}, r"field geometry\.kv_heads: .*'?2'?"),
        ({"provenance": {"seed": 1.5}}, r"field provenance\.seed"),
    ],
)
def test_the_field_of_a_card_that_cannot_be_is_named(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    path.write_text(json.dumps({**PLAN.card(), **changed}))
    with pytest.raises(RecordError, match=message) as caught:
        Plan.load(path)
    assert is_told(caught.value, path)


def test_a_score_that_is_a_number_alone_is_shown_as_it_is(tmp_path: Path) -> None:
    path = PLAN.renamed("mine", scores={"retrieval": 0.9, "needles": SCORE}).save(tmp_path / "card.json")
    shown = describe(path, kind_of(path))
    assert "retrieval: 0.9 (as the card has it, without interval or n)" in shown
    assert "needles: 0.500 [0.250, 0.750] (n = 16)" in shown


@pytest.mark.parametrize("levels", [65, 900, 100_000])
def test_a_card_that_nests_too_deeply_is_refused_however_deep(levels: int, tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    path.write_text(json.dumps({**PLAN.card(), "search": MARK}).replace(json.dumps(MARK), "[" * levels + "]" * levels))
    with pytest.raises(RecordError, match="nests deeper than 64 levels"):
        Plan.load(path)
    with pytest.raises(RecordError, match="nests deeper than 64 levels"):
        kind_of(path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_card_is_read_in_every_encoding_that_editors_leave(encoding: str, newline: str, tmp_path: Path) -> None:
    plan = PLAN.renamed("März")
    text = json.dumps(plan.card(), indent=1, ensure_ascii=False).replace("\n", newline)
    path, authors = tmp_path / "card.json", tmp_path / "authors.json"
    path.write_bytes(text.encode(encoding))
    assert Plan.load(path) == plan
    assert kind_of(path) == "moa-lab/plan/1"
    authors.write_bytes(json.dumps({"alphas": [[0.0, 0.0]] * 2, "betas": [[0.5, 1.0]] * 2}).encode(encoding))
    assert Plan.from_published(authors, GEOMETRY).rules[0][1].keeps_everything


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda text: text.replace('"sink_tokens": 64,', '"sink_tokens": 64,,'), "line 15 column 20: a comma too many"),
        (lambda text: text[:-3] + ",\n}\n", "a comma too many"),
        (lambda text: text.replace('"sink_tokens"', "// mine\n  'sink_tokens'"), "line 15 column 2: JSON has no comments"),
        (lambda text: text.replace('"sink_tokens"', "'sink_tokens'"), "line 15 column 2: names and texts stand between double quotes"),
        (lambda text: text.replace('"sink_tokens": 64,', '"sink_tokens": 64'), r"line 16 column 2: expecting ',' delimiter"),
        (lambda text: text.replace('"sink_tokens": 64,', '"sink_tokens": 64,\n"sink_tokens": 4,'), "field sink_tokens: stands twice"),
        (lambda text: text.replace('"sink_tokens": 64,', '"sink_tokens": NaN,'), "field sink_tokens: numbers must be finite"),
    ],
)
def test_a_misspelt_card_is_to_be_mended_and_not_to_be_deleted(edit: Any, message: str, tmp_path: Path) -> None:
    path = PLAN.save(tmp_path / "card.json")
    path.write_text(edit(path.read_text()))
    for read in (Plan.load, kind_of):
        with pytest.raises(RecordError, match=message) as caught:
            read(path)
        assert "delete" not in str(caught.value)


def test_only_what_a_stage_wrote_and_a_kill_cut_is_to_be_deleted(tmp_path: Path) -> None:
    path = PLAN.save(tmp_path / "card.json")
    path.write_text(path.read_text()[:200])
    with pytest.raises(RecordError, match=r"truncated.*the file ends at line.*take a whole copy"):
        Plan.load(path)
    folder = tmp_path / "run"
    (folder / "settings.json").parent.mkdir()
    (folder / "settings.json").write_text('{"schema": ')
    with pytest.raises(RecordError, match=r"settings\.json: truncated.*choose another folder"):
        RunInputs(folder, RunSettings())
    front = make_front().save(tmp_path / "front.json")
    front.write_text(front.read_text()[:200])
    with pytest.raises(RecordError, match=r"truncated.*delete it and run its stage again"):
        type(make_front()).load(front)


def test_settings_of_a_run_with_any_value_edited_are_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    for what, text in edited({"schema": SETTINGS_SCHEMA, **to_json(RunSettings(lengths=(512,)))}):
        path.write_text(text)
        error = complaint(lambda: RunInputs(tmp_path, RunSettings(lengths=(512,))))
        assert error is None or is_told(error, path) or "holds a run with another" in str(error), what


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("distances/questions/128", np.zeros((3, 2, 4, 9), np.float32), r"distances of questions@128 must be \(3, 2, 4, 2\)"),
        ("blocks/questions/128", np.zeros((2, 3, 2, 2), np.float32), r"blocks of questions@128 must be \(2, 4, 2, 2\)"),
        ("blocks/questions/128", np.full((2, 4, 2, 2), math.nan, np.float32), "must be finite numbers"),
    ],
)
def test_a_profile_of_another_shape_is_refused(name: str, tensor: np.ndarray, message: str, tmp_path: Path) -> None:
    path = make_profile().save(tmp_path / "profile.safetensors")
    tensors, description = read_tensors(path, "moa-lab/profile/1")
    write_tensors(path, {**tensors, name: tensor}, description)
    with pytest.raises(RecordError, match=message):
        type(make_profile()).load(path)


def recorded() -> list[Path]:
    return [path for path in sorted((PROJECT / "data").rglob("*")) if path.suffix in (".json", ".safetensors")]


@pytest.mark.parametrize("path", recorded(), ids=lambda path: str(path.relative_to(PROJECT)))
def test_every_record_of_this_project_is_shown(path: Path) -> None:
    assert describe(path, kind_of(path))


def test_a_summary_with_any_value_edited_is_shown_or_refused_by_name(tmp_path: Path) -> None:
    data = json.loads((PROJECT / "data" / "runs" / "demo" / "summary.json").read_text())
    data["plans"] = {"moa": data["plans"]["moa"]}
    path = tmp_path / "summary.json"
    for what, text in edited(data):
        path.write_text(text)
        error = complaint(lambda: describe(path, kind_of(path)))
        assert error is None or is_told(error, path), what


# --- the authors' files, and names that say another kind


def test_show_tells_what_one_of_the_authors_plans_keeps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "lut_result.json"
    path.write_text(json.dumps({"alphas": [[0, 1024], [0, 0]], "betas": [[0.5, 0], [1, 0.5]]}))
    assert exit_code(monkeypatch, "show", path) == 0
    shown = capsys.readouterr().out
    assert "2 layers of 2 heads" in shown
    assert "at 4096 tokens: heads keep 56.2% on average" in shown  # (2048 + 1024 + 4096 + 2048) / 4 of 4096
    assert "2 heads: span = 0 + 0.5 N" in shown
    assert "from_published" in shown


@pytest.mark.parametrize(
    ("command", "suffix"),
    [
        (("calibrate", "--lengths", "256"), ".safetensors"),
        (("profile", "FILE"), ".safetensors"),
        (("search", "FILE"), ".json"),
        (("learn", "FILE", "--profile", "FILE"), ".json"),
        (("refine", "FILE", "--samples", "FILE", "--profile", "FILE"), ".json"),
        (("validate", "FILE", "--length", "256"), ".json"),
        (("evaluate", "FILE", "--lengths", "256"), ".json"),
        (("parity", "--plan", "FILE"), ".json"),
        (("harness", "--tasks", "x"), ".json"),
        (("study", "space"), ".json"),
        (("bench", "kernels"), ".json"),
        (("bench", "generate"), ".json"),
        (("bench", "profile"), ".json"),
        (("bench", "search"), ".json"),
    ],
)
def test_an_output_named_as_another_kind_of_file_is_refused_first(
    command: tuple[str, ...], suffix: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    other = {".json": "x.safetensors", ".safetensors": "x.json"}[suffix]
    words = [tmp_path / "none" if word == "FILE" else word for word in command]
    for name, told in ((other, f"name it x{suffix}"), (f"x{suffix}.txt", f"name it x{suffix}{suffix}")):
        assert exit_code(monkeypatch, *words, "--out", tmp_path / name, "--force") == 2
        assert told in capsys.readouterr().err
    (tmp_path / "folder").mkdir()
    assert exit_code(monkeypatch, *words, "--out", tmp_path / "folder", "--force") == 2
    assert "is a folder" in capsys.readouterr().err


def test_a_figure_is_a_page_and_a_folder_of_records_no_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    record = records()["bench"].save(tmp_path / "bench.json")
    assert exit_code(monkeypatch, "show", record, "--figure", tmp_path / "figure.json") == 2
    assert "name it figure.html" in capsys.readouterr().err
    for command in (("study", "space,rules"), ("run",)):
        assert exit_code(monkeypatch, *command, "--out", tmp_path / "x.json") == 2
        assert "name a folder" in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()


def test_a_records_content_and_not_its_name_says_what_it_is(tmp_path: Path) -> None:
    samples = SampleSet((Sample("questions", np.arange(40), ((3, 5),)),))
    path = samples.save(tmp_path / "samples.json")
    assert kind_of(path) == "moa-lab/samples/1"
    assert "1 samples" in describe(path, kind_of(path))
    with pytest.raises(RecordError, match="a safetensors file; expected a config card, which is JSON"):
        Plan.load(path)


def test_a_card_in_the_place_of_a_profile_is_not_called_damaged(tmp_path: Path) -> None:
    path = PLAN.save(tmp_path / "card.json")
    with pytest.raises(RecordError, match=r"a JSON file; expected a moa-lab/profile/1 record, which is safetensors") as caught:
        type(make_profile()).load(path)
    assert "delete" not in str(caught.value)


def test_show_never_advises_to_delete_a_cut_card(tmp_path: Path) -> None:
    path = PLAN.save(tmp_path / "card.json")
    path.write_text(path.read_text()[:200])
    with pytest.raises(RecordError, match="take a whole copy") as caught:
        kind_of(path)
    assert "delete" not in str(caught.value)
