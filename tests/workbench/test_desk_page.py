"""The page of the whole desk: what it holds, and that it moves, opened from a file, without a kernel or a server."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import exit_code
from figure_records import SMOL, make_front, make_measurements, make_plan, make_profile

from moa_lab.bench.lifelike import lifelike_table
from moa_lab.evaluate.options import Option
from moa_lab.geometry import ModelGeometry
from moa_lab.plan import Plan, uniform_plan
from moa_lab.records import LossTable
from moa_lab.report import desk
from moa_lab.report.desk import DeskRecords, desk_page
from moa_lab.report.desk.stops import all_stops, budget_stops, predicted
from moa_lab.report.page import STYLE as PAGE_STYLE
from moa_lab.workbench.desk_page import desk_records
from moa_lab.workbench.state import State
from tests.workbench.lab import CHROMIUM, PICTURES, PROJECT, chromium
from tests.workbench.test_tracing import handle, small_plan, traced

DEMO = PROJECT / "data" / "runs" / "demo"
HOSTILE = '<script>alert(1)</script> & "½" </style>'


@pytest.fixture(scope="module")
def table() -> LossTable:
    return lifelike_table(quick=True)


def data_of(page: str) -> dict[str, Any]:
    (found,) = re.findall(r'<script type="application/json" id="desk-data">(.*?)</script>', page, flags=re.S)
    data: dict[str, Any] = json.loads(found)
    return data


def option(plan: Plan, name: str = "moa") -> Option:
    rows = make_measurements({"dense": 0.97, name: 0.9}, (1024, 2048)).rows
    return Option(plan.renamed(name), rows, "there")


def test_the_slider_has_the_best_plan_for_every_step_of_density(table: LossTable) -> None:
    stops = budget_stops(table, 0.1)
    asked = [stop.plan.search["density"] for stop in stops]
    assert asked == pytest.approx([0.1 * count for count in range(round(10 * asked[0]), 10)])
    for stop, density in zip(stops, asked, strict=True):
        assert all(density - 0.1 < stop.plan.density(n) <= density + 1e-9 for n in table.lengths)
    losses = [stop.predicted["mean"] for stop in stops]
    assert losses == sorted(losses, reverse=True)
    for step in (0.0, 0.6, float("nan")):
        with pytest.raises(ValueError, match="step must be a share"):
            budget_stops(table, step)


def test_a_plan_that_was_found_and_measured_is_one_with_all_that_is_known_of_it() -> None:
    front = make_front(count=3)
    measured = option(front.points[1].plan)
    stops = all_stops(None, front, [measured, measured], chosen=front.points[1].plan.renamed("mine"))
    assert len(stops) == 4
    (mine,) = [stop for stop in stops if stop.plan.name == "mine"]
    assert mine.predicted == front.points[1].predicted
    assert mine.rows == tuple(row for row in measured.rows if row.plan == "moa")
    assert [stop.plan.density(4096) for stop in stops] == sorted(stop.plan.density(4096) for stop in stops)
    assert stops[-1].plan.is_dense
    assert set(stops[-1].predicted.values()) == {0.0}


def test_losses_are_predicted_of_a_plan_only_where_the_table_can_tell(table: LossTable) -> None:
    plan = table.plan(np.zeros((4, 4), dtype=np.int64), "shortest")
    assert predicted(table, plan)["mean"] == pytest.approx(1.0)
    for other in (plan.with_bits(8), replace(plan, min_span=plan.min_span + 1), replace(plan, span_multiple=64), make_plan()):
        assert predicted(table, other) == {}
    assert predicted(None, plan) == {}


def test_the_page_holds_every_plans_spans_at_every_length_and_the_heads_influence() -> None:
    front, profile = make_front(count=4), make_profile(lengths=(512,), samples=1)
    data = data_of(desk_page(DeskRecords(profile, None, front, front.points[2].plan)))
    assert data["lengths"] == [1024, 2048, 4096]
    assert len(data["stops"]) == 5
    for point in front:
        stop = data["stops"][data["front"][point.plan.name]]
        codes = np.frombuffer(base64.b64decode(stop["codes"]), "<u2").reshape(SMOL.layers, SMOL.kv_heads)
        for index, n in enumerate(data["lengths"]):
            assert np.array_equal(np.array(data["spans"])[codes, index], point.plan.spans(n))
            assert stop["density"][index] == pytest.approx(point.plan.density(n))
    assert data["stops"][data["first"]]["name"] == front.points[2].plan.name
    task = data["influence"][0]
    values = np.frombuffer(base64.b64decode(task["values"]), "<f4").reshape(SMOL.layers, SMOL.kv_heads)
    far = profile.distance(task["task"], 512)[:, :, 2:].sum(axis=2).reshape(SMOL.layers, SMOL.kv_heads, -1).sum(axis=2)
    assert np.allclose(values, far, rtol=1e-5)


def test_names_from_records_cannot_become_markup() -> None:
    front = make_front(count=2)
    plan = front.points[0].plan.renamed(HOSTILE)
    page = desk_page(
        DeskRecords(make_profile(lengths=(512,), tasks=(HOSTILE,), samples=1), None, front, plan, (), (option(plan, HOSTILE),)), HOSTILE
    )
    assert "<script>alert" not in page
    assert page.count("</style>") == 1
    assert data_of(page)["stops"][0]["name"]


def test_a_page_without_plans_of_other_heads_or_too_large_for_a_mail_is_refused(monkeypatch: pytest.MonkeyPatch, table: LossTable) -> None:
    with pytest.raises(ValueError, match="none of them is there"):
        desk_page(DeskRecords(make_profile(lengths=(512,), samples=1)))
    with pytest.raises(ValueError, match="another geometry"):
        desk_page(DeskRecords(None, table, None, make_plan()))
    with pytest.raises(ValueError, match="another geometry"):
        desk_page(DeskRecords(make_profile(ModelGeometry(2, 4, 2, 16, 4096), (512,), samples=1), None, None, make_plan()))
    monkeypatch.setattr(desk, "MAX_BYTES", 1_000_000)
    with pytest.raises(ValueError, match=r"the page would have \d\.\d MB, at most 1 are allowed: take a longer step"):
        desk_page(DeskRecords(None, table))


def test_a_model_of_80_layers_and_64_heads_fits_the_page() -> None:
    large = ModelGeometry(80, 64, 64, 128, 8192)
    front = make_front(large, count=14)
    profile = make_profile(large, (512,), samples=1)
    measured = tuple(option(uniform_plan(large, density)) for density in (0.25, 0.5))
    assert len(desk_page(DeskRecords(profile, None, front, None, (), measured)).encode()) < desk.MAX_BYTES


def test_the_answer_that_was_looked_at_is_on_the_page_with_its_heads() -> None:
    tracing = traced()
    plan = small_plan(tracing.model)
    tracing.try_plan(plan, "small", handle())
    tracing.look(3, handle())
    state = State(plan=plan, n_tokens=100)
    trace = data_of(desk_page(desk_records(state, tracing, runs=[])))["trace"]
    assert len(trace["tokens"]) == 10
    assert [bool(token["why"]) for token in trace["tokens"]] == [index == 3 for index in range(10)]
    looked = trace["tokens"][3]
    assert looked["why"] == tracing.why()
    assert len(looked["heads"]) == min(8, plan.geometry.layers * plan.geometry.kv_heads)
    assert all("moa-text" in head["html"] and "<style>" not in head["html"] for head in looked["heads"])
    used = {name for head in looked["heads"] for names in re.findall(r'class="([^"]*)"', head["html"]) for name in names.split()}
    assert "replied" in used
    assert not used & set(re.findall(r"(?m)^\.([\w-]+)", PAGE_STYLE)), "a class that the page has for something else"
    assert data_of(desk_page(desk_records(state, None, runs=[])))["trace"] is None


def test_the_command_writes_one_file_and_writes_over_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(monkeypatch, "page", DEMO, "--out", tmp_path / "desk.html", "--step", "0.25") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["desk.html"]
    assert Plan.load(DEMO / "plan.json").identity() in (tmp_path / "desk.html").read_text(encoding="utf-8")
    assert exit_code(monkeypatch, "page", DEMO, "--out", tmp_path / "desk.html") == 2
    assert "pass --force to replace it" in capsys.readouterr().err


class Desk:
    """A desk page that was opened from its file, and what the console said."""

    def __init__(self, browser: Any, path: Path, width: int, scheme: str) -> None:
        self.tab = browser.new_page(viewport={"width": width, "height": 1000}, color_scheme=scheme)
        self.said: list[str] = []
        self.asked: list[str] = []
        self.tab.on("console", lambda message: self.said.append(message.text))
        self.tab.on("pageerror", lambda error: self.said.append(str(error)))
        self.tab.on("request", lambda request: self.asked.append(request.url))
        self.tab.goto(path.as_uri())
        self.tab.wait_for_selector("html[data-drawn]", timeout=60_000)

    def map(self, name: str = "spans") -> np.ndarray:
        """What plotly draws on the map, in tokens or nats: (rows, layers)."""
        self.tab.wait_for_timeout(250)
        return np.array(self.tab.eval_on_selector(f"[data-name={name}]", "box => box.data[0].z.map(row => [...row])"))

    def ring(self, name: str = "spans") -> tuple[int, int]:
        layer, row = self.tab.eval_on_selector(f"[data-name={name}]", "box => [box.data[1].x[0], box.data[1].y[0]]")
        return layer, row

    def slide(self, steps: int) -> None:
        self.tab.locator("#density").focus()
        for _ in range(abs(steps)):
            self.tab.keyboard.press("ArrowRight" if steps > 0 else "ArrowLeft")

    def densities(self) -> list[float]:
        """What the plans keep, in percent, from the left end of the slider to its right end."""
        told = self.tab.evaluate(
            """() => { const slider = document.getElementById("density"); return [...Array(Number(slider.max) + 1).keys()].map(place => {
                slider.value = place; slider.dispatchEvent(new Event("input")); return document.getElementById("plan").textContent; }); }"""
        )
        return [float(one.partition("%")[0]) for one in told]

    def text(self, name: str) -> str:
        return str(self.tab.locator(f"#{name}").inner_text())


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from moa_lab.workbench.opening import open_run

    state = open_run(DEMO)
    tracing = traced()
    tracing.try_plan(small_plan(tracing.model), "small", handle())
    tracing.look(0, handle())
    records = desk_records(state, tracing, [PROJECT / "data" / "runs" / name for name in ("demo", "standard-25", "standard-50")])
    file = tmp_path_factory.mktemp("page") / "desk.html"
    file.write_text(desk_page(records), encoding="utf-8")
    return file


def in_browser(test: Any) -> Any:
    for mark in (pytest.mark.alone, pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")):
        test = mark(test)
    return test


@in_browser
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1920, "dark"), (1280, "dark"), (1920, "light")])
def test_the_page_moves_when_it_is_opened_from_a_file(browser: Any, path: Path, width: int, scheme: str) -> None:
    page = Desk(browser, path, width, scheme)
    plan = Plan.load(DEMO / "plan.json")
    assert np.array_equal(page.map(), plan.spans(max(plan.lengths)).T)
    before, facts = page.map(), page.text("facts")
    page.slide(-8)
    after, moved = page.map(), page.text("facts")
    assert after.sum() < before.sum()
    for name in ("density", "KV bytes, predicted", "predicted loss, mean"):
        assert value(moved, name) != value(facts, name)
    page.tab.screenshot(path=picture(f"desk_page_{width}_{scheme}"), full_page=True)
    assert page.tab.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    assert page.said == []
    assert [url for url in page.asked if not url.startswith(("data:", "blob:"))] == [path.as_uri()]
    page.tab.close()


@in_browser
def test_a_head_is_found_by_a_click_a_search_and_the_arrow_keys_on_both_maps(browser: Any, path: Path) -> None:
    page = Desk(browser, path, 1280, "light")
    box = page.tab.locator("[data-name=spans] .nsewdrag").first.bounding_box()
    page.tab.mouse.click(box["x"] + box["width"] * 20.5 / 30, box["y"] + box["height"] * 1.5 / 3)
    page.tab.mouse.move(5, 5)
    page.tab.wait_for_timeout(200)
    assert page.text("head-name") == "Layer 20, KV head 1"
    assert page.ring("spans") == page.ring("influence") == (20, 1)
    page.tab.keyboard.press("ArrowRight")
    page.tab.keyboard.press("ArrowDown")
    assert page.text("head-name") == "Layer 21, KV head 2"
    page.tab.fill("#head", "L12 H0")
    page.tab.keyboard.press("Enter")
    assert page.text("head-name") == "Layer 12, KV head 0"
    page.tab.fill("#head", "L30 H0")
    page.tab.keyboard.press("Enter")
    assert "layers 0 to 29" in page.text("head-error")
    assert page.text("head-name") == "Layer 12, KV head 0"
    assert page.said == []
    page.tab.close()


@in_browser
def test_heads_in_order_of_influence_stand_with_the_most_on_top_and_stay_themselves(browser: Any, path: Path) -> None:
    page = Desk(browser, path, 1280, "light")
    before = page.map("influence")
    page.tab.select_option("#order", "influence")
    after = page.map("influence")
    assert np.array_equal(after, -np.sort(-before, axis=0))
    layer = int(np.argmax((after != before).any(axis=0)))
    box = page.tab.locator("[data-name=influence] .nsewdrag").first.bounding_box()
    page.tab.mouse.click(box["x"] + box["width"] * (layer + 0.5) / 30, box["y"] + box["height"] * 0.5 / 3)
    assert page.text("head-name") == f"Layer {layer}, KV head {before[:, layer].argmax()}"
    assert page.ring("influence") == (layer, 0)
    page.tab.close()


@in_browser
def test_a_plan_of_the_front_is_shown_by_a_click_and_its_axes_are_chosen(browser: Any, path: Path) -> None:
    page = Desk(browser, path, 1280, "light")
    before = page.map()
    points = page.tab.locator("[data-name=front] .scatterlayer .trace:not(:has(path.js-line)) path.point")
    points.first.scroll_into_view_if_needed()
    spot = points.first.bounding_box()
    page.tab.mouse.move(spot["x"] + spot["width"] / 2, spot["y"] + spot["height"] / 2)
    page.tab.wait_for_timeout(300)
    page.tab.mouse.click(spot["x"] + spot["width"] / 2, spot["y"] + spot["height"] / 2)
    assert not np.array_equal(page.map(), before)
    xs = "box => box.data.flatMap(trace => trace.customdata ? trace.x : [])"
    across = page.tab.eval_on_selector("[data-name=front]", xs)
    page.tab.select_option("#front-x", "density")
    page.tab.wait_for_timeout(300)
    densities = page.tab.eval_on_selector("[data-name=front]", xs)
    assert across != densities
    assert all(0 < density <= 1 for density in densities)
    assert page.said == []
    for place in range(page.tab.locator("#length option").count()):
        page.tab.locator("#length").select_option(index=place)
        kept = page.densities()
        assert kept == sorted(kept), "more to the right, at every length"
        assert len(kept) > 20
    page.tab.close()


@in_browser
def test_another_measured_score_and_another_head_of_the_traced_token_are_shown(browser: Any, path: Path) -> None:
    page = Desk(browser, path, 1280, "light")
    title = "box => box.layout.yaxis.title.text"
    assert "needles" in page.tab.eval_on_selector("[data-name=measured]", title)
    page.tab.select_option("#curve", label="own answers, 2,048 tokens")
    page.tab.wait_for_timeout(300)
    assert "cross-entropy" in page.tab.eval_on_selector("[data-name=measured]", title)
    page.tab.locator("#trace-heads .moa-chip").nth(1).click()
    chosen = page.tab.locator("#trace-heads .moa-chip.selected")
    assert chosen.count() == 1
    layer, head = chosen.inner_text().split()[:2]
    assert page.text("head-name") == f"Layer {layer}, KV head {head}"
    assert page.tab.locator("#trace-text .moa-text").count() == 1
    page.tab.locator("#trace-tokens .moa-chip").nth(5).click()
    assert "nobody looked at this token" in page.text("trace-why")
    assert page.said == []
    page.tab.close()


def value(facts: str, name: str) -> str:
    lines = facts.splitlines()
    return lines[lines.index(name) + 1]


def picture(name: str) -> Path:
    PICTURES.mkdir(parents=True, exist_ok=True)
    return PICTURES / f"{name}.png"
