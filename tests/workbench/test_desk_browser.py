"""The desk in a real browser: heads by keys and pointer, narrow and wide screens, light and dark."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from moa_lab.records import InfluenceProfile
from tests.workbench.lab import CHROMIUM, IN_BROWSER, PROJECT, Page, add_notebook, chromium, copy_project, jupyterlab, opened

DEMO = PROJECT / "data" / "runs" / "demo"
TABS = ("Heads", "Budget", "Front", "Which one", "Runs", "Trace", "Apply & measure", "Export")

pytestmark = IN_BROWSER


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """The recorded run, opened as the tour does."""
    folder = copy_project(tmp_path_factory.mktemp("project"))
    add_notebook(folder, "desk", "from moa_lab.workbench import Workbench\nWorkbench.open('../data/runs/demo')")
    scores = np.random.default_rng(0).random((30, 3))
    np.savetxt(folder / "notebooks" / "full_attention_heads.tsv", scores, delimiter="\t")
    with jupyterlab(folder) as address, chromium() as browser:
        yield opened(browser, address, "desk")


def cell(page: Page, name: str, column: float, row: float, columns: int, rows: int) -> tuple[float, float]:
    """Where a cell of a map is on the screen."""
    plot = page.page.locator(f".{name} .nsewdrag").first
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    assert box
    return box["x"] + box["width"] * (column + 0.5) / columns, box["y"] + box["height"] * (row + 0.5) / rows


def shapes(page: Page, name: str) -> int:
    return page.page.locator(f".{name} .shapelayer path").count()


def test_arrows_move_the_selected_head_and_space_pins_it_and_the_notebook_stays_where_it_is(page: Page) -> None:
    page.page.mouse.click(*cell(page, "moa-influence", 20, 4, 30, 9))
    page.until("moa-head-facts", r"layer 20, query head 4 \(KV head 1\)")
    page.page.mouse.move(5, 5)
    for key, head in (
        ("ArrowRight", "layer 21, query head 4"),
        ("ArrowDown", "layer 21, query head 5"),
        ("ArrowLeft", "layer 20, query head 5"),
    ):
        page.page.keyboard.press(key)
        page.until("moa-head-facts", head)
    page.page.keyboard.press(" ")
    page.until("moa-head-line", r"selected: Layer 20, KV head 1: .* pinned\.")
    page.tab("Budget")
    page.until("moa-pins", "layer 20, KV head 1")
    page.page.locator(".moa-spans").focus()
    page.page.keyboard.press("ArrowUp")
    page.until("moa-head-line", "Layer 20, KV head 0")
    page.page.keyboard.press("ArrowDown")
    page.page.keyboard.press(" ")
    page.until("moa-pins", "no head is pinned")
    assert page.page.evaluate("() => document.querySelectorAll('.jp-Notebook .jp-Cell.jp-mod-active').length") == 1
    page.tab("Heads")


def test_the_head_under_the_pointer_is_marked_in_the_other_figure_and_told_above_all_panels(page: Page) -> None:
    before = shapes(page, "moa-influence")
    page.page.mouse.move(*cell(page, "moa-influence", 7, 3, 30, 9), steps=4)
    page.until("moa-head-line", "under the pointer: Layer 7, KV head 1")
    page.page.wait_for_timeout(300)
    assert (shapes(page, "moa-ranks"), shapes(page, "moa-influence")) == (1, before)
    page.page.mouse.move(5, 5)
    page.until("moa-head-line", "selected: Layer 20")
    page.page.wait_for_timeout(300)
    assert shapes(page, "moa-ranks") == 0
    page.page.locator(".moa-ranks .scatterlayer .point").nth(2).hover(force=True)
    page.until("moa-head-line", "under the pointer")
    page.page.wait_for_timeout(300)
    assert shapes(page, "moa-influence") == before + 1
    page.page.mouse.move(5, 5)
    page.until("moa-head-line", "selected: Layer 20")


def test_kinds_and_published_scores_are_shown_beside_ours(page: Page) -> None:
    page.page.locator(".moa-heads-view select").select_option("kind of head")
    page.until("moa-influence", "Kinds of heads: questions, 1,536 tokens")
    page.page.mouse.click(*cell(page, "moa-influence", 18, 2, 30, 3))
    page.until("moa-head-line", "Layer 18, KV head 2: retrieval in 2")
    page.until("moa-biography-table", r"questions\s+1,536\s+retrieval")
    page.picture("kinds")
    page.fill("moa-scores-path", "full_attention_heads.tsv")
    page.press("Load scores")
    page.until("moa-kind-counts", r"by DuoAttention, notebooks: [+-]0\.\d\d")
    page.page.locator(".moa-heads-view select").select_option("others' scores")
    page.until("moa-influence", "DuoAttention: notebooks")
    page.picture("scores")
    page.page.locator(".moa-heads-view select").select_option("influence")
    layers = InfluenceProfile.load(DEMO / "profile.safetensors").geometry.layers
    page.until("moa-influence", "Long-range influence")
    assert layers == 30


def test_a_density_that_is_dragged_to_answers_with_its_plan_and_bytes(page: Page) -> None:
    page.tab("Budget")
    before = page.text("moa-budget-facts")
    handle = page.page.locator(".moa-density .noUi-handle").first.bounding_box()
    track = page.page.locator(".moa-density .noUi-base").first.bounding_box()
    assert handle
    assert track
    x, y = handle["x"] + handle["width"] / 2, handle["y"] + handle["height"] / 2
    page.page.mouse.move(x, y)
    page.page.mouse.down()
    for step in range(1, 9):
        page.page.mouse.move(x - step * track["width"] / 40, y)
        page.page.wait_for_timeout(60)
    page.page.mouse.up()
    # A fifth of the track to the left of half: about .33 of .12 to 1.
    page.until("moa-budget-facts", r"density\s+3[0-6]\.\d% of the bytes")
    assert page.text("moa-budget-facts") != before
    # A busy kernel answers the last places of the drag later.
    page.page.wait_for_timeout(2000)
    page.fill("moa-density-number", 0.5)
    page.until("moa-budget-facts", r"density\s+(49|50)")
    page.tab("Heads")


def figures(page: Page) -> list[tuple[float, str]]:
    """Of every figure on the panel in front: its right edge in pixels, and the ink of its title."""
    found: list[tuple[float, str]] = page.page.evaluate(
        "() => [...document.querySelectorAll('.moa-bench .js-plotly-plot')].filter((each) => each.offsetParent)"
        ".map((each) => [each.getBoundingClientRect().right, getComputedStyle(each.querySelector('.gtitle') ?? each).fill])"
    )
    return found


def follows(page: Page, dark: bool) -> bool:
    """Whether all titles are light on a dark page, or dark on a light one."""
    inks = [min(map(int, ink.removeprefix("rgb(").rstrip(")").split(","))) for _, ink in figures(page) if ink.startswith("rgb(")]
    return all((ink > 150) == dark for ink in inks)


def scrolled(page: Page) -> list[str]:
    """Boxes of the panel in front that scroll sideways, but for tables, which may."""
    found: list[str] = page.page.evaluate(
        """() => [...document.querySelectorAll('.moa-bench .widget-tab-contents *')].filter((box) => box.clientWidth > 0
            && box.scrollWidth > box.clientWidth + 1 && ['auto', 'scroll'].includes(getComputedStyle(box).overflowX)
            && !box.matches('.moa-history, pre')).map((box) => String(box.className))"""
    )
    return found


def overlapping(page: Page) -> list[str]:
    """Titles of figures that lie over their legend or under their buttons."""
    found: list[str] = page.page.evaluate(
        """() => [...document.querySelectorAll('.moa-bench .js-plotly-plot')].filter((plot) => plot.offsetParent).flatMap((plot) => {
            const title = plot.querySelector('.gtitle');
            const others = [...plot.querySelectorAll('.legend, .modebar-group')];
            if (!title || !title.textContent) return [];
            const own = title.getBoundingClientRect();
            return others.map((other) => other.getBoundingClientRect()).filter((other) => other.width > 0 && own.left < other.right - 2
                && other.left < own.right - 2 && own.top < other.bottom - 2 && other.top < own.bottom - 4).map(() => title.textContent);
        })"""
    )
    return found


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 1920, 2560])
def test_nothing_is_wider_than_its_screen_and_figures_follow_the_theme(page: Page, width: int, dark: bool) -> None:
    theme = "JupyterLab Dark" if dark else "JupyterLab Light"
    page.page.evaluate(f"() => window.jupyterapp.commands.execute('apputils:change-theme', {{theme: '{theme}'}})")
    page.page.set_viewport_size({"width": width, "height": 1800})
    page.page.wait_for_timeout(1200)
    for title in TABS:
        page.tab(title)
        wide, room = page.page.evaluate(
            "() => { const box = document.querySelector('.moa-bench .widget-tab-contents'); return [box.scrollWidth, box.clientWidth]; }"
        )
        assert wide <= room, title
        assert scrolled(page) == [], title
        page.at_last(lambda: follows(page, dark))
        assert all(right <= width for right, _ in figures(page)), title
        assert overlapping(page) == [], title
        page.picture(f"{'dark' if dark else 'light'}_{width}_{title.split()[0].lower()}")
    page.tab("Heads")


def test_the_budget_leaves_no_width_unused(page: Page) -> None:
    page.tab("Budget")
    names = ("moa-spans", "moa-measured-curve", "moa-budget-facts")
    for width in (1280, 1440, 1920, 2560):
        page.page.set_viewport_size({"width": width, "height": 1800})
        page.page.wait_for_timeout(1500)
        panel = page.page.locator(".moa-bench .widget-tab-contents").bounding_box()
        map_, curve, facts = (page.page.locator(f".{name}").first.bounding_box() for name in names)
        assert panel
        assert map_
        assert curve
        assert facts
        assert map_["x"] + map_["width"] <= curve["x"] < map_["x"] + map_["width"] + 40, "side by side"
        right = max(box["x"] + box["width"] for box in (curve, facts))
        assert 0 <= panel["x"] + panel["width"] - right < 60, f"{width}: white space on the right"
        drawn = page.page.locator(".moa-measured-curve .main-svg").first.bounding_box()
        assert drawn
        assert drawn["width"] == curve["width"]
        if width < 1900:
            assert abs(facts["x"] - map_["x"]) < 4
            assert 0 <= facts["y"] - (curve["y"] + curve["height"]) < 160, "what is kept and lost is right below the figures"
        else:
            assert curve["x"] + curve["width"] <= facts["x"]
            assert abs(facts["y"] - map_["y"]) < 60
    page.tab("Heads")


def test_a_plan_is_recommended_at_once_and_narrowed_by_the_sequences_that_a_gpu_must_hold(page: Page) -> None:
    page.page.set_viewport_size({"width": 1500, "height": 1800})
    page.tab("Which one")
    page.until("moa-advice", "Take moa")
    page.page.locator(".moa-advice-gpu select").select_option(label="RTX 4090 24GB")
    page.fill("moa-advice-tokens", 32768)
    page.until("moa-advice", "at 32,768 nobody knows what it loses")
    page.fill("moa-sequences", 100_000)
    page.page.locator(".moa-want-sequences input").check()
    page.until("moa-advice", "No measured plan meets the wish.*100,000 asked")
    page.fill("moa-sequences", 40)
    page.until("moa-advice", r"Take moa.*sequences of 32,768 tokens at once on RTX 4090 24GB, 40 asked")
    page.picture("advice_sequences")
    page.page.locator(".moa-want-sequences input").uncheck()
    page.tab("Heads")


def test_the_console_is_quiet(page: Page) -> None:
    assert [text for text in page.said if "favicon" not in text] == []
    assert Path(CHROMIUM or "").exists()
