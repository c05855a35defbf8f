"""The table of presses, and the commands as far as they run without kvpress."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path

import pytest
from command_line import exit_code

from moa_lab.commands import presses
from moa_lab.presses.methods import METHODS, SPANS
from moa_lab.presses.questions import QuestionSet
from moa_lab.presses.tables import table
from moa_lab.records import Measurement, Measurements


def test_every_row_says_what_was_kept_held_and_needed_and_what_was_left_out_is_named() -> None:
    def row(name: str, low: float, detail: dict[str, object], n: int = 8) -> Measurement:
        return Measurement(name, "retrieval", "needles", 1024, 0.5, n, low, 0.8, 0.2496, detail)

    kvzip = {"needs": asdict(METHODS["kvzip"].needs), "footprint": 3.7531}
    ours = {"needs": asdict(SPANS), "footprint": 0.4321}
    rows = (row("kvzip-25", 0.2, kvzip), row("moa-25", 0.2, ours), row("alone", -math.inf, ours, n=1))
    lines = table(Measurements(rows, {"left_out": {"duo-25 at 1024 tokens": "too few"}})).splitlines()
    kvzip_line, ours_line, alone_line = lines[1:4]
    assert kvzip_line.split()[:3] == ["1024", "kvzip-25", "0.500"]
    assert all(part in kvzip_line for part in ("[0.200, 0.800]", " 8 ", "25.0%", "3.753", "dense  2"))
    assert all(part in ours_line for part in ("0.432", "spans  1", "a plan"))
    assert "[0.200" not in alone_line
    assert "left out: duo-25 at 1024 tokens: too few" in lines


def test_prepare_writes_what_the_other_environment_needs(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "folder"
    assert exit_code(monkeypatch, "presses", "prepare", "--model", inputs[0], "--lengths", "900", "--n", 2, "--out", out) == 0
    assert [question.length for question in QuestionSet.load(out / "questions.json")] == [900, 900]
    assert (out / "model" / "tokenizer.json").is_file()
    assert "2 questions" in capsys.readouterr().out


def test_run_names_the_methods_that_there_are_and_where_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(presses, "find_spec", lambda name: None)
    arguments = ("presses", "run", tmp_path, "--out", tmp_path / "out.json", "--methods")
    assert exit_code(monkeypatch, *arguments, "snapkv,h3o") == 2
    assert "streaming, snapkv, adakv, duo, duo-192, kvzip, kvzip-heads, got h3o" in capsys.readouterr().err
    assert exit_code(monkeypatch, *arguments, "snapkv") == 2
    assert "pip install kvpress==0.5.5 in an environment of its own" in capsys.readouterr().err
