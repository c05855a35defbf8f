"""From a key on the density slider to the redrawn figure, in the browser's own time: W1 the embedded model, W2 as many heads as a 7B model.

`python -m tests.workbench.slider data/benchmarks/slider.json` measures both and writes the record; the machine should do nothing else.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

from moa_lab.bench.lifelike import SEED, lifelike_table
from moa_lab.bench.record import GOALS, BenchRecord, BenchRow, judged
from moa_lab.provenance import provenance
from moa_lab.records import LossTable
from moa_lab.text import aligned
from tests.workbench.lab import PROJECT, Page, add_notebook, chromium, copy_project, jupyterlab, opened

LIMIT_MS = {"W1": 150.0, "W2": 300.0}
MOVES = 15
PAUSE_MS = 900
PLAIN_PYTHON_S = 0.053
"""Seconds that the loop of `slowness` takes on the machine whose times `LIMIT_MS` was set by."""
NOTEBOOK = """from moa_lab.workbench import Workbench
Workbench.open({run!r}).show("Budget")"""

STOPWATCH = """() => {
  const clock = window.moaClock = {began: 0, ended: 0};
  document.addEventListener('keydown', () => { clock.began = performance.now(); clock.ended = 0; }, true);
  const seen = new MutationObserver(() => { clock.ended = performance.now(); });
  seen.observe(document.querySelector('.moa-spans'), {subtree: true, childList: true, attributes: true, characterData: true});
}"""


def slider_ms(page: Page, moves: int = MOVES) -> list[float]:
    """Milliseconds from a key on the slider to the last change of the figure, a move each; negative where nothing was redrawn."""
    page.page.evaluate(STOPWATCH)
    handle = page.page.locator(".moa-density .noUi-handle").first
    handle.focus()
    times = []
    for _ in range(moves):
        handle.press("ArrowRight")
        page.page.wait_for_timeout(PAUSE_MS)
        times.append(page.page.evaluate("() => window.moaClock.ended - window.moaClock.began"))
    return times


def slowness() -> float:
    """How many times longer than the machine of the limits this one takes for plain Python, at its fastest; 1 where it is faster."""
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        sum(number * number % 7 for number in range(1_000_000))
        seconds.append(time.perf_counter() - began)
    return max(1.0, min(seconds) / PLAIN_PYTHON_S)


def run_of(row: str, folder: Path) -> Path:
    """The run that a row is about: the recorded one, or a drawn table of 32 x 32 heads, which is written to `folder`."""
    if row == "W1":
        return PROJECT / "data" / "runs" / "demo"
    lifelike_table().save(folder / "large" / "table.safetensors")
    return folder / "large"


def slider_row(row: str, run: Path, page: Page, moves: int = MOVES) -> BenchRow:
    """Measure one row on a page that shows the budget of `run`."""
    table = LossTable.load(run / "table.safetensors")
    times = slider_ms(page, moves)
    shape = {
        "asked": "slider", "model": "SmolLM2-135M" if row == "W1" else "drawn", "layers": table.geometry.layers,
        "kv_heads": table.geometry.kv_heads, "rules": len(table.rules), "goal": "mean", "density": None,
    }  # fmt: skip
    limit = LIMIT_MS[row]
    detail = {"moves": [round(ms, 1) for ms in times], "fastest_ms": min(times), "slowest_ms": max(times), "densities": moves}
    return judged(row, GOALS[row], shape, median(times), limit, "limit", "ms", min(times) > 0, detail)


def measure() -> BenchRecord:
    """Both rows, each in a JupyterLab of its own."""
    rows, busy = [], os.getloadavg()[0]
    for row in LIMIT_MS:
        with tempfile.TemporaryDirectory() as name:
            folder = copy_project(Path(name))
            run = run_of(row, folder)
            add_notebook(folder, "slider", NOTEBOOK.format(run=str(run)))
            with jupyterlab(folder) as address, chromium() as browser:
                rows.append(slider_row(row, run, opened(browser, address, "slider")))
    settings = {
        "device": f"{platform.machine()}, CPU", "cpus": os.cpu_count(), "browser": "Chromium, without a window",
        "timer": "performance.now, from keydown to the last change below the figure", "load_average_before": round(busy, 2), "seed": SEED,
    }  # fmt: skip
    return BenchRecord(tuple(rows), settings, provenance(seed=SEED))


def main(path: str) -> None:
    """Measure, write the record, show it."""
    record = measure()
    command = f"python -m tests.workbench.slider {path}"
    record = replace(record, provenance=replace(record.provenance, command=command))
    record.save(path)
    rows = [[row.id, f"{row.ours:.0f} ms", f"limit {row.peer:.0f} ms", "meets" if row.meets else "does not meet"] for row in record]
    print("\n".join(aligned(rows)))


if __name__ == "__main__":
    main(*sys.argv[1:])
