"""A real JupyterLab in a real browser: a project folder of its own, a server, and a notebook that was run."""

from __future__ import annotations

import re
import secrets
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
import pytest

from moa_lab.commands.doctor import find_chromium
from moa_lab.workbench import launch
from tests.workbench.hands import PATIENCE_S, at_last

PROJECT = Path(__file__).resolve().parents[2]
CHROMIUM = find_chromium()
PICTURES = PROJECT / "build" / "screenshots"
RUN_MS = 240_000
IN_BROWSER = [
    pytest.mark.slow,
    pytest.mark.alone,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"),
    pytest.mark.timeout(900),
]
"""Marks of tests that drive a browser."""


def copy_project(folder: Path) -> Path:
    """A project folder of its own: a copy of the notebooks, the data linked."""
    shutil.copytree(PROJECT / "notebooks", folder / "notebooks")
    (folder / "data").symlink_to(PROJECT / "data")
    return folder


def add_notebook(folder: Path, name: str, source: str) -> None:
    """One more notebook, of one cell."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, folder / "notebooks" / f"{name}.ipynb")


@contextmanager
def jupyterlab(folder: Path) -> Iterator[str]:
    """A running JupyterLab on the project in `folder`, as `moa-lab lab` starts it, but for a token that the test knows: its address, with
    STEM for the notebook's name."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    line = launch.command(port, browser=False, notebooks=folder / "notebooks")
    line += ["--expose-app-in-browser", f"--IdentityProvider.token={token}"]
    log = (folder / "lab.log").open("w")
    env = {**launch.environment(settings=folder / "settings"), "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces")}
    lab = subprocess.Popen(line, env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 90
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api?token={token}", timeout=2)
                break
            except OSError as error:
                if time.monotonic() > deadline or lab.poll() is not None:
                    raise AssertionError((folder / "lab.log").read_text()[-2000:]) from error
                time.sleep(0.5)
        # A workspace for each notebook: it is the only one that is open.
        yield f"http://127.0.0.1:{port}/lab/workspaces/STEM/tree/notebooks/STEM.ipynb?token={token}"
    finally:
        lab.terminate()
        lab.wait(20)
        log.close()


@contextmanager
def chromium() -> Iterator[Any]:
    """Playwright's browser, without a window; one at a time."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(browser: Any, address: str, name: str) -> Page:
    """The notebook `name` (its file without .ipynb) in a new tab, run from first to last cell."""
    page = Page(browser.new_page(viewport={"width": 1500, "height": 1800}))
    page.run(address.replace("STEM", name))
    return page


class Page:
    """A notebook, and what the console said."""

    def __init__(self, page: object) -> None:
        from playwright.sync_api import Page as Browsed

        assert isinstance(page, Browsed)
        self.page, self.said = page, []
        page.on("console", lambda message: self.said.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.said.append(str(error)))

    def open(self, address: str) -> None:
        """Show a notebook, and wait for its kernel."""
        self.page.goto(address)
        self.page.wait_for_function("() => window.jupyterapp && window.jupyterapp.started", timeout=60_000)
        self.page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=60_000)
        # The kernel must be there before it is asked to run.
        self.page.wait_for_function("() => document.querySelector('.jp-Notebook-ExecutionIndicator, .jp-NotebookPanel-toolbar') !== null")
        self.page.wait_for_timeout(3000)

    def run(self, address: str) -> None:
        """Show a notebook, run it from first to last cell, and wait for its workbench."""
        self.open(address)
        self.page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-all-cells')")
        self.page.wait_for_selector(".moa-bench, [data-mime-type='application/vnd.jupyter.stderr']", timeout=RUN_MS)
        failed = self.page.locator("[data-mime-type='application/vnd.jupyter.stderr']")
        assert failed.count() == 0, failed.first.inner_text()
        self.page.wait_for_timeout(2000)
        self.page.locator(".moa-bench").scroll_into_view_if_needed()

    def tab(self, title: str) -> None:
        self.page.locator(".moa-bench .lm-TabBar-tab", has_text=title).first.click()
        self.page.wait_for_timeout(700)

    def text(self, name: str) -> str:
        return self.page.locator(f".{name}").first.inner_text()

    def fill(self, name: str, value: object) -> None:
        box = self.page.locator(f".{name} input").first
        box.fill(str(value))
        box.press("Enter")

    def press(self, label: str) -> None:
        self.page.get_by_role("button", name=label, exact=True).first.click()

    def at_last(self, holds: Callable[[], object]) -> None:
        """Wait until `holds()`, as long as a busy machine may take."""
        at_last(holds, pause=lambda: self.page.wait_for_timeout(50))

    def until(self, name: str, pattern: str, timeout_s: float = PATIENCE_S) -> str:
        """The text of the first element of class `name`, once it matches."""
        deadline = time.monotonic() + timeout_s
        # The text that matched: the next one may be on its way.
        while not re.search(pattern, told := self.text(name)):
            assert time.monotonic() < deadline, f"{name} says {told!r}, not {pattern!r}"
            self.page.wait_for_timeout(50)
        return told

    def picture(self, name: str) -> None:
        PICTURES.mkdir(parents=True, exist_ok=True)
        self.page.locator(".moa-bench").screenshot(path=PICTURES / f"{name}.png")
