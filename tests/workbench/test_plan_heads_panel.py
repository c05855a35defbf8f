"""Heads of runs that keep no profile: what is not known is said, spans and published scores are shown."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from figure_records import SMOL, make_front, make_plan, make_profile

from moa_lab.bench.lifelike import lifelike_profile
from moa_lab.evaluate.compare import rank_agreement
from moa_lab.geometry import ModelGeometry
from moa_lab.plan import dense_plan
from moa_lab.records import InfluenceProfile
from moa_lab.shipped import data_folder
from moa_lab.workbench.desk import Workbench
from moa_lab.workbench.heads import SPAN
from moa_lab.workbench.heads_panel import HeadsPanel
from moa_lab.workbench.plan_heads_panel import PlanHeadsPanel
from moa_lab.workbench.state import State
from tests.workbench.hands import press, said

QWEN = data_folder("runs") / "qwen2.5-coder-0.5b-25"


def duo(folder: Path, values: np.ndarray) -> str:
    folder.mkdir()
    np.savetxt(folder / "full_attention_heads.tsv", values, delimiter="\t")
    return str(folder)


def test_a_run_without_a_profile_shows_what_its_plan_keeps_of_every_head_and_says_what_is_not_known() -> None:
    bench = Workbench.open(QWEN)
    panel, plan, n = bench.panels["Heads"], bench.state.plan, bench.state.n_tokens
    assert "keeps no profile" in panel.note.value
    spans = plan.spans(n)
    assert np.array_equal(panel.map.canvas.widget.data[0].z, spans.T)
    assert panel.versus.label == "no scores yet", "an option whose value is None is not shown as chosen"
    panel.map.order.value = SPAN
    assert np.array_equal(panel.map.canvas.widget.data[0].z, -np.sort(-spans.T, axis=0))
    panel.map.find.value = "L5 H1"
    assert (bench.state.layer, bench.state.kv_head) == (5, 1)
    assert f"it keeps {spans[5, 1]:,} of {n:,} tokens" in panel.facts.value
    bench.press("right")
    assert bench.state.layer == 6
    assert "Layer 6, KV head" in bench.line.box.value


def test_of_a_layer_with_a_window_of_its_own_a_head_keeps_no_more_than_that_and_its_bits_are_told() -> None:
    bench = Workbench.open(QWEN.parent / "gemma-3-270m-50")
    n, geometry = bench.state.n_tokens, bench.state.plan.geometry
    assert n > 512
    bench.state.set(plan=dense_plan(geometry).with_bits(np.array([8, 4])))
    assert "18 of 18 heads keep all" in bench.panels["Heads"].facts.value
    assert "it keeps 512 of the 512 tokens that its layer sees; keys in 8 bits, values in 4" in bench.panels["Heads"].facts.value
    assert "Under dense it keeps 512 of the 512 tokens that its layer sees." in bench.line.box.value


def test_published_scores_are_held_against_the_spans_of_the_plan(tmp_path: Path) -> None:
    plan, n = make_plan(), 1024
    panel = PlanHeadsPanel(State(plan=plan, n_tokens=n))
    assert panel.compared.layout.display == "none"
    values = plan.spans(n) / n + np.random.default_rng(0).normal(0, 0.01, (SMOL.layers, SMOL.kv_heads))
    panel.path.value = duo(tmp_path / "gates", np.clip(values, 0, 1))
    press(panel, "Load scores")
    assert said(panel) == ""
    assert np.allclose(np.asarray(panel.scores.widget.data[0].z).T, np.clip(values, 0, 1))
    expected = rank_agreement(plan.spans(n), np.clip(values, 0, 1))
    assert f"<b>{expected.value:+.2f}</b>" in panel.agreed.value
    panel.scores._on_click((2, 11))
    assert (panel.state.layer, panel.state.kv_head) == (11, 2)
    assert f"{np.clip(values, 0, 1)[11, 2]:.3g}, rank" in panel.facts.value
    assert "DuoAttention (gates)" in panel.known.told(11, 2)
    panel.state.set(hovered=(4, 1))
    marks = [canvas.widget.layout.shapes[-1] for canvas in (panel.map.canvas, panel.scores)]
    assert [(mark.xanchor, mark.yanchor) for mark in marks] == [(4, 1), (4, 1)]
    panel.path.value = duo(tmp_path / "wrong", np.ones((2, 2)))
    press(panel, "Load scores")
    assert "the model has 30 x 3" in said(panel)


def test_without_a_plan_too_the_panel_says_where_to_choose_one() -> None:
    bench = Workbench(State(front=make_front()))
    panel = bench.panels["Heads"]
    assert "click one in Front" in panel.note.value
    assert panel.spans.layout.display == "none"
    point = next(iter(bench.state.front))
    bench.state.set(plan=point.plan)
    assert "click one in Front" not in panel.note.value
    assert panel.spans.layout.display == ""
    with pytest.raises(ValueError, match="no record tells"):
        PlanHeadsPanel(State())


def test_a_profile_that_does_not_keep_where_heads_look_is_shown_without_that_and_says_so() -> None:
    panel = HeadsPanel(State(profile=lifelike_profile(ModelGeometry(6, 8, 4, 64, 8192))))
    assert said(panel) == ""
    assert panel.blocks.box.layout.display == "none"
    assert len(panel.curve.widget.data) > 0
    assert "cannot be told apart" in panel.biography.counts.value
    assert "unknown" in panel.biography.table.value
    panel.view.value = "kind of head"
    assert said(panel) == ""
    assert set(np.unique(panel.map.widget.data[0].customdata)) <= {"retrieval", "unknown"}
    whole = HeadsPanel(State(profile=make_profile()))
    assert whole.blocks.box.layout.display == ""
    assert "cannot be told apart" not in whole.biography.counts.value
    assert "unknown" not in whole.biography.counts.value


def test_a_profile_of_the_same_model_is_taken_into_a_run_that_keeps_none() -> None:
    runs = data_folder("runs")
    bench = Workbench.open(runs / "standard-50")
    assert "Budget" not in bench.panels
    panel, chosen = bench.panels["Heads"], bench.state.plan
    panel.profile.value = str(runs / "demo")
    press(panel, "Load profile")
    heads = bench.panels["Heads"]
    assert isinstance(heads, HeadsPanel)
    assert heads.heads.key == ("questions", 1536)
    assert list(bench.tabs.titles)[:3] == ["Heads", "Budget", "Front"], "its losses follow from it, so densities can be solved"
    assert chosen in bench.state.plans
    assert bench.state.plan.density(1536) <= 0.5
    assert "nats lost" in heads.biography.table.value


def test_a_profile_of_another_model_and_a_path_without_one_are_refused_in_words(tmp_path: Path) -> None:
    bench = Workbench.open(QWEN)
    panel, state = bench.panels["Heads"], bench.state
    panel.profile.value = str(data_folder("runs") / "demo")
    press(panel, "Load profile")
    assert "profile.safetensors is of another model: it has 30 layers x 9 query heads / 3 KV heads" in said(panel)
    assert bench.state is state
    panel.profile.value = str(tmp_path)
    press(panel, "Load profile")
    assert f"there is no profile at &#x27;{tmp_path}&#x27;" in said(panel)
    profile = InfluenceProfile.load(data_folder("runs") / "demo" / "profile.safetensors")
    other = replace(profile, provenance=replace(profile.provenance, weights="others", model="a sibling"))
    other.save(tmp_path / "profile.safetensors")
    standard = Workbench.open(data_folder("runs") / "standard-50")
    with pytest.raises(ValueError, match="is of other weights: it was made with a sibling, this run with smollm2"):
        standard.load_profile(tmp_path)


def test_the_run_that_is_open_is_the_first_of_those_compared() -> None:
    bench = Workbench.open(QWEN)
    assert [Path(path).name for path in bench.panels["Runs"].across.runs] == [QWEN.name]
    assert not Workbench(State(plan=make_plan())).panels["Runs"].across.runs
