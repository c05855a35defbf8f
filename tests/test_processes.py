from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import exit_code

STAGES = ("calibrate", "profile", "learn learned", "refine", "evaluate")
RECORDS = ("plan.json", "front.json", "validation.json", "measurements.json", "summary.json")
ENDED = "another process of this run ended; the same command goes on where the run was"


def shared(count: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
    command = [sys.executable, *torchrun, str(Path(__file__).with_name("shared_run.py")), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def told(out: Path) -> dict[str, Any]:
    """The records, less when and where they were made."""
    found = {}
    for name in RECORDS:
        text = (out / name).read_text()
        for field in ("created", "command"):
            text = re.sub(rf'"{field}": "[^"]*"', f'"{field}": ""', text)
        found[name] = json.loads(text)
    return found


@pytest.fixture(scope="module")
def one(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("one") / "run"
    result = shared(1, *inputs, out)
    assert result.returncode == 0, result.stderr
    return out


def test_several_processes_leave_the_records_of_one_to_the_last_digit(inputs: tuple[Path, Path], one: Path, tmp_path: Path) -> None:
    result = shared(3, *inputs, tmp_path / "run")
    assert result.returncode == 0, result.stderr
    assert told(tmp_path / "run") == told(one)


def test_where_a_process_is_killed_the_others_stop_in_words_and_the_same_command_goes_on(
    inputs: tuple[Path, Path], one: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    finished: dict[Path, int] = {}
    for stage in STAGES:
        result = shared(2, *inputs, out, stage)
        assert result.returncode != 0, stage
        assert ENDED in result.stderr or "the run was stopped; the same command goes on" in result.stderr, result.stderr
        parts = {path: path.stat().st_mtime_ns for path in (out / "parts").rglob("*") if path.is_file() and not path.name.startswith(".")}
        assert all(parts[path] == when for path, when in finished.items() if "learn" not in path.parts), stage
        finished = parts
    # Also with another number of processes.
    result = shared(1, *inputs, out)
    assert result.returncode == 0, result.stderr
    assert told(out) == told(one)


def test_a_process_that_hears_of_a_lost_one_tells_it_although_it_is_asked_to_end_meanwhile() -> None:
    script = """
import os, signal
from unittest import mock
import torch.distributed as dist
from moa_lab import processes

names = {"init_process_group": None, "destroy_process_group": None, "get_rank": 0, "get_world_size": 2}
with mock.patch.multiple(dist, **{name: mock.Mock(return_value=value) for name, value in names.items()}):
    dist.destroy_process_group.side_effect = lambda: os.kill(os.getpid(), signal.SIGTERM)
    try:
        with processes.joined():
            raise processes.LostProcessError("another ended")
    except processes.LostProcessError as error:
        os.kill(os.getpid(), signal.SIGTERM)
        print("told:", error)
"""
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, env=os.environ | {"WORLD_SIZE": "2"})
    assert (told.returncode, told.stdout) == (0, "told: another ended\n"), told.stderr


def test_what_only_the_first_process_can_tell_is_told_once(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "settings.json").write_text('{"schema": "moa-lab/run/1", "model": "another"}')
    result = shared(2, *inputs, out)
    assert result.returncode != 0
    assert "holds a run with another model" in result.stderr


def test_of_what_torchrun_starts_other_commands_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert exit_code(monkeypatch, "doctor") == 2
    assert "`moa-lab run` and `moa-lab bench profile` are shared out among processes" in capsys.readouterr().err
