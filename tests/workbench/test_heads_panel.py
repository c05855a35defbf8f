"""The heads panel without a browser: what a moved widget changes in the state and on the panel, how often it draws, what it says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from figure_records import make_plan, make_profile

from moa_lab.geometry import ModelGeometry
from moa_lab.workbench.heads_panel import HeadsPanel
from moa_lab.workbench.state import State
from tests.workbench.hands import drawn, press, said

PROFILE = make_profile(lengths=(512, 1024), samples=2)


def test_another_key_moves_the_state_and_the_map(monkeypatch: pytest.MonkeyPatch) -> None:
    panel = HeadsPanel(State(profile=PROFILE))
    titles = drawn(panel.map, monkeypatch)
    panel.what.value = ("summaries", 512)
    assert (panel.state.task, panel.state.length) == ("summaries", 512)
    assert titles == ["Long-range influence: summaries, 512 tokens"]
    panel.state.set(task="questions", length=1024)
    assert panel.what.value == ("questions", 1024)
    assert len(titles) == 2


def test_a_plan_and_a_head_that_change_together_are_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    panel = HeadsPanel(State(profile=PROFILE))
    maps, curves, blocks = (drawn(canvas, monkeypatch) for canvas in (panel.map, panel.curve, panel.blocks))
    panel.state.set(plan=make_plan(), layer=3, kv_head=1, n_tokens=1024)
    assert (len(maps), len(curves), len(blocks)) == (1, 1, 1)
    panel.state.set(plan=make_plan(seed=1))
    assert (len(maps), len(curves)) == (1, 2), "the map shows no plan"
    panel.state.set(tab="Budget")
    panel.state.set(plan=make_plan(seed=2))
    panel.state.set(layer=4)
    panel.state.set(tab="Heads")
    assert (len(maps), len(curves)) == (2, 3)


def test_a_click_on_the_map_chooses_the_head_also_within_a_group() -> None:
    panel = HeadsPanel(State(profile=PROFILE))
    panel.map._on_click((7, 20))
    assert (panel.state.layer, panel.state.kv_head) == (20, 2)
    assert "layer 20, query head 7 (KV head 2)" in panel.facts.value
    panel.map._on_click((8, 20))
    assert "layer 20, query head 8 (KV head 2)" in panel.facts.value
    ring = next(trace for trace in panel.map.widget.data if trace.name == "selected")
    assert (ring.x[0], ring.y[0]) == (20, 8)


def test_the_query_heads_of_a_kv_head_are_one_row_when_pooled_and_a_click_still_finds_its_head() -> None:
    panel = HeadsPanel(State(profile=PROFILE))
    assert panel.pool.label == "every query head"
    panel.pool.value = "max"
    assert np.shape(panel.map.widget.data[0].z) == (3, 30)
    panel.map._on_click((2, 11))
    assert (panel.state.layer, panel.state.kv_head) == (11, 2)
    ring = next(trace for trace in panel.map.widget.data if trace.name == "selected")
    assert (ring.x[0], ring.y[0]) == (11, 2)
    panel.view.value = "difference"
    assert np.shape(panel.map.widget.data[0].z) == (3, 30)
    panel.pool.value = "each"
    assert np.shape(panel.map.widget.data[0].z) == (9, 30)


def test_two_lengths_are_told_apart_by_ranks_and_by_a_map_of_the_difference() -> None:
    panel = HeadsPanel(State(profile=PROFILE))
    panel.against.value = panel.against.options[-1][1]
    before = panel.stability.value
    assert re.search(r"<b>[+-]\d\.\d\d</b>", before)
    panel.view.value = "difference"
    heat = panel.map.widget.data[0]
    assert heat.zmin == -heat.zmax
    panel.against.value = ("this profile", ("questions", 1024))
    assert "+1.00" in panel.stability.value
    assert not np.any(panel.map.widget.data[0].z)
    panel.beyond.value = 1000
    assert "beyond 1,000 tokens" in panel.facts.value


def test_a_second_profile_is_loaded_from_a_path_and_compared_with(tmp_path: Path) -> None:
    make_profile(lengths=(1024,), tasks=("questions",), samples=1).save(tmp_path / "again" / "profile.safetensors")
    panel = HeadsPanel(State(profile=PROFILE))
    panel.path.value = str(tmp_path / "nothing")
    press(panel, "Load profile")
    assert "there is no profile at" in said(panel)
    panel.path.value = str(tmp_path / "again")
    press(panel, "Load profile")
    assert said(panel) == ""
    assert panel.against.value == ("again", ("questions", 1024))
    assert "again: questions, 1,024 tokens" in panel.facts.value


def test_a_plan_of_another_model_is_told_on_the_panel_and_does_not_stop_others() -> None:
    panel, heard = HeadsPanel(State(profile=PROFILE)), []
    panel.state.watch(["plan"], lambda: heard.append(1))
    panel.state.set(plan=make_plan(ModelGeometry(2, 4, 2, 16, 4096)))
    assert "another geometry" in said(panel)
    assert heard == [1]


def test_a_figure_that_has_no_shapes_any_more_shows_none() -> None:
    panel = HeadsPanel(State(profile=PROFILE, plan=make_plan(), n_tokens=1024))
    spans = panel.state.plan.spans(1024)
    cut, whole = (tuple(int(index) for index in np.argwhere(found)[0]) for found in (spans < 1024, spans == 1024))
    panel.state.set(layer=cut[0], kv_head=cut[1])
    assert len(panel.curve.widget.layout.shapes) == 2
    sent: list[Any] = []
    panel.curve.widget.observe(lambda change: sent.append(change["new"]), "_py2js_relayout")
    panel.state.set(layer=whole[0], kv_head=whole[1])
    assert len(panel.curve.widget.layout.shapes) == 0
    assert any(message and message["relayout_data"].get("shapes", 1) is None for message in sent), "the page was not told"
