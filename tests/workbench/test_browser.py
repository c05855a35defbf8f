"""The workbench as people use it: a real JupyterLab in a real browser, moved, clicked, cancelled, exported."""

from __future__ import annotations

import re
import secrets
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from moa_lab.doctor import find_chromium
from moa_lab.plan import Plan
from moa_lab.workbench import launch

PROJECT = Path(__file__).resolve().parents[2]
CHROMIUM = find_chromium()
PICTURES = PROJECT / "build" / "screenshots"
RUN_MS = 240_000

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"),
    pytest.mark.timeout(900),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project folder of its own: a copy of the notebooks, the data linked."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(PROJECT / "notebooks", folder / "notebooks")
    (folder / "data").symlink_to(PROJECT / "data")
    return folder


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    """A running JupyterLab, as `moa-lab lab` starts it, but for a token that the test knows."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    line = launch.command(port, browser=False, notebooks=folder / "notebooks")
    line += ["--expose-app-in-browser", f"--IdentityProvider.token={token}", "--allow-root"]
    log = (folder / "lab.log").open("w")
    lab = subprocess.Popen(line, env=launch.environment(settings=folder / "settings"), stdout=log, stderr=subprocess.STDOUT)
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
        yield f"http://127.0.0.1:{port}/lab/tree/notebooks/NAME?token={token}"
    finally:
        lab.terminate()
        lab.wait(20)
        log.close()


class Page:
    """A notebook that was run from first to last cell, and what the console said."""

    def __init__(self, page: object) -> None:
        from playwright.sync_api import Page as Browsed

        assert isinstance(page, Browsed)
        self.page, self.said = page, []
        page.on("console", lambda message: self.said.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.said.append(str(error)))

    def run(self, address: str) -> None:
        self.page.goto(address)
        self.page.wait_for_function("() => window.jupyterapp && window.jupyterapp.started", timeout=60_000)
        self.page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=60_000)
        # The kernel must be there before it is asked to run.
        self.page.wait_for_function("() => document.querySelector('.jp-Notebook-ExecutionIndicator, .jp-NotebookPanel-toolbar') !== null")
        self.page.wait_for_timeout(3000)
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

    def until(self, name: str, pattern: str, timeout_s: float = 20) -> str:
        """The text of the first element of class `name`, once it matches."""
        deadline = time.monotonic() + timeout_s
        while not re.search(pattern, self.text(name)):
            assert time.monotonic() < deadline, f"{name} says {self.text(name)!r}, not {pattern!r}"
            self.page.wait_for_timeout(50)
        return self.text(name)

    def picture(self, name: str) -> None:
        PICTURES.mkdir(parents=True, exist_ok=True)
        self.page.locator(".moa-bench").screenshot(path=PICTURES / f"{name}.png")


@pytest.fixture(scope="module")
def measured(address: str) -> Iterator[Page]:
    """06_apply_and_measure, run."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = Page(browser.new_page(viewport={"width": 1500, "height": 1100}))
        page.run(address.replace("NAME", "06_apply_and_measure.ipynb"))
        yield page
        browser.close()


def test_the_density_moves_spans_bytes_and_loss(measured: Page) -> None:
    before = measured.until("moa-budget-facts", "density\\s+50")
    measured.fill("moa-density-number", 0.3)
    after = measured.until("moa-budget-facts", "density\\s+30")
    assert loss(after) > loss(before)
    predicted, allocated = (re.search(rf"KV, {word}\s+([\d.]+ MiB)", after) for word in ("predicted", "allocated"))
    assert predicted
    assert allocated
    assert predicted[1] == allocated[1]
    handle = measured.page.locator(".moa-density .noUi-handle").first
    handle.focus()
    for _ in range(4):
        handle.press("ArrowRight")
    measured.until("moa-budget-facts", "density\\s+3[12]")
    measured.picture("budget")


def test_a_head_is_pinned_and_released(measured: Page) -> None:
    measured.fill("moa-layer", 12)
    measured.fill("moa-kv-head", 1)
    measured.press("Pin to full")
    measured.until("moa-pins", "layer 12, KV head 1: 2,048 tokens")
    measured.press("Release all")
    measured.until("moa-pins", "no head is pinned")


def test_an_error_is_told_in_words_and_goes_away(measured: Page) -> None:
    measured.fill("moa-density-number", 0.02)
    measured.until("moa-budget-error", "infeasible")
    measured.picture("error")
    measured.fill("moa-density-number", 0.5)
    measured.until("moa-budget-facts", "density\\s+50")
    assert measured.text("moa-budget-error").strip() == ""


def test_a_click_on_the_map_shows_that_head(measured: Page) -> None:
    measured.tab("Heads")
    measured.until("moa-head-facts", "layer 12")
    plot = measured.page.locator(".moa-influence .nsewdrag").first
    box = plot.bounding_box()
    assert box
    # The cell of layer 20, query head 4.
    plot.click(position={"x": box["width"] * 20.5 / 30, "y": box["height"] * 4.5 / 9})
    measured.until("moa-head-facts", r"layer 20, query head 4 \(KV head 1\)")
    measured.picture("heads")


def test_two_points_of_the_front_are_compared(measured: Page) -> None:
    measured.tab("Front")
    points = measured.page.locator(".moa-front .scatterlayer .point")
    assert points.count() > 1
    plot = measured.page.locator(".moa-front .nsewdrag").first.bounding_box()
    assert plot
    for index in (0, points.count() - 1):
        spot = points.nth(index).bounding_box()
        assert spot
        measured.page.mouse.move(spot["x"] + spot["width"] / 2, spot["y"] + spot["height"] / 2)
        measured.page.wait_for_timeout(200)
        measured.page.mouse.click(spot["x"] + spot["width"] / 2, spot["y"] + spot["height"] / 2)
        measured.page.wait_for_timeout(800)
    measured.until("moa-compared", r"heads that differ\s+\d+ of 90")
    measured.picture("front")


def test_a_measurement_is_cancelled_and_started_again(measured: Page) -> None:
    measured.tab("Apply & measure")
    measured.fill("moa-measure-length", 1024)
    measured.fill("moa-measure-n", 64)
    measured.press("Measure")
    measured.until("moa-measure-status", r"running .* of \d+", 120)
    measured.picture("measuring")
    measured.page.locator(".moa-measure").get_by_role("button", name="Cancel").click()
    measured.until("moa-measure-status", "cancelled", 60)
    measured.fill("moa-measure-n", 2)
    measured.press("Measure")
    measured.until("moa-measure-status", "done", 120)
    assert "retrieval" in measured.until("moa-history-box", "retrieval")
    measured.picture("measured")


def test_what_is_exported_is_a_plan(measured: Page, folder: Path) -> None:
    measured.tab("Export")
    measured.fill("moa-export-name", "from_the_browser")
    measured.press("Export")
    said = measured.until("moa-exported", "written and read back")
    plan = Plan.load(folder / "notebooks" / "exported" / "from_the_browser.json")
    assert plan.identity() in said
    measured.press("Export")
    measured.page.wait_for_selector("text=exists: allow replacing it")


def test_nothing_offers_to_upload_and_the_console_is_quiet(measured: Page) -> None:
    assert measured.page.locator("[data-title*='hare']").count() == 0
    assert measured.page.locator(".modebar-btn[data-title*='cloud' i]").count() == 0
    ours = [text for text in measured.said if "favicon" not in text]
    assert ours == []


STOPWATCH = """() => {
  const clock = window.moaClock = {began: 0, ended: 0};
  document.addEventListener('keydown', () => { clock.began = performance.now(); }, true);
  const seen = new MutationObserver(() => { clock.ended = performance.now(); });
  seen.observe(document.querySelector('.moa-spans'), {subtree: true, childList: true, attributes: true, characterData: true});
}"""
"""From a key on the slider to the last change of the figure, in the browser's own time."""
REDRAWN_MS = 150


def test_the_slider_redraws_its_figure_while_it_is_dragged(measured: Page) -> None:
    measured.tab("Budget")
    measured.page.evaluate(STOPWATCH)
    handle = measured.page.locator(".moa-density .noUi-handle").first
    handle.focus()
    times = []
    for _ in range(9):
        handle.press("ArrowRight")
        measured.page.wait_for_timeout(700)
        times.append(measured.page.evaluate("() => window.moaClock.ended - window.moaClock.began"))
    times.sort()
    print(f"from a key on the slider to the redrawn figure: median {times[4]:.0f} ms, {times[0]:.0f} to {times[-1]:.0f}")
    assert times[0] > 0, "the figure was not redrawn"
    # On a machine that does other things at the same time, the fastest tells what the code takes.
    assert times[0] <= REDRAWN_MS


def test_dark_figures_are_light_on_dark(measured: Page) -> None:
    measured.tab("Budget")
    measured.press("dark figures")
    measured.page.evaluate("() => window.jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'})")
    measured.page.wait_for_timeout(1500)
    color = measured.page.evaluate("() => getComputedStyle(document.querySelector('.moa-spans .gtitle')).fill")
    assert min(map(int, re.findall(r"\d+", color)[:3])) > 150
    measured.picture("dark")


def loss(text: str) -> float:
    found = re.search(r"predicted loss, mean\s+([\d.]+)", text)
    assert found
    return float(found[1])
