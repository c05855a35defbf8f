import dataclasses
import json
import re
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from figure_records import LOST, SMOL, make_baselines, make_chosen, make_front, make_measurements, make_plan, make_profile, make_validation

from moa_lab.commands.doctor import find_chromium
from moa_lab.geometry import ModelGeometry
from moa_lab.plan import Plan, SpanRule
from moa_lab.records import Measurement, Measurements
from moa_lab.report import build_report, save_report
from moa_lab.report.tables import rules_table

CHROMIUM = find_chromium()
HOSTILE = "<script>alert(1)</script> & \"½\" '計画' </style>"
MHA = ModelGeometry(layers=32, query_heads=32, kv_heads=32, head_dim=128, max_length=4096)
MQA = ModelGeometry(8, 8, 1, 256, 8192, tuple(512 if layer % 2 else None for layer in range(8)))


def full_report(plan: Plan | None = None) -> str:
    front = make_front()
    chosen = plan or front.points[6].plan.renamed("moa")
    return build_report(chosen, make_profile(lengths=(1024,)), front, make_measurements(front=front), baselines=make_baselines())


def text_of(page: str) -> str:
    """What a reader of the page without its scripts and styles reads."""
    body = re.sub(r"<(script|style)\b.*?</\1>", " ", page, flags=re.S)
    return " ".join(re.sub(r"<[^>]+>", " ", body).replace("&ndash;", "-").split())


def score(plan: str, value: float, length: int = 2048, metric: str = "retrieval", n: int = 50) -> Measurement:
    return Measurement(plan, metric, "needle", length, value, n, max(value - 0.05, 0), min(value + 0.05, 1), 0.5)


def answer(page: str) -> str:
    found = re.search(r'<p class="answer">(.*?)</p>', page)
    assert found
    return re.sub(r"<[^>]+>", "", found[1])


def test_the_headline_is_computed_from_the_measurements() -> None:
    plan = dataclasses.replace(make_baselines()[1], name="moa", span_multiple=1)
    measured = Measurements((score("moa", 0.941), score("dense", 0.972), score("uniform", 0.468)))
    page = build_report(plan, measurements=measured, baselines=make_baselines())
    expected = "At 50% of the KV cache, this plan retrieves 94% of needles at 2,048 tokens (dense 97%, uniform window 47%)."
    assert answer(page) == expected


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_prediction_is_held_against_two_measured_plans_or_more(count: int) -> None:
    front = make_front()
    measured = Measurements((score("moa", 0.9), *(score(point.plan.name, 0.8) for point in front.points[:count])))
    page = build_report(front.points[6].plan.renamed("moa"), front=front, measurements=measured)
    assert ("Does the prediction hold?" in page) == (count > 1)


def test_dense_spans_and_uniform_windows_in_16_and_in_fewer_bits_are_told_apart_in_the_headline() -> None:
    dense, uniform = make_baselines()[:2]
    stored = uniform.with_bits(8, "uniform@8")
    names = {"moa": 0.941, "dense": 0.972, "dense@8": 0.969, "uniform": 0.468, "uniform@8": 0.612}
    measured = Measurements(tuple(score(name, value) for name, value in names.items()))
    page = build_report(make_plan(), measurements=measured, baselines=(dense, dense.with_bits(8, "dense@8"), uniform, stored))
    assert answer(page).endswith("(dense 97%, dense in 8 bits 97%, uniform window 47%, uniform window in 8 bits 61%).")


def test_rules_are_told_with_the_tokens_that_a_layers_own_window_leaves() -> None:
    rule = SpanRule(300.0, 0.0)
    plan = Plan(ModelGeometry(2, 2, 1, 16, 4096, (160, None)), ((rule,), (rule,)))
    assert "<td>160 or 300</td>" in rules_table(plan, 777)


def test_the_headline_compares_at_the_longest_length_that_all_were_measured_at() -> None:
    measured = Measurements((score("moa", 0.9), score("moa", 0.8, 4096), score("dense", 1.0)))
    assert "90% of needles at 2,048 tokens (dense 100%)" in answer(build_report(make_plan(), measurements=measured))


def test_without_retrieval_the_headline_speaks_of_the_loss() -> None:
    page = build_report(make_plan(), measurements=Measurements((score("moa", 0.678, metric="cross_entropy"),)))
    assert "has a cross-entropy of 0.678 nats per token at 2,048 tokens." in answer(page)


def test_without_measurements_no_score_is_claimed() -> None:
    page = build_report(make_plan())
    assert answer(page).endswith("no score was measured yet.")
    assert "retrieve" not in text_of(page)


def test_the_table_holds_every_score_with_n_and_interval_and_the_plans_in_order() -> None:
    page = full_report()
    table = page[page.index("<table>") : page.index("</table>")]
    for row in make_measurements().select(metric="retrieval"):
        cell = f"<b>{100 * row.value:.0f}%</b><small><span>{100 * row.low:.0f}&ndash;{100 * row.high:.0f}%</span> <span>n = {row.n}</span>"
        assert cell in table
    for row in make_measurements().select(metric="cross_entropy"):
        assert f"<b>{row.value:.3f}</b><small><span>{row.low:.3f}&ndash;{row.high:.3f}</span> <span>n = {row.n}</span>" in table
    groups = re.findall(r"<tbody>(.*?)</tbody>", table)
    assert len(groups) == 4
    for group in groups:
        assert re.findall(r'scope="row"[^>]*>.*?</span>(\w+)</th>', group) == ["dense", "uniform", "moa"]


def test_candidates_of_the_front_stay_out_of_the_score_table() -> None:
    page = full_report()
    assert "milp-03" not in page[page.index("<table>") : page.index("</table>")]


def test_bytes_are_called_predicted_or_allocated_wherever_they_are_shown() -> None:
    text = text_of(full_report())
    assert "predicted from the spans and, where that was measured, as allocated" in text
    assert "KV cache of one sequence, predicted" in text
    assert "KV cache of one sequence, allocated" not in text
    plan = make_plan()
    rows = [score(plan.name, 0.5), Measurement(plan.name, "kv_bytes_allocated", "cache", 2048, 3.0 * 2**20, 1, 3e6, 3e6, 0.5)]
    text = text_of(build_report(plan, measurements=Measurements(tuple(rows))))
    assert "KV cache of one sequence, allocated" in text
    assert "3.0 MiB were allocated" in text


def test_losses_of_different_texts_are_not_pooled() -> None:
    rows = [
        dataclasses.replace(score("moa", value, metric="cross_entropy"), task=task)
        for task, value in (("summaries", 0.5), ("speeches", 2.5))
    ]
    text = text_of(build_report(make_plan(), measurements=Measurements(tuple(rows))))
    assert "Cross-entropy, speeches (nats per token)" in text
    assert "2.500" in text
    assert "0.500" in text


def test_needles_and_lines_are_not_pooled_and_needles_speak_for_the_plan() -> None:
    shares = (("lines", 0.0), ("needles", 1.0))
    rows = [dataclasses.replace(score("moa", value, n=20), task=task) for task, value in shares]
    losses = (("documents", 3.25), ("summaries", 0.75))
    rows += [dataclasses.replace(score("moa", value, metric="cross_entropy"), task=task) for task, value in losses]
    page = build_report(make_plan(), measurements=Measurements(tuple(rows)))
    text = text_of(page)
    assert "Lines retrieved (%)" in text
    assert text.index("Needles retrieved (%)") < text.index("Lines retrieved (%)")
    assert "retrieves 100% of needles" in answer(page)
    assert "Its cross-entropy on summaries at 2,048 tokens is 0.750 nats per token." in text


def test_the_page_says_how_it_was_made() -> None:
    text = text_of(full_report())
    for fact in (
        str(SMOL),
        "smollm2",
        "0123456789abcdef",
        "torch 2.13.0",
        "x86_64",
        "moa-lab run --density 0.5",
        "2026-01-02T03:04:05+00:00",
    ):
        assert fact in text


def test_rules_are_counted() -> None:
    plan = make_plan()
    text = text_of(build_report(plan))
    heads = sum(rule.beta == 1 for row in plan.rules for rule in row)
    assert f"N, everything {heads} {heads / 90:.0%}" in text


def test_strings_from_records_cannot_become_markup() -> None:
    plan = make_plan(name=HOSTILE)
    measured = make_measurements({HOSTILE: 0.5, "dense": 1.0})
    measured = dataclasses.replace(measured, settings={"note": HOSTILE})
    measured = measured.plus(worse_rows(HOSTILE))
    validation = make_validation({HOSTILE: ("refined", 0.1, 0.1, 0.1), "uniform": ("uniform", 1.0, 0.2, 0.5)}, HOSTILE)
    plan = plan.renamed(HOSTILE, search={"candidate": HOSTILE, "origin": HOSTILE, "prefer": HOSTILE, "score": 0.5})
    profile = make_profile(lengths=(512,), tasks=(HOSTILE,), samples=1)
    page = build_report(plan, profile, None, measured, title=HOSTILE, baselines=make_baselines(), validation=validation)
    assert 'class="warning"' in page
    assert 'id="validation"' in page
    assert "<script>alert" not in page
    assert page.count("</style>") == 1
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_figure_data_is_valid_json_without_angle_brackets() -> None:
    blocks = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', full_report(), flags=re.S)
    assert len(blocks) > 10
    for block in blocks:
        assert json.loads(block)
        assert "<" not in block


class Outline(HTMLParser):
    """Headings, labels and addresses of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.levels: list[int] = []
        self.labels: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if re.fullmatch("h[1-6]", tag):
            self.levels.append(int(tag[1]))
        if found.get("class") == "plot":
            self.labels.append(found.get("aria-label") or "")
        self.addresses += [value for name, value in attrs if name in ("src", "href") and value]


def test_headings_are_in_order_and_every_figure_is_described() -> None:
    outline = Outline()
    outline.feed(full_report())
    assert outline.levels[0] == 1
    assert outline.levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(outline.levels, outline.levels[1:], strict=False))
    assert all(len(label) > 20 for label in outline.labels)
    assert all(address.startswith(("#", "data:")) for address in outline.addresses)


def test_what_was_measured_to_choose_the_plan_has_a_section_with_every_candidates_numbers() -> None:
    page = build_report(make_chosen(), validation=make_validation())
    section = page[page.index('<section id="validation"') : page.index('<section id="origin"')]
    told = text_of(section)
    assert told.startswith("What was measured to choose it moa is refined-1 (refined spans), chosen by needles and words")
    rows = re.findall(r'<th scope="row">(.*?)</th>', section)
    assert rows[0] == "refined-1"
    assert sorted(rows) == sorted(LOST)
    assert "layers a span per layer 0.733 50.0% 0.6000 0.0700" in told
    assert "Settings of the validation" in page


def test_a_validation_that_chose_another_plan_and_none_leave_the_section_out() -> None:
    heading = "What was measured to choose it"
    assert heading not in build_report(make_plan(), validation=make_validation())
    assert heading not in build_report(make_plan())
    alone = build_report(make_chosen(), validation=make_validation(chosen="layers"))
    assert heading in alone, "the card says which candidate won"
    assert "The same as a table" not in alone[alone.index('<section id="validation"') :]


def worse_rows(name: str) -> Measurements:
    """Needles of which the plan finds a quarter and the uniform one three quarters, on the same samples."""
    shares = {name: [0.0, 0.0, 0.0, 1.0] * 8, "uniform": [1.0, 1.0, 0.0, 1.0] * 8}
    detail = {"samples": "s"}
    return Measurements(
        tuple(
            dataclasses.replace(score(plan, sum(found) / 32, n=32), detail={**detail, "per_sample": found})
            for plan, found in shares.items()
        )
    )


def test_where_the_plan_is_worse_than_a_simple_one_the_page_says_so_first() -> None:
    page = build_report(make_plan(), measurements=worse_rows("moa"), baselines=make_baselines(), title="A title")
    header = text_of(page[page.index("<header>") : page.index("</header>")])
    assert header.startswith("moa is worse than uniform here: needle at 2,048 tokens 0.250 against 0.750. Try --prefer needles")
    assert header.index("A title") < header.index("this plan retrieves")
    assert 'class="warning"' not in build_report(make_plan(), measurements=make_measurements(), baselines=make_baselines())


def test_profiles_and_baselines_of_another_geometry_are_refused() -> None:
    with pytest.raises(ValueError, match="another geometry"):
        build_report(make_plan(), make_profile(MQA, (512,)))
    with pytest.raises(ValueError, match="another geometry"):
        build_report(make_plan(), baselines=make_baselines(MQA))


def test_different_plans_of_one_name_are_refused() -> None:
    plan = make_plan()
    with pytest.raises(ValueError, match="two different plans are named 'moa'"):
        build_report(plan.with_bits(8), baselines=[plan])
    with pytest.raises(ValueError, match="two different plans are named 'dense'"):
        build_report(plan.with_bits(8, "dense"), measurements=make_measurements())
    assert "moa" in build_report(plan, baselines=[plan])


def test_save_report_writes_the_page_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    path = save_report(tmp_path / "deep" / "report.html", make_plan(), title="½")
    assert path.read_text(encoding="utf-8") == build_report(make_plan(), title="½")
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]


def test_the_page_is_small_enough_for_a_mail_though_plotly_is_in_it() -> None:
    assert 1e6 < len(full_report().encode()) < 3.5e6


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="Playwright for Python is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with api.sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        window = playwright.chromium.launch(executable_path=str(CHROMIUM), args=options)
        yield window
        window.close()


REPORTS = (
    "full",
    "no front, one length, 32 x 32 heads, a hostile name",
    "one KV head with own windows",
    "no retrieval",
    "plan alone",
    "worse than uniform, with its validation",
)


@cache
def reports() -> dict[str, str]:
    one = make_measurements({HOSTILE: 0.5}, (512,))
    losses = Measurements(make_measurements().select(metric="cross_entropy", length=1024))
    hostile = make_plan(MHA, HOSTILE)
    return {
        "full": full_report(),
        "no front, one length, 32 x 32 heads, a hostile name": build_report(
            hostile, make_profile(MHA, (512,), (HOSTILE,), 1), None, one, title=HOSTILE
        ),
        "one KV head with own windows": build_report(make_plan(MQA), make_profile(MQA, (64, 512), ("q",), 2), make_front(MQA, 1)),
        "no retrieval": build_report(make_plan(), None, make_front(count=2), losses, baselines=make_baselines()),
        "plan alone": build_report(make_plan()),
        "worse than uniform, with its validation": build_report(
            make_chosen(), None, None, worse_rows("moa"), baselines=make_baselines(), validation=make_validation()
        ),
    }


@pytest.mark.parametrize(
    ("name", "scheme", "width"),
    [("full", "light", 1280), *((name, "dark", 400) for name in REPORTS)],
)
def test_the_page_draws_every_figure_without_errors_or_requests(browser: Any, tmp_path: Path, name: str, scheme: str, width: int) -> None:
    page = reports()[name]
    path = tmp_path / "page.html"
    path.write_text(page, encoding="utf-8")
    said: list[str] = []
    asked: list[str] = []
    tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(path.as_uri())
    tab.wait_for_selector("html[data-drawn]", timeout=30_000)
    sizes = tab.eval_on_selector_all(".plot", "all => all.map(box => box.querySelector('.main-svg').getBoundingClientRect())")
    buttons = tab.eval_on_selector_all(".modebar-btn", "all => all.map(button => button.dataset.title ?? 'logo')")
    wide = tab.evaluate("document.documentElement.scrollWidth - innerWidth")
    headings = tab.locator("h2").count()
    tab.close()
    assert said == []
    assert [url for url in asked if not url.startswith(("data:", "blob:"))] == [path.as_uri()]
    assert len(sizes) == page.count('class="plot-data"') > 0
    assert all(size["width"] > 200 and size["height"] > 100 for size in sizes)
    assert headings == page.count("<section ") >= 3
    assert wide <= 0, "the page scrolls sideways"
    assert buttons
    assert not [title for title in buttons if "hare" in title or "logo" in title or "loud" in title]


def test_figures_change_their_ink_with_the_readers_theme(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(build_report(make_plan()), encoding="utf-8")
    tab = browser.new_page(color_scheme="light")
    tab.goto(path.as_uri())
    tab.wait_for_selector("html[data-drawn]", timeout=30_000)
    ink = "getComputedStyle(document.querySelector('.xtick text')).fill"
    light = tab.evaluate(ink)
    tab.emulate_media(color_scheme="dark")
    # Polled from here: the page's own policy forbids the evaluation that wait_for_function needs.
    for _ in range(100):
        tab.wait_for_timeout(50)
        if tab.evaluate(ink) != light:
            break
    dark = tab.evaluate(ink)
    tab.close()
    assert light == "rgb(89, 97, 107)"
    assert dark == "rgb(169, 176, 186)"
