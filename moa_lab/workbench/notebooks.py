"""Notebooks: figures that are seen with and without JavaScript, and running them from first to last cell."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import nbformat
import plotly.graph_objects as go
from nbclient import NotebookClient

from moa_lab.figures import CONFIG

TIMEOUT_S = 600
WIDGET = "application/vnd.jupyter.widget-view+json"
RENDERER = "plotly_mimetype+png"


def show(fig: go.Figure) -> None:
    """Show a figure in a notebook: interactive in JupyterLab, a still picture where there is no JavaScript."""
    fig.show(renderer=RENDERER, config={**CONFIG}, width=860)


def execute(path: Path) -> nbformat.NotebookNode:
    """Run a notebook in order, in its folder, in a new kernel, and return it with its outputs and without widget state.

    Raises nbclient's CellExecutionError at the first cell that fails.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=TIMEOUT_S, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}})
    # Progress bars are for who waits, not for who reads.
    client.execute(env={**os.environ, "TQDM_DISABLE": "1"})
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        # When a cell ran is no result: it would change with every run.
        cell.metadata.pop("execution", None)
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if not _is_progress(output)]
    return notebook


def _is_progress(output: nbformat.NotebookNode) -> bool:
    """A progress bar that some library showed as a widget."""
    data = output.get("data", {})
    return WIDGET in data and re.search(r"\d+%\|", data.get("text/plain", "")) is not None


def main(paths: list[str]) -> None:
    """Run notebooks and write them back."""
    for name in paths:
        print(name, flush=True)
        nbformat.write(execute(Path(name)), name)


if __name__ == "__main__":
    main(sys.argv[1:])
