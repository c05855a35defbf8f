"""The trace panel as people use it, in a real JupyterLab and a real browser: why a needle was lost, and what brings it back."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moa_lab.models import is_cached
from tests.workbench.lab import IN_BROWSER, Page, add_notebook, chromium, copy_project, jupyterlab, opened

CELL = 'from moa_lab.workbench import Workbench\n\nWorkbench.open("../data/runs/demo")'
ENDED = "done|failed|cancelled"

pytestmark = [*IN_BROWSER, pytest.mark.skipif(not is_cached("smollm2"), reason="SmolLM2 is not on this machine")]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """The panel, with a needle that a plan of a quarter loses."""
    folder: Path = copy_project(tmp_path_factory.mktemp("project"))
    add_notebook(folder, "trace", CELL)
    with jupyterlab(folder) as address, chromium() as browser:
        found = opened(browser, address, "trace")
        found.tab("Budget")
        found.fill("moa-density-number", 0.25)
        found.until("moa-budget-facts", r"density\s+2[45]")
        found.tab("Trace")
        found.page.locator(".moa-trace-kind select").select_option("a needle that the plan loses")
        found.press("Answer")
        ended(found, 240)
        yield found


def ended(page: Page, timeout_s: float = 120) -> None:
    """Wait for the end of the job that was just started; what is there before that is the end of the last one."""
    for _ in range(60):
        if "running" in page.text("moa-trace-work-status"):
            break
        page.page.wait_for_timeout(50)
    page.until("moa-trace-work-status", ENDED, timeout_s)
    page.page.wait_for_timeout(700)
    page.until("moa-trace-error", r"^\s*$")


def tokens(page: Page) -> list[str]:
    found: list[str] = page.page.locator(".moa-tokens .moa-chip").all_inner_texts()
    return found


def head(page: Page) -> Any:
    return re.search(r"layer (\d+), KV head (\d+) read it ([\d,]+) tokens back", page.text("moa-trace-why"))


def test_a_lost_needle_is_explained_by_a_head_a_distance_and_a_span(page: Page) -> None:
    assert "▲" in "".join(tokens(page))
    assert head(page)
    assert re.search(r"keeps a span of [\d,]+ tokens, which ends [\d,]+ tokens short of it", page.text("moa-trace-why"))
    layer, kv_head, back = head(page).groups()
    first = page.page.locator(".moa-share .moa-chip").first.inner_text().split()
    assert (first[0], first[1], first[4]) == (layer, kv_head, back)
    assert page.page.locator(".moa-text .hidden").count() >= 1
    page.picture("trace")


def test_a_click_on_a_token_shows_its_heads_and_a_click_on_a_head_its_text(page: Page) -> None:
    before = page.text("moa-share")
    page.page.locator(".moa-tokens .moa-chip").nth(1).click()
    ended(page)
    page.at_last(lambda: page.text("moa-share") != before)
    row = page.page.locator(".moa-share .moa-chip").last
    layer, kv_head = row.inner_text().split()[:2]
    row.click()
    page.at_last(lambda: page.page.locator(f"text=What layer {layer}, KV head {kv_head} read").count() == 1)
    page.page.locator(".moa-tokens .moa-chip").last.click()
    ended(page)


def test_the_head_under_the_pointer_is_linked_between_list_map_and_the_line_above(page: Page) -> None:
    page.page.mouse.move(5, 5)
    page.until("moa-head-line", "selected: Layer")
    marked = page.page.locator(".moa-token-map .shapelayer path").count()
    row = page.page.locator(".moa-share .moa-chip").nth(2)
    layer, kv_head = row.inner_text().split()[:2]
    row.hover()
    page.until("moa-head-line", f"under the pointer: Layer {layer}, KV head {kv_head}[:;. ]")
    page.until("moa-trace-where", f"What layer {layer}, KV head {kv_head} read")
    page.page.wait_for_timeout(300)
    assert page.page.locator(".moa-token-map .shapelayer path").count() == marked + 1
    page.picture("trace_pointed")
    page.page.mouse.move(5, 5)
    page.until("moa-head-line", "selected: Layer")
    plot = page.page.locator(".moa-token-map .nsewdrag").bounding_box()
    assert plot
    place = (plot["x"] + plot["width"] * (int(layer) + 0.5) / 30, plot["y"] + plot["height"] * (int(kv_head) + 0.5) / 3)
    page.page.mouse.move(*place, steps=4)
    page.until("moa-head-line", f"under the pointer: Layer {layer}, KV head {kv_head}[:;. ]")
    assert page.page.locator(".moa-share .moa-chip.pointed").inner_text().split()[:2] == [layer, kv_head]
    page.page.mouse.move(5, 5)
    page.until("moa-head-line", "selected: Layer")


def test_room_for_the_head_changes_the_answer_and_undo_takes_it_back(page: Page) -> None:
    last = page.page.locator(".moa-tokens .moa-chip", has_text="▲")
    last.click()
    ended(page)
    lost = tokens(page)
    layer, kv_head, _ = head(page).groups()
    page.press("Give that head the room")
    ended(page)
    page.at_last(lambda: tokens(page) != lost)
    page.until("moa-tried", f"layer {layer}, KV head {kv_head}: room for its source")
    page.picture("trace_room")
    page.tab("Budget")
    page.until("moa-pins", f"layer {layer}, KV head {kv_head}:")
    page.tab("Trace")
    page.press("Undo")
    ended(page)
    page.at_last(lambda: tokens(page) == lost)
    page.press("Redo")
    ended(page)
    page.page.locator(".moa-tried .moa-chip").last.click()
    ended(page)
    page.at_last(lambda: tokens(page) == lost)


def test_room_is_given_until_the_answer_is_back(page: Page) -> None:
    page.press("Give room until the answer is back")
    ended(page, 300)
    page.at_last(lambda: "▲" not in "".join(tokens(page)))
    assert page.page.locator(".moa-tried .moa-chip.selected", has_text="none").count() == 1
    page.picture("trace_back")


def test_a_layer_is_restored_and_a_head_is_cut(page: Page) -> None:
    plans = page.page.locator(".moa-tried .moa-chip").count()
    page.page.locator(".moa-what-if-scope select").select_option("its whole layer")
    page.press("Restore")
    ended(page)
    page.at_last(lambda: page.page.locator(".moa-tried .moa-chip").count() == plans + 1)
    page.page.locator(".moa-what-if-scope select").select_option("this head")
    page.press("Cut")
    ended(page)
    page.at_last(lambda: page.page.locator(".moa-tried .moa-chip").count() == plans + 2)


def test_a_prompt_of_ones_own_is_traced_and_can_be_cancelled(page: Page) -> None:
    page.page.locator(".moa-trace-kind select").select_option("your own prompt")
    page.page.locator(".moa-trace-prompt textarea").fill("Who speaks in this text, and to whom?")
    page.press("Answer")
    page.until("moa-trace-work-status", "running")
    page.page.locator(".moa-trace-work").get_by_role("button", name="Cancel").click()
    page.until("moa-trace-work-status", "cancelled")
    page.press("Answer")
    ended(page, 240)
    assert len(tokens(page)) > 3
    page.picture("trace_prompt")


def test_nothing_is_wider_than_the_panel_and_the_console_is_quiet(page: Page) -> None:
    for width in (1280, 1920):
        page.page.set_viewport_size({"width": width, "height": 1800})
        page.page.wait_for_timeout(700)
        wide = page.page.evaluate(
            "() => { const box = document.querySelector('.moa-bench .widget-tab-contents'); return [box.scrollWidth, box.clientWidth]; }"
        )
        assert wide[0] <= wide[1], width
        page.picture(f"trace_{width}")
    page.page.evaluate("() => window.jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'})")
    page.page.wait_for_timeout(1500)
    page.picture("trace_dark")
    assert [text for text in page.said if "favicon" not in text] == []
