"""Notebooks: what is committed is one full run in order, readable without JavaScript; and they still run."""

from __future__ import annotations

import base64
import re
import shutil
from pathlib import Path

import nbformat
import plotly.graph_objects as go
import pytest

from moa_lab.commands.doctor import find_chromium
from moa_lab.workbench.notebooks import PLOTLY, WIDTH, execute, mime_bundle

PROJECT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((PROJECT / "notebooks").glob("*.ipynb"))


@pytest.fixture(params=NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def path(request: pytest.FixtureRequest) -> Path:
    found: Path = request.param
    return found


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


def check_outputs(notebook: nbformat.NotebookNode) -> None:
    for output in outputs(notebook):
        assert output.output_type != "error"
        assert output.get("name") != "stderr", f"a reader would see: {output.get('text')}"
        assert not re.search(r"\d+%\|", output.get("data", {}).get("text/plain", "")), "a progress bar is for who waits"
        if PLOTLY in output.get("data", {}):
            assert "image/png" in output.data, "an interactive figure without a picture beside it"
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1)), "outputs are not those of one run in order"


def test_a_notebook_keeps_the_conventions(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size <= 2**20
    first = notebook.cells[0].source
    assert re.match(r"# .+\?\n\n> .+", first), "first the question, then the answer"
    assert "needs: " in first
    assert "What we learned" in notebook.cells[-1].source
    assert "widgets" not in notebook.metadata
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert len(cell.source.splitlines()) <= 15
    assert any("assert " in cell.source for cell in notebook.cells if cell.cell_type == "code")
    check_outputs(notebook)


def test_the_map_names_every_notebook_and_links_lead_somewhere() -> None:
    known = (PROJECT / "notebooks" / "README.md").read_text()
    assert {path.name for path in NOTEBOOKS} == set(re.findall(r"\((\S+\.ipynb)\)", known))
    for path in NOTEBOOKS:
        text = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown")
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


@pytest.mark.slow
def test_a_notebook_runs_from_first_to_last_cell(path: Path, tmp_path: Path) -> None:
    (tmp_path / "data").symlink_to(PROJECT / "data")
    (tmp_path / "notebooks").mkdir()
    check_outputs(execute(Path(shutil.copy(path, tmp_path / "notebooks"))))


def test_what_a_solver_prints_past_its_switch_is_not_kept(tmp_path: Path) -> None:
    line = "HighsMipSolverData::transformNewIntegerFeasibleSolution tmpSolver.run();"
    sources = [f"print({line!r})\nprint('found')", f"print({line!r})"]
    path = tmp_path / "noise.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources]), path)
    first, second = execute(path).cells
    assert [output.text for output in first.outputs] == ["found\n"]
    assert second.outputs == []


@pytest.mark.skipif(find_chromium() is None, reason="no Chromium on this machine")
def test_a_figure_is_shown_in_both_forms_and_its_picture_is_made_in_another_process() -> None:
    bundle = mime_bundle(go.Figure(go.Scatter(y=[1, 3, 2])))
    assert bundle[PLOTLY]["data"][0]["type"] == "scatter"
    assert bundle[PLOTLY]["config"]["showSendToCloud"] is False
    picture = base64.b64decode(bundle["image/png"])
    assert picture.startswith(b"\x89PNG")
    assert int.from_bytes(picture[16:20], "big") == WIDTH
