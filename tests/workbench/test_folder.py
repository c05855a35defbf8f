"""Notebooks of an installed package: copied to a folder of the user's, and nothing of the user's is written over."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from command_line import exit_code

from moa_lab import shipped
from moa_lab.shipped import checkout, data_folder, notebooks_folder
from moa_lab.workbench import folder as module
from moa_lab.workbench import launch
from moa_lab.workbench.folder import FIRST, NAME, lay_out, user_folder


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What comes with the code, but small: a notebook and the record it reads, in a folder `source`."""
    source = tmp_path / "source"
    for place in (Path("notebooks", FIRST), Path("notebooks", ".ipynb_checkpoints", FIRST), Path("data", "runs", "demo", "plan.json")):
        (source / place).parent.mkdir(parents=True, exist_ok=True)
        (source / place).write_text(place.name)
    monkeypatch.setattr(module, "notebooks_folder", lambda: source / "notebooks")
    monkeypatch.setattr(module, "data_folder", lambda name: source / "data" / name)
    return source


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_notebooks_and_what_they_read_lie_as_in_a_checkout(tmp_path: Path, small: Path) -> None:
    done = lay_out(tmp_path / "mine")
    assert files(tmp_path / "mine") == {f"notebooks/{FIRST}", "data/runs/demo/plan.json"}
    assert (len(done.copied), done.kept) == (2, ())
    assert str(tmp_path / "mine" / "notebooks") in str(done)
    assert "2 files copied" in str(done)


def test_what_the_user_has_stays_and_is_named(tmp_path: Path, small: Path) -> None:
    mine = tmp_path / "mine"
    lay_out(mine)
    (mine / "notebooks" / FIRST).write_text("my outputs")
    (mine / "data" / "runs" / "demo" / "plan.json").unlink()
    done = lay_out(mine)
    assert (mine / "notebooks" / FIRST).read_text() == "my outputs"
    assert (mine / "data" / "runs" / "demo" / "plan.json").read_text() == "plan.json"
    assert [path.as_posix() for path in done.copied] == ["data/runs/demo/plan.json"]
    assert done.kept == (Path("notebooks", FIRST),)
    assert f"yours stay as they are: {FIRST}" in str(done)
    assert "copied" not in str(lay_out(mine))


def test_a_link_or_a_folder_in_the_place_of_a_file_is_the_users_too(tmp_path: Path, small: Path) -> None:
    mine = tmp_path / "mine"
    (mine / "notebooks" / FIRST).mkdir(parents=True)
    (mine / "data" / "runs" / "demo").mkdir(parents=True)
    (mine / "data" / "runs" / "demo" / "plan.json").symlink_to(tmp_path / "elsewhere")
    assert len(lay_out(mine).kept) == 2
    assert not (tmp_path / "elsewhere").exists()


def test_a_folder_that_cannot_be_written_and_notebooks_that_did_not_come_are_refused(tmp_path: Path, small: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        lay_out(tmp_path / "file" / "below")
    (small / "notebooks" / FIRST).unlink()
    with pytest.raises(ValueError, match="install moa-lab again"):
        lay_out(tmp_path / "mine")


def test_a_package_is_told_from_a_checkout_by_what_it_carries(tmp_path: Path) -> None:
    package = tmp_path / "moa_lab"
    (tmp_path / "data" / "runs").mkdir(parents=True)
    assert checkout(package) == tmp_path
    assert (data_folder("runs", package), notebooks_folder(package)) == (tmp_path / "data" / "runs", tmp_path / "notebooks")
    # Beside an installed package, `data` is somebody else's.
    (package / "_data").mkdir(parents=True)
    assert checkout(package) is None
    assert (data_folder("runs", package), notebooks_folder(package)) == (package / "_data" / "runs", package / "_data" / "notebooks")


def test_a_checkout_is_opened_where_it_is_and_a_package_beside_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert user_folder() is None
    monkeypatch.setattr(module, "checkout", lambda: None)
    assert user_folder() == tmp_path / NAME
    (tmp_path / NAME / "notebooks").mkdir(parents=True)
    (tmp_path / NAME / "notebooks" / FIRST).touch()
    monkeypatch.chdir(tmp_path / NAME)
    assert user_folder() == tmp_path / NAME


def test_the_lab_opens_the_copies_and_says_where_they_are(
    tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(os, "execve", lambda program, line, environment: started.append(line))
    monkeypatch.setattr(launch, "cache_folder", lambda: tmp_path / "cache")
    assert exit_code(monkeypatch, "lab", "--no-browser", "--notebooks", tmp_path / "mine") == 0
    assert f"notebooks are in {tmp_path / 'mine' / 'notebooks'}, 2 files copied there" in capsys.readouterr().out
    assert f"--ServerApp.root_dir={tmp_path / 'mine'}" in started[0]
    assert f"--LabApp.default_url=/lab/tree/notebooks/{FIRST}" in started[0]


def test_nothing_is_copied_where_the_lab_cannot_start(
    tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "cache_folder", lambda: tmp_path / "cache")
    assert exit_code(monkeypatch, "lab", "--run", tmp_path / "no run", "--notebooks", tmp_path / "mine") == 2
    assert "is no folder of a run" in capsys.readouterr().err
    assert not (tmp_path / "mine").exists()


def test_what_notebooks_read_is_what_is_copied() -> None:
    read = {
        name
        for path in notebooks_folder().glob("*.ipynb")
        for cell in json.loads(path.read_text())["cells"]
        for name in re.findall(r"\.\./data/(\w+)", "".join(cell["source"]))
    }
    assert read == set(module.RECORDS)
    assert shipped.checkout() is not None
