"""Notebooks: show figures with and without JavaScript, and run notebooks from first to last cell."""

from __future__ import annotations

import base64
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import nbformat
import plotly.graph_objects as go
import plotly.io as pio
from nbclient import NotebookClient

from moa_lab.figures import CONFIG

TIMEOUT_S = 600
WIDGET = "application/vnd.jupyter.widget-view+json"
PLOTLY = "application/vnd.plotly.v1+json"
SOLVER_LINES = re.compile(r"^Highs\w+::.*\n", re.MULTILINE)
"""What HiGHS prints past its own switch for that."""
WIDTH = 860


def show(fig: go.Figure) -> None:
    """Show a figure in a notebook: interactive in JupyterLab, a still picture where there is no JavaScript."""
    # Imported here: IPython is there in notebooks only.
    from IPython.display import display

    display(mime_bundle(fig), raw=True)


def mime_bundle(fig: go.Figure) -> dict[str, Any]:
    """A figure in both forms, by MIME type. Raises what kaleido raises where it finds no browser."""
    picture = _painter().submit(picture_of, fig.to_json()).result()
    return {PLOTLY: {**json.loads(fig.to_json()), "config": {**CONFIG}}, "image/png": base64.b64encode(picture).decode("ascii")}


def picture_of(figure: str) -> bytes:
    """The PNG of a figure that is given as JSON."""
    picture: bytes = pio.from_json(figure).to_image("png", width=WIDTH)
    # The first picture starts a browser of its own, which reports errors. One that stays open is fifteen times as fast, but would wait
    # forever where there is no browser.
    _stay_open()
    return picture


@cache
def _stay_open() -> None:
    import kaleido

    kaleido.start_sync_server(silence_warnings=True)
    Finalize(None, kaleido.stop_sync_server, kwargs={"silence_warnings": True}, exitpriority=10)


@cache
def _painter() -> ProcessPoolExecutor:
    """A process for pictures: when the browser ends, it closes file descriptors that the notebook kernel's sockets may have reused."""
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=_without_words)


def _without_words() -> None:
    # The browser driver's messages at its end would show in the notebook; errors are raised with the picture.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def refused(ask: Callable[[], object]) -> None:
    """Show in a notebook why something is refused. Raises AssertionError where it is not."""
    try:
        ask()
    except ValueError as error:
        from IPython.display import display

        display({"text/plain": str(error)}, raw=True)
        return
    raise AssertionError("it was not refused")


def execute(path: Path) -> nbformat.NotebookNode:
    """Run a notebook in order, in its folder, in a new kernel, and return it with its outputs and without widget state.

    Raises nbclient's CellExecutionError at the first cell that fails.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=TIMEOUT_S, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}})
    # No progress bars in stored notebooks.
    client.execute(env={**os.environ, "TQDM_DISABLE": "1"})
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        # Times of execution would change with every run.
        cell.metadata.pop("execution", None)
        if "outputs" in cell:
            for output in cell.outputs:
                if output.output_type == "stream":
                    output.text = SOLVER_LINES.sub("", output.text)
            cell.outputs = [output for output in cell.outputs if not _is_progress(output) and output.get("text") != ""]
    return notebook


def _is_progress(output: nbformat.NotebookNode) -> bool:
    """Whether an output is a progress bar that some library showed as a widget."""
    data = output.get("data", {})
    return WIDGET in data and re.search(r"\d+%\|", data.get("text/plain", "")) is not None


def main(paths: list[str]) -> None:
    """Run notebooks and write them back."""
    for name in paths:
        print(name, flush=True)
        nbformat.write(execute(Path(name)), name)


if __name__ == "__main__":
    main(sys.argv[1:])
