"""Makes the README's picture of the workbench: `python -m tests.workbench.picture data/pictures/workbench.png`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.workbench.lab import add_notebook, chromium, copy_project, jupyterlab, opened

WIDTH, HEIGHT = 1440, 1700
BUDGET = "from moa_lab.workbench import Workbench\nWorkbench.open('../data/runs/demo').show('Budget')"


def main(path: Path) -> None:
    """The budget of the recorded run in a window of `WIDTH` pixels, from the line that tells of a head down, as a PNG."""
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        project = copy_project(Path(folder))
        add_notebook(project, "picture", BUDGET)
        with jupyterlab(project) as address:
            page = opened(browser, address, "picture")
            page.page.set_viewport_size({"width": WIDTH, "height": HEIGHT})
            page.until("moa-budget-facts", "density")
            # Both figures have come to rest at this width.
            page.page.wait_for_timeout(5000)
            page.page.mouse.move(2, 2)
            bench, head = (page.page.locator(f".{name}").first.bounding_box() for name in ("moa-bench", "moa-head-line"))
            assert bench
            assert head
            clip = {"x": bench["x"], "y": head["y"], "width": bench["width"], "height": bench["y"] + bench["height"] - head["y"]}
            page.page.screenshot(path=path, clip=clip)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
