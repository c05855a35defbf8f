"""The wheel: it carries the notebooks and all that they read, also when it is built from the sdist."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from moa_lab.workbench.folder import RECORDS

pytest.importorskip("hatchling", reason="hatchling, of the extra dev, is not installed: wheels are built with it")

PROJECT = Path(__file__).resolve().parents[1]
BUILT_FROM = ("pyproject.toml", "README.md", "LICENSE", "Makefile", "environment.yml", "moa_lab", "notebooks", "data")
# Read by a Python that has neither the project nor its environment's working folder on its path.
LAY_OUT = """
import sys
sys.path.insert(0, sys.argv[1])
import moa_lab
from moa_lab.calibration.documents import embedded_documents
from moa_lab.workbench.folder import lay_out, user_folder
print(moa_lab.__file__)
print(len(embedded_documents("test")))
print(lay_out(user_folder()))
"""


def build(project: Path, out: Path, target: str) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(out)]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    (built,) = out.iterdir()
    return built


def contents(wheel: Path) -> dict[str, int]:
    return {item.filename: item.CRC for item in zipfile.ZipFile(wheel).infolist() if ".dist-info/" not in item.filename}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    project = folder / "project"
    project.mkdir()
    for name in BUILT_FROM:
        copy = shutil.copytree if (PROJECT / name).is_dir() else shutil.copy
        copy(PROJECT / name, project / name)
    return build(project, folder / "wheel", "wheel")


def test_a_wheel_carries_the_notebooks_and_what_they_read(wheel: Path) -> None:
    carried = set(contents(wheel))
    for folder, place in {"notebooks": "notebooks", **{f"data/{name}": name for name in (*RECORDS, "texts")}}.items():
        found = [path for path in (PROJECT / folder).rglob("*") if path.is_file() and ".ipynb_checkpoints" not in path.parts]
        assert found
        assert {f"moa_lab/_data/{place}/{path.relative_to(PROJECT / folder).as_posix()}" for path in found} <= carried
    assert {"moa_lab/report/desk/desk.js", "moa_lab/report/desk/desk.css"} <= carried
    assert wheel.stat().st_size < 12e6, "PyPI's files are fetched often: look at what has grown"


def test_the_sdist_builds_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    project = wheel.parents[1] / "project"
    with tarfile.open(build(project, tmp_path / "sdist", "sdist")) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert contents(build(unpacked, tmp_path / "again", "wheel")) == contents(wheel)


def test_an_installed_wheel_lays_its_notebooks_out_in_the_users_folder(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (tmp_path / "work").mkdir()
    plain = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", LAY_OUT, str(tmp_path / "site")],
        cwd=tmp_path / "work", env=plain, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    file, texts, told = done.stdout.splitlines()
    mine = tmp_path / "work" / "moa-lab-notebooks"
    assert file == str(tmp_path / "site" / "moa_lab" / "__init__.py")
    assert texts == "20"
    assert told.startswith(f"notebooks are in {mine / 'notebooks'}, ")
    assert (mine / "notebooks" / "00_tour.ipynb").read_bytes() == (PROJECT / "notebooks" / "00_tour.ipynb").read_bytes()
    assert (mine / "data" / "runs" / "demo" / "profile.safetensors").is_file()
