from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import exit_code
from texts import bpe_tokenizer
from tiny import tiny_model

from moa_lab.bench.record import GOALS, BenchRecord, judged
from moa_lab.bench.record import table as bench_table
from moa_lab.bench.search import search_table
from moa_lab.calibration import SampleSet
from moa_lab.evaluate.parity import Parity, ParityRow
from moa_lab.evaluate.parity import table as parity_table
from moa_lab.evaluate.summary import summarise
from moa_lab.geometry import ModelGeometry
from moa_lab.plan import Plan, mixes_of, uniform_plan
from moa_lab.provenance import Provenance
from moa_lab.records import Front, Measurements


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama", max_length=512).save_pretrained(folder)
    bpe_tokenizer().save_pretrained(folder)
    return folder


def one_line_error(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("density", ["0", "1.5", "nan", "-0.2"])
def test_a_density_outside_zero_to_one_is_one_line_and_exit_code_2(
    density: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert exit_code(monkeypatch, "run", "--density", density, "--out", tmp_path / "run") == 2
    assert "density must be a number above 0 and at most 1" in one_line_error(capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--preset", "huge"), "preset must be one of quick, standard, study, sketch, full"),
        (("--lengths", "1k"), "lengths must be whole numbers of tokens"),
        (("--model", "no/such/folder/or/model"), "no/such/folder/or/model"),
    ],
)
def test_a_bad_run_names_the_argument_and_leaves_nothing(
    arguments: tuple[str, str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert exit_code(monkeypatch, "run", *arguments, "--out", tmp_path / "run") == 2
    assert message in one_line_error(capsys)
    assert not (tmp_path / "run").exists()


def test_a_length_beyond_the_model_is_refused_before_anything_is_written(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert exit_code(monkeypatch, "run", "--model", model_folder, "--lengths", "256,1024", "--out", tmp_path / "run") == 2
    assert "length 1024 is beyond the model's maximum of 512 tokens" in one_line_error(capsys)
    assert not (tmp_path / "run").exists()


def test_a_plan_of_another_geometry_is_refused_with_both_geometries(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    card = uniform_plan(ModelGeometry(3, 4, 2, 8, 256), 0.5).save(tmp_path / "plan.json")
    assert exit_code(monkeypatch, "evaluate", card, "--model", model_folder, "--lengths", "256", "--out", tmp_path / "out.json") == 2
    message = one_line_error(capsys)
    assert "plan has 3 layers" in message
    assert "model has 2 layers" in message
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
    "command",
    [
        ("profile", "FILE", "--out", "OUT"),
        ("search", "FILE", "--out", "OUT"),
        ("learn", "FILE", "--profile", "FILE", "--out", "OUT"),
        ("refine", "FILE", "--samples", "FILE", "--profile", "FILE", "--out", "OUT"),
        ("validate", "FILE", "--length", "256", "--out", "OUT"),
        ("evaluate", "FILE", "--lengths", "256", "--out", "OUT"),
        ("show", "FILE"),
    ],
)
@pytest.mark.parametrize("content", [b"", b"{", b'{"schema": "another/thing/1"}', b"\x10\x00\x00\x00\x00\x00\x00\x00{}", None])
def test_a_truncated_foreign_or_missing_file_is_named(
    command: tuple[str, ...], content: bytes | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file, out = tmp_path / "record.json", tmp_path / "out"
    if content is not None:
        file.write_bytes(content)
    replaced = [str(file) if word == "FILE" else str(out) if word == "OUT" else word for word in command]
    assert exit_code(monkeypatch, *replaced) == 2
    assert str(file) in one_line_error(capsys)
    assert not out.exists()


def test_an_empty_dataset_is_refused(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    arguments = ("--model", model_folder, "--source", tmp_path / "empty.jsonl", "--lengths", "384", "--out", tmp_path / "s.safetensors")
    assert exit_code(monkeypatch, "calibrate", *arguments) == 2
    assert "empty.jsonl" in one_line_error(capsys)


def test_an_existing_file_is_not_replaced_unless_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "front.json").write_text("mine")
    assert exit_code(monkeypatch, "search", tmp_path / "profile.safetensors", "--out", tmp_path / "front.json") == 2
    assert "pass --force to replace it" in one_line_error(capsys)
    assert (tmp_path / "front.json").read_text() == "mine"


def test_a_full_disk_is_one_line_and_leaves_the_old_file(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "out.json").write_text("old")
    card = uniform_plan(ModelGeometry.from_config(tiny_model("llama", max_length=512).config), 0.9).save(tmp_path / "plan.json")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    arguments = ("--model", model_folder, "--lengths", "512", "--n", "1", "--force", "--out", tmp_path / "out.json")
    assert exit_code(monkeypatch, "evaluate", card, *arguments) == 2
    assert "No space left on device" in one_line_error(capsys)
    assert (tmp_path / "out.json").read_text() == "old"


def test_show_describes_a_config_card(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    card = uniform_plan(ModelGeometry(3, 4, 2, 8, 256), 0.5, [256]).save(tmp_path / "plan.json")
    assert exit_code(monkeypatch, "show", card) == 0
    shown = capsys.readouterr().out
    assert "at 256 tokens: density 50.0%" in shown
    assert json.loads(card.read_text())["kv_bytes"]["256"] == 3 * 2 * 128 * 2 * 8 * 2


def bench_record(row: str, **shape: object) -> BenchRecord:
    described = {"model": "tiny", "batch": 3, "n_tokens": 96, "plan": "half", "density": 0.5, "skew": 2.0, **shape}
    rows = tuple(judged(row, GOALS[row], described, ours, 10.0, "limit", "s", True, {}) for ours in (5.0, 20.0))
    return BenchRecord(rows, {"device": "a machine", "cpus": 2}, Provenance(device="a machine", command="moa-lab bench"))


def test_show_takes_the_folder_of_a_run_or_of_a_shared_plan(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    plan = uniform_plan(ModelGeometry(2, 4, 2, 16, 4096), 0.5, [256])
    plan.save_pretrained(tmp_path / "shared")
    assert exit_code(monkeypatch, "show", tmp_path / "shared") == 0
    assert "at 256 tokens: density 50.0%" in capsys.readouterr().out
    summary = summarise([plan], Measurements((), {}), 256)
    (tmp_path / "shared" / "summary.json").write_text(json.dumps(summary))
    assert exit_code(monkeypatch, "show", tmp_path / "shared") == 0
    assert capsys.readouterr().out.startswith("plan ")
    (tmp_path / "empty").mkdir()
    assert exit_code(monkeypatch, "show", tmp_path / "empty") == 2
    assert "is a folder" in one_line_error(capsys)


def test_show_prints_the_table_of_a_benchmark_and_how_much_of_it_meets_its_goals(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    record = bench_record("C1")
    assert exit_code(monkeypatch, "show", record.save(tmp_path / "bench.json")) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("benchmark of 2 rows, 1 of which meet their goals\n")
    assert bench_table(record) in shown
    assert "by: moa-lab bench" in shown


def test_show_prints_what_was_asked_of_the_search(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    record = bench_record("S1", asked="exact", goal="mean", layers=4, kv_heads=4, rules=8)
    assert exit_code(monkeypatch, "show", record.save(tmp_path / "search.json")) == 0
    assert search_table(record) in capsys.readouterr().out


@pytest.mark.parametrize("passed", [True, False])
def test_show_prints_the_cases_and_the_verdict_of_a_parity_check(
    passed: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    row = ParityRow("one prompt", "96 tokens", 96, 1e-5 if passed else None, 1.0, 90, 1e-3, passed)
    found = Parity((row,), {"plan": "half", "dtype": "float16"}, Provenance(model="tiny"))
    assert exit_code(monkeypatch, "show", found.save(tmp_path / "parity.json")) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("parity of plan 'half' in float16\n")
    assert parity_table(found) in shown
    assert ("all 1 cases passed" if passed else "1 of 1 cases failed") in shown


def test_doctor_names_what_it_looked_at(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(monkeypatch, "doctor") in (0, 1)
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("torch", "Triton", "Chromium", "model smollm2"))


def test_study_harness_is_harness(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["harness"], ["study", "harness"]):
        assert exit_code(monkeypatch, *words, "--help") == 0
        assert "--include-path" in capsys.readouterr().out
    assert exit_code(monkeypatch, "study", "--help") == 0
    assert "--include-path" not in capsys.readouterr().out


def test_spans_are_learned_from_files_stage_by_stage(
    inputs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model, documents = inputs
    samples, profiled, front = (tmp_path / name for name in ("samples.safetensors", "profile.safetensors", "front.json"))
    counts = ("--questions", 2, "--per-sample", 1, "--others", 1, "--texts", 1, "--lessons")
    source = ("--source", documents, "--columns", "text=text,summary=summary")
    assert exit_code(monkeypatch, "calibrate", "--model", model, "--lengths", 640, *counts, *source, "--out", samples) == 0
    assert [len(SampleSet.load(samples).select(task)) for task in ("questions", "summaries", "text")] == [2, 1, 1]
    assert exit_code(monkeypatch, "profile", samples, "--model", model, "--out", profiled) == 0
    command = ("learn", samples, "--profile", profiled, "--model", model, "--density", 0.6, "--steps", 2, "--out", front)
    assert exit_code(monkeypatch, *command) == 0
    found = Front.load(front)
    assert f"{len(found)} plans: {front}" in capsys.readouterr().out
    assert {point.origin for point in found} == {"learned"}
    assert all(point.plan.density(640) <= 0.6 for point in found)
    assert exit_code(monkeypatch, *command, "--force", "--weights", "summaries=2,text=3") == 0
    assert Front.load(front).settings["weights"] == {"summaries": 2.0, "text": 3.0}
    for weights, said in (("summaries", "task=number"), ("documents=2", "of the tasks questions, summaries, text")):
        assert exit_code(monkeypatch, *command, "--force", "--weights", weights) == 2
        assert said in one_line_error(capsys)
    capsys.readouterr()
    assert exit_code(monkeypatch, *command) == 2
    assert "pass --force" in one_line_error(capsys)


def test_bits_are_searched_head_by_head_from_files_stage_by_stage(
    inputs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model, (samples, profiled, front) = (
        inputs[0],
        (tmp_path / name for name in ("samples.safetensors", "profile.safetensors", "front.json")),
    )
    counts, of_model = ("--questions", 2, "--others", 0), ("--model", model)
    assert exit_code(monkeypatch, "calibrate", *of_model, "--lengths", 384, *counts, "--out", samples) == 0
    assert exit_code(monkeypatch, "profile", samples, *of_model, "--rounding", "--out", profiled) == 0
    asked = ("--density", 0.3, "--bits", "8,8+4,4", "--min-span", 80, "--seconds", 4, "--points", 8)
    assert exit_code(monkeypatch, "search", profiled, *asked, "--out", front) == 0
    found = Front.load(front)
    mixed = replace(found, points=tuple(point for point in found if point.plan.name.endswith("@per-head")))
    mixed.save(tmp_path / "mixed.json")
    validated = ("validate", tmp_path / "mixed.json", *of_model, "--length", 384, "--questions", 2, "--summaries", 0)
    assert exit_code(monkeypatch, *validated, "--out", tmp_path / "plan.json") == 0
    plan = Plan.load(tmp_path / "plan.json")
    assert len(mixes_of(plan)) > 1
    assert plan.density(384) <= 0.3
    refined = ("refine", tmp_path / "plan.json", "--samples", samples, "--profile", profiled, *of_model, "--density", 0.3, "--rounds", 1)
    assert exit_code(monkeypatch, *refined, "--bits", "16,4", "--out", tmp_path / "refined.json") == 0
    for better in Front.load(tmp_path / "refined.json"):
        assert better.plan.name == "refined-1@per-head"
        assert better.plan.density(384) <= 0.3
    learned = ("learn", samples, "--profile", profiled, *of_model, *asked[:6], "--steps", 1, "--out", tmp_path / "learned.json")
    assert exit_code(monkeypatch, *learned) == 0
    assert {point.plan.name.partition("@")[2] for point in Front.load(tmp_path / "learned.json")} == {"per-head"}
    evaluated = ("evaluate", tmp_path / "plan.json", *of_model, "--lengths", 400, "--n", 2)
    assert exit_code(monkeypatch, *evaluated, "--out", tmp_path / "measurements.json") == 0
    assert "retrieval needles@400" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command",
    [("calibrate", "--lengths", "256"), ("evaluate", "FILE", "--lengths", "256"), ("run", "--density", "0.5"), ("study", "space")],
)
def test_an_output_below_a_file_is_refused_before_any_work(
    command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "taken").write_text("")
    words = [tmp_path / "none" if word == "FILE" else word for word in command]
    assert exit_code(monkeypatch, *words, "--out", tmp_path / "taken" / "new" / "x") == 2
    assert "taken is a file and no folder" in capsys.readouterr().err


@pytest.mark.parametrize("command", [("calibrate",), ("evaluate", "CARD"), ("harness", "--tasks", "x")])
def test_lengths_that_are_no_numbers_are_refused_before_the_model_is_loaded(
    command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    card = uniform_plan(ModelGeometry(2, 4, 2, 16, 512), 0.5).save(tmp_path / "card.json")
    words = [card if word == "CARD" else word for word in command]
    assert exit_code(monkeypatch, *words, "--lengths", "1k", "--model", tmp_path / "none", "--out", tmp_path / "x") == 2
    assert "lengths must be whole numbers" in capsys.readouterr().err


def test_an_unknown_preference_is_refused_before_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ("validate", tmp_path / "none.json", "--length", "512", "--model", tmp_path / "none", "--out", tmp_path / "x.json")
    assert exit_code(monkeypatch, *words, "--prefer", "poems") == 2
    assert "prefer must be needles, words, both" in capsys.readouterr().err


def test_a_weight_that_is_named_twice_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ("learn", tmp_path / "none", "--profile", tmp_path / "none", "--out", tmp_path / "x.json", "--weights", "text=1,text=5")
    assert exit_code(monkeypatch, *words) == 2
    assert "a task is named twice in 'text=1,text=5'" in capsys.readouterr().err


def test_capacity_foretells_both_caches_on_a_gpu_of_choice(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    card = Path(__file__).resolve().parents[2] / "data" / "runs" / "standard-50" / "plan.json"
    asked = ("capacity", "--plan", card, "--weights-gb", "0.27", "--tokens", "2048,8192")
    assert exit_code(monkeypatch, *asked, "--gpu", "l4") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:5]] == [["2,048", "dense"], ["2,048", "moa"], ["8,192", "dense"], ["8,192", "moa"]]
    assert "(1.9 x)" in lines[2] or "(2.0 x)" in lines[2]
    assert exit_code(monkeypatch, *asked, "--memory-gb", "0.2", "--read-gb-s", "100") == 0
    assert "none" in capsys.readouterr().out
    for more in (("--gpu", "abacus"), ("--model", "smollm2")):
        assert exit_code(monkeypatch, *asked, *more) == 2
        assert "--" in capsys.readouterr().err
