"""Start JupyterLab on the notebooks, reachable from this machine only, with the settings that they need."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

from moa_lab.models import cache_folder
from moa_lab.shipped import notebooks_folder
from moa_lab.workbench.folder import FIRST

RUN_VARIABLE = "MOA_LAB_RUN"

# Windowed notebooks remove figures from the page and lose them; news would cover what a reader sees first.
SETTINGS = {
    "@jupyterlab/notebook-extension/tracker.jupyterlab-settings": {"windowingMode": "defer"},
    "@jupyterlab/apputils-extension/notification.jupyterlab-settings": {"fetchNews": "false", "checkForUpdates": False},
}


def check_installed() -> None:
    """Raise ValueError where JupyterLab is not installed."""
    if importlib.util.find_spec("jupyterlab") is None:
        raise ValueError('JupyterLab is not installed: pip install "moa-lab[lab]"')


def command(port: int | None = None, browser: bool = True, notebooks: Path | None = None) -> list[str]:
    """The command line of JupyterLab, listening on the loopback interface only, with its token.

    Raises ValueError where JupyterLab or the notebooks are missing.
    """
    check_installed()
    folder = notebooks or notebooks_folder()
    if not (folder / FIRST).is_file():
        raise ValueError(f"the notebooks are not in {folder}: install moa-lab again, or take a checkout of the project")
    line = [sys.executable, "-m", "jupyterlab", "--ServerApp.ip=127.0.0.1", f"--ServerApp.root_dir={folder.parent}"]
    line.append(f"--LabApp.default_url=/lab/tree/{folder.name}/{FIRST}")
    # In a container the user is often root, which JupyterLab refuses without this option.
    root = ["--allow-root"] if getattr(os, "geteuid", lambda: 1)() == 0 else []
    return [*line, *([] if port is None else [f"--ServerApp.port={port}"]), *([] if browser else ["--no-browser"]), *root]


def environment(run: Path | None = None, settings: Path | None = None) -> dict[str, str]:
    """Environment variables for JupyterLab: its settings, which keep a user's changes, and the run to open.

    Raises ValueError for a run that is no folder.
    """
    if run is not None and not run.is_dir():
        raise ValueError(f"{run} is no folder of a run: make one with moa-lab run --out {run}")
    folder = settings or cache_folder() / "jupyterlab-settings"
    for name, values in SETTINGS.items():
        path = folder / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(values))
    more = {"JUPYTERLAB_SETTINGS_DIR": str(folder)} | ({} if run is None else {RUN_VARIABLE: str(run.resolve())})
    return {**os.environ, **more}


def launch(run: Path | None = None, port: int | None = None, browser: bool = True, notebooks: Path | None = None) -> None:
    """Replace this process by JupyterLab; does not return. Raises ValueError as `command` and `environment`."""
    line = command(port, browser, notebooks)
    os.execve(line[0], line, environment(run))
