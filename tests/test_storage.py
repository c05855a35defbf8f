"""A record is the old file or the new file, never half of one; what is not a record is refused by name."""

import errno
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from moa_lab.storage import (
    RecordError,
    atomic_path,
    is_intact,
    parse,
    read_json,
    read_tensors,
    schema_of,
    to_json,
    write_json,
    write_tensors,
)

SCHEMA = "moa-lab/test/1"

# Runs in a process of its own, whose files may not grow beyond 64 KiB: to the program, a disk that is full.
ON_A_FULL_DISK = """
import resource, sys
import numpy as np
from moa_lab import storage
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
try:
    {write}
except OSError as error:
    print(error)
"""


@dataclass(frozen=True)
class Inner:
    size: int


@dataclass(frozen=True)
class Outer:
    name: str
    inner: tuple[Inner, ...]


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, timeout=120)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_json_round_trip(tmp_path: Path) -> None:
    written = write_json(tmp_path / "deep" / "record.json", {"schema": SCHEMA, "value": [1, 0.1, None, "é"]})
    assert read_json(written, SCHEMA) == {"schema": SCHEMA, "value": [1, 0.1, None, "é"]}


def test_tensors_round_trip_with_their_description(tmp_path: Path) -> None:
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3).T, "b": np.array([True, False])}
    path = write_tensors(tmp_path / "record.safetensors", arrays, {"schema": SCHEMA, "note": "é"})
    tensors, description = read_tensors(path, SCHEMA)
    assert description == {"schema": SCHEMA, "note": "é"}
    assert set(tensors) == {"a", "b"}
    np.testing.assert_array_equal(tensors["a"], arrays["a"])
    assert tensors["b"].dtype == np.bool_


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_json(tmp_path / "record.json", {"schema": SCHEMA, "value": "old"})

    def full(self: Path, text: str, encoding: str) -> int:
        self.write_bytes(text[:4].encode())
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        write_json(path, {"schema": SCHEMA, "value": "new"})
    assert caught.value.filename == str(path)
    assert read_json(path, SCHEMA)["value"] == "old"
    assert names(tmp_path) == ["record.json"]


@pytest.mark.parametrize(
    ("file", "write"),
    [
        ("record.json", "storage.write_json(sys.argv[1], list(range(100_000)))"),
        ("record.safetensors", "storage.write_tensors(sys.argv[1], {'w': np.zeros(100_000)}, {})"),
    ],
)
def test_a_full_disk_is_an_oserror_that_names_the_file_and_leaves_the_old_one(tmp_path: Path, file: str, write: str) -> None:
    path = tmp_path / file
    path.write_text("old")
    done = run_python(ON_A_FULL_DISK.format(write=write), str(path))
    assert done.returncode == 0, done.stderr
    assert file in done.stdout
    assert "too large" in done.stdout
    assert path.read_text() == "old"
    assert names(tmp_path) == [file]


def test_a_killed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = write_json(tmp_path / "record.json", {"schema": SCHEMA, "value": "old"})
    code = (
        "import os, signal, sys; from moa_lab.storage import atomic_path\n"
        "with atomic_path(sys.argv[1]) as temporary:\n"
        "    temporary.write_text('{'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert run_python(code, str(path)).returncode == -signal.SIGKILL
    assert read_json(path, SCHEMA)["value"] == "old"


def test_an_exception_in_the_block_reaches_the_caller_and_changes_nothing(tmp_path: Path) -> None:
    def write_half() -> None:
        with atomic_path(tmp_path / "new.txt") as temporary:
            temporary.write_text("half")
            raise KeyError("stop")

    with pytest.raises(KeyError):
        write_half()
    assert names(tmp_path) == []


def test_a_record_is_as_readable_as_other_files(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("x")
    path = write_json(tmp_path / "record.json", {})
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_nan_is_refused_because_json_has_no_word_for_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "record.json", {"value": float("nan")})
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated or not JSON"),
        (b'{"schema": "moa-lab/te', "truncated or not JSON"),
        (b"\xff\xfe\x00", "truncated or not JSON"),
        (b"[1, 2]", "schema is None"),
        (b'{"schema": "moa-lab/plan/1"}', "schema is 'moa-lab/plan/1', expected 'moa-lab/test/1'"),
    ],
)
def test_broken_and_foreign_json_is_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(content)
    with pytest.raises(RecordError, match=message) as caught:
        read_json(path, SCHEMA)
    assert str(path) in str(caught.value)


def write_truncated(path: Path) -> None:
    write_tensors(path, {"w": np.zeros(1000)}, {"schema": SCHEMA})
    path.write_bytes(path.read_bytes()[:-100])


def write_weights_in_bfloat16(path: Path) -> None:
    save_file({"w": torch.zeros(3, dtype=torch.bfloat16)}, path)


def write_broken_description(path: Path) -> None:
    save_file({"w": torch.zeros(3)}, path, metadata={"record": "{"})


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.touch(), "truncated or not a safetensors file"),
        (lambda path: path.write_text("{}"), "a JSON file; expected a moa-lab/test/1 record, which is safetensors"),
        (write_truncated, "truncated or not a safetensors file"),
        (write_broken_description, "truncated or not a safetensors file"),
        (write_weights_in_bfloat16, "schema is None, expected 'moa-lab/test/1'"),
        (lambda path: path.mkdir(), "no such file"),
        (lambda path: None, "no such file"),
    ],
)
def test_broken_and_foreign_tensors_are_refused_by_name(tmp_path: Path, write: Callable[[Path], object], message: str) -> None:
    path = tmp_path / "record.safetensors"
    write(path)
    with pytest.raises(RecordError, match=message) as caught:
        read_tensors(path, SCHEMA)
    assert str(path) in str(caught.value)


def test_missing_files_and_folders_are_refused_as_records(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="no such file"):
        read_json(tmp_path / "none.json", SCHEMA)
    with pytest.raises(RecordError, match="is a folder"):
        read_json(tmp_path, SCHEMA)
    (tmp_path / "file").touch()
    with pytest.raises(RecordError, match="cannot be read"):
        read_json(tmp_path / "file" / "below.json", SCHEMA)


def test_schema_of_reads_both_kinds_of_record_and_refuses_the_rest(tmp_path: Path) -> None:
    assert schema_of(write_json(tmp_path / "a.json", {"schema": SCHEMA})) == SCHEMA
    assert schema_of(write_tensors(tmp_path / "a.safetensors", {"w": np.zeros(2)}, {"schema": SCHEMA})) == SCHEMA
    with pytest.raises(RecordError, match="names no schema"):
        schema_of(write_json(tmp_path / "b.json", {"schema": 3}))
    with pytest.raises(RecordError, match="names no schema"):
        schema_of(write_json(tmp_path / "c.json", []))
    (tmp_path / "d.safetensors").write_bytes(b"\x00")
    with pytest.raises(RecordError, match="not a record"):
        schema_of(tmp_path / "d.safetensors")
    with pytest.raises(RecordError, match="no such file"):
        schema_of(tmp_path / "none.json")


def test_parse_builds_nested_values_and_names_the_bad_field() -> None:
    value = Outer("x", (Inner(1), Inner(2)))
    assert parse(Outer, json.loads(json.dumps(to_json(value))), "f.json") == value
    with pytest.raises(RecordError, match=r"f\.json: field inner\.1\.size"):
        parse(Outer, {"name": "x", "inner": [{"size": 1}, {"size": "many"}]}, "f.json")


def test_is_intact_is_false_for_a_broken_record_only(tmp_path: Path) -> None:
    path = write_json(tmp_path / "record.json", {"schema": SCHEMA})
    assert is_intact(path, lambda file: read_json(file, SCHEMA))
    path.write_text("{")
    assert not is_intact(path, lambda file: read_json(file, SCHEMA))
