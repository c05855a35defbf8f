"""Export: what is written is what is read back, and nothing is overwritten unasked."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from figure_records import make_front, make_plan, make_profile

from moa_lab.geometry import ModelGeometry
from moa_lab.plan import Plan, dense_plan, uniform_plan
from moa_lab.records import Measurement, Measurements
from moa_lab.workbench.exporting import FORMATS, PLAN, Sources, export, known_of


def test_every_format_holds_the_plan(tmp_path: Path) -> None:
    plan = make_plan()
    card, published, table, code, report, desk = export(plan, tmp_path / "new", "mine", tuple(FORMATS), 2048)
    assert Plan.load(card).identity() == plan.identity()
    assert Plan.load(card).name == "mine"
    assert Plan.from_published(published, plan.geometry).rules == plan.rules
    spans = pd.read_csv(table).pivot(index="layer", columns="kv_head", values="span_tokens_at_2048").to_numpy()
    assert np.array_equal(spans, plan.spans(2048))
    ast.parse(code.read_text())
    assert "mine.json" in code.read_text()
    for page in (report, desk):
        assert plan.identity() in page.read_text(encoding="utf-8")


def test_stored_bits_are_in_every_format_that_can_hold_them(tmp_path: Path) -> None:
    plan = make_plan().with_bits(np.array([8, 4]))
    card, table, report = export(plan, tmp_path, "mine", ("config card", "spans as CSV", "HTML report"), 2048)
    assert Plan.load(card).bits == plan.bits
    assert set(zip(*pd.read_csv(table)[["key_bits", "value_bits"]].to_numpy().T, strict=True)) == {(8, 4)}
    assert report.read_text(encoding="utf-8").count(f"{plan.geometry.layers * plan.geometry.kv_heads} heads store K in 8 bits, V in 4") == 2
    with pytest.raises(ValueError, match="no word for bits"):
        export(plan, tmp_path, "other", ("published {alphas, betas}",), 2048)


def test_nothing_is_overwritten_unless_asked(tmp_path: Path) -> None:
    export(make_plan(), tmp_path, "mine", ("config card",), 2048)
    before = (tmp_path / "mine.json").read_text()
    with pytest.raises(FileExistsError, match=r"mine\.json"):
        export(make_plan(seed=5), tmp_path, "mine", tuple(FORMATS), 2048)
    assert (tmp_path / "mine.json").read_text() == before
    assert len(list(tmp_path.iterdir())) == 1, "nothing is written where anything would be replaced"
    export(make_plan(seed=5), tmp_path, "mine", ("config card",), 2048, replace=True)
    assert (tmp_path / "mine.json").read_text() != before


@pytest.mark.parametrize("name", ["", "..", "a/b", "../up", "a\\b"])
def test_a_name_that_leaves_the_folder_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no file name"):
        export(make_plan(), tmp_path, name, ("config card",), 2048)


def test_unknown_formats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pickle"):
        export(make_plan(), tmp_path, "mine", ("pickle",), 2048)


def row(plan: Plan, value: float, name: str | None = None, length: int = 2048) -> Measurement:
    known = {PLAN: plan.identity()}
    return Measurement(name or plan.name, "retrieval", "needle", length, value, 50, value - 0.05, value, plan.density(length), known)


def test_a_report_holds_what_was_measured_of_this_plan_and_of_baselines_of_its_density_and_of_no_other_of_its_name() -> None:
    plan = make_plan(name="budget")
    near, far = uniform_plan(plan.geometry, round(plan.density(2048), 3)), uniform_plan(plan.geometry, 0.05)
    rows = (
        row(plan, 0.5), row(plan, 0.875), row(make_plan(name="budget", seed=5), 0.125), row(dense_plan(plan.geometry), 0.9375),
        row(near, 0.25), row(far, 0.0625), row(make_plan(name="other", seed=6), 0.3125),
    )  # fmt: skip
    known = known_of(plan.renamed("mine"), Measurements(rows, {"needles": 50}))
    assert {found.plan: found.value for found in known} == {"mine": 0.875, "dense": 0.9375, "uniform": 0.25}
    assert known.settings == {"needles": 50}
    assert known_of(plan, None).rows == ()


def test_a_report_shows_the_profile_the_front_and_the_scores_and_asks_nothing_of_the_network(tmp_path: Path) -> None:
    front = make_front()
    plan = front.points[6].plan
    known = Measurements((row(plan, 0.875), row(dense_plan(plan.geometry), 0.9375)))
    sources = Sources(2048, make_profile(lengths=(1024,), samples=2), front, known)
    (path,) = export(plan, tmp_path, "mine", ("HTML report",), sources)
    page = path.read_text(encoding="utf-8")
    for words in (
        "this plan retrieves <strong>88%</strong> of needles",
        "Which heads look far back",
        "What the search found",
        plan.identity(),
        "mine",
    ):
        assert words in page, words
    assert not re.search(r"""<(script|link|img)[^>]*(src|href)=["'](?!data:)""", page)
    before = path.stat().st_mtime_ns
    with pytest.raises(FileExistsError, match=r"mine\.html"):
        export(plan, tmp_path, "mine", ("HTML report",), sources)
    assert path.stat().st_mtime_ns == before


def test_a_report_on_records_of_another_model_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    other = make_profile(ModelGeometry(2, 4, 2, 16, 4096), lengths=(512,), samples=1)
    with pytest.raises(ValueError, match="another geometry"):
        export(make_plan(), tmp_path, "mine", tuple(FORMATS), Sources(2048, other))
    assert list(tmp_path.iterdir()) == []


def test_a_report_that_would_fetch_something_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = f'<p>{make_plan().identity()}</p><script src="https://example.org/a.js"></script>'
    monkeypatch.setattr("moa_lab.workbench.exporting.build_report", lambda *_, **__: page)
    with pytest.raises(ValueError, match=r"not self-contained: .*example\.org"):
        export(make_plan(), tmp_path, "mine", ("HTML report",), 2048)


def test_a_snippet_brings_the_card_that_it_loads(tmp_path: Path) -> None:
    paths = export(make_plan(), tmp_path, "mine", ("Python snippet",), 2048)
    assert {path.name for path in paths} == {"mine.py", "mine.json"}
    assert "Plan.load('mine.json')" in (tmp_path / "mine.py").read_text()
