"""A head's biography from a script and on its panel; scores of DuoAttention and KVzip from their own files; one line about a head."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from figure_records import SMOL, make_plan, make_profile

from moa_lab.evaluate.compare import rank_agreement, spearman
from moa_lab.figures import kind_map, long_range_influence, ranks_compared, score_map
from moa_lab.geometry import ModelGeometry
from moa_lab.records import KINDS, head_patterns
from moa_lab.workbench import Workbench
from moa_lab.workbench.biography import Biography
from moa_lab.workbench.head_line import told_head
from moa_lab.workbench.heads_panel import HeadsPanel
from moa_lab.workbench.published_scores import HeadScores, read_head_scores
from moa_lab.workbench.state import State
from tests.workbench.hands import press, said
from tests.workbench.lab import PROJECT

PROFILE = make_profile(lengths=(512, 1024), samples=3)
CODE = make_profile(lengths=(1024,), tasks=("questions",), samples=2)
KEY = ("questions", 1024)
DEMO = PROJECT / "data" / "runs" / "demo"


def write_duo(folder: Path, values: np.ndarray) -> Path:
    """As DuoAttention publishes it: a layer a line, tabs between KV heads, numbers a little outside 0..1."""
    folder.mkdir(parents=True, exist_ok=True)
    np.savetxt(folder / "full_attention_heads.tsv", values, delimiter="\t")
    return folder / "full_attention_heads.tsv"


def test_a_head_has_a_chapter_for_every_profile_task_and_length_with_rank_and_kind() -> None:
    biography = Biography({"addresses": PROFILE, "code": CODE})
    chapters = biography.chapters(7, 2)
    assert [(one.profile, one.task, one.length) for one in chapters] == [
        ("addresses", "questions", 512), ("addresses", "questions", 1024), ("addresses", "summaries", 512),
        ("addresses", "summaries", 1024), ("code", "questions", 1024),
    ]  # fmt: skip
    far, found = long_range_influence(PROFILE, *KEY, 128, "sum"), head_patterns(PROFILE, *KEY)
    chapter = chapters[1]
    assert (chapter.influence, chapter.rank, chapter.of) == (far[7, 2], int((far > far[7, 2]).sum()) + 1, 90)
    assert (chapter.kind, chapter.lost) == (found.kinds[7, 2], found.lost[7, 2])
    assert chapter.near + chapter.first + chapter.far == pytest.approx(1)
    best = np.unravel_index(far.argmax(), far.shape)
    assert biography.chapter("addresses", KEY, *map(int, best)).rank == 1
    told = biography.told(7, 2)
    ranks = [one.rank for one in chapters]
    assert f"rank {min(ranks)} to {max(ranks)} of 90 by influence" in told
    assert "of 5 tasks and lengths" in told
    titles, rows = biography.table(7, 2)
    assert len(rows) == 5
    assert all(len(row) == len(titles) for row in rows)
    assert sum(biography.counts("addresses", KEY).values()) == 90
    with pytest.raises(ValueError, match="no layer 30, KV head 0"):
        biography.chapters(30, 0)
    with pytest.raises(ValueError, match="no profile 'poems'"):
        biography.patterns("poems", KEY)


def test_a_known_retrieval_head_of_the_recorded_run_is_found() -> None:
    bench = Workbench.open(DEMO)
    biography = bench.panels["Heads"].biography.biography
    assert biography.chapter("this profile", ("questions", 1536), 18, 2).kind == "retrieval"
    assert biography.chapter("this profile", ("questions", 1536), 18, 2).lost_rank == 1
    # What a sink is: nine tenths of what layer 18's head reads for a summary lie there.
    assert biography.chapter("this profile", ("summaries", 1024), 18, 2).kind == "sink"


def test_scores_of_duoattention_are_read_as_published_and_held_against_ours(tmp_path: Path) -> None:
    biography = Biography({"this profile": PROFILE})
    ours = biography.influence("this profile", KEY)
    gates = np.argsort(np.argsort(ours.ravel())).reshape(ours.shape) / ours.size
    gates[0, 0], gates[3, 1] = -1e-4, 1.0001
    file = write_duo(tmp_path / "lr=0.02", gates)
    for path in (file, file.parent):
        scores = read_head_scores(path, SMOL)
        assert (scores.name, scores.method) == ("lr=0.02", "DuoAttention")
        assert (scores.values.min(), scores.values.max()) == (0.0, 1.0)
    biography.add_scores(scores)
    found = biography.agreement("lr=0.02", "this profile", KEY)
    assert found == rank_agreement(ours, scores.values)
    assert found.value > 0.9
    assert biography.table(3, 1)[1][-1][:5] == ["lr=0.02", "DuoAttention", "-", "-", "1"]
    assert biography.told(3, 1).endswith("; DuoAttention (lr=0.02) 1.00.")
    with pytest.raises(ValueError, match="there already"):
        biography.add_scores(scores)


def test_the_interval_of_a_rank_correlation_is_that_of_resampling_without_resampling() -> None:
    random = np.random.default_rng(0)
    for n, share in ((90, 0.9), (90, 0.3), (1000, 0.6)):
        ours = random.normal(size=n)
        theirs = share * ours + (1 - share) * random.normal(size=n)
        found, slow = rank_agreement(ours, theirs), spearman(ours.tolist(), theirs.tolist())
        assert found.value == pytest.approx(slow.value)
        assert (found.low, found.high) == (pytest.approx(slow.low, abs=0.07), pytest.approx(slow.high, abs=0.07))
    assert rank_agreement(ours, np.ones_like(ours)).value == 0
    with pytest.raises(ValueError, match="equally large"):
        rank_agreement(ours, ours[:-1])


def test_scores_of_kvzip_are_read_without_running_what_is_in_the_file(tmp_path: Path) -> None:
    values = torch.rand(30, 3, dtype=torch.bfloat16)
    torch.save(values, tmp_path / "qwen-scbench_qa_eng-0.pt")
    scores = read_head_scores(tmp_path / "qwen-scbench_qa_eng-0.pt", SMOL)
    assert (scores.name, scores.method) == ("qwen-scbench_qa_eng-0", "KVzip")
    assert np.array_equal(scores.values, values.double().numpy())
    single = ModelGeometry(4, 4, 1, 64, 4096)
    torch.save(torch.rand(4), tmp_path / "single.pt")
    assert read_head_scores(tmp_path / "single.pt", single).values.shape == (4, 1)

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "ran",))  # type: ignore[return-value]

    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Evil()))
    torch.save({"scores": values}, tmp_path / "dict.pt")
    (tmp_path / "words.tsv").write_text("a\tb\n")
    (tmp_path / "nan.tsv").write_text("\n".join(["nan\t1\t1"] * 30))
    write_duo(tmp_path / "other", np.ones((32, 8)))
    for name, error, words in (
        ("evil.pt", ValueError, "without running code"),
        ("dict.pt", ValueError, "holds no tensor"),
        ("words.tsv", ValueError, "no table of numbers"),
        ("nan.tsv", ValueError, "finite"),
        ("other", ValueError, "32 x 8 heads, the model has 30 x 3"),
        ("nothing.tsv", FileNotFoundError, "no head scores at"),
    ):
        with pytest.raises(error, match=words):
            read_head_scores(tmp_path / name, SMOL)
    (tmp_path / "scores.csv").write_text("1,2")
    with pytest.raises(ValueError, match=r"\.tsv of DuoAttention or a \.pt of KVzip"):
        read_head_scores(tmp_path / "scores.csv", SMOL)
    assert not (tmp_path / "ran").exists()


def test_the_panel_shows_kinds_and_scores_as_maps_whose_clicks_choose_kv_heads(tmp_path: Path) -> None:
    panel = HeadsPanel(State(profile=PROFILE, plan=make_plan(), n_tokens=1024))
    panel.view.value = "kind of head"
    heat = panel.map.widget.data[0]
    assert np.array_equal(np.asarray(heat.customdata).T, head_patterns(PROFILE, *KEY).kinds)
    panel.map._on_click((2, 11))
    assert (panel.state.layer, panel.state.kv_head) == (11, 2)
    panel.view.value = "others' scores"
    assert "load scores" in said(panel)
    values = np.random.default_rng(0).random((30, 3))
    panel.biography.path.value = str(write_duo(tmp_path / "mine", values))
    press(panel, "Load scores")
    assert said(panel) == ""
    assert panel.biography.versus.value == ("mine", None)
    assert np.allclose(np.asarray(panel.map.widget.data[0].z).T, values)
    expected = rank_agreement(panel.biography.biography.influence("this profile", KEY), values)
    assert f"<b>{expected.value:+.2f}</b>" in panel.biography.counts.value
    assert f"<td>{values[11, 2]:.3g}</td>" in panel.biography.table.value
    panel.view.value = "influence"
    panel.biography.versus.value = ("this profile", ("summaries", 512))
    assert "by influence, this profile: summaries, 512 tokens" in panel.biography.counts.value


def test_the_head_under_the_pointer_is_marked_in_the_other_figures_and_told() -> None:
    panel = HeadsPanel(State(profile=PROFILE))
    base = len(panel.map.widget.layout.shapes)
    panel.map._hovered(panel.map.widget.data[0], type("Points", (), {"point_inds": [(7, 20)]})(), None)
    assert panel.state.hovered == (20, 2)
    assert len(panel.map.widget.layout.shapes) == base, "the figure itself shows what is under the pointer"
    (mark,) = panel.biography.ranks.canvas.widget.layout.shapes
    place = panel.biography.ranks._places[20, 2]
    assert (mark.xanchor, mark.yanchor) == place
    panel.map._hovered(None, None, None)
    assert panel.state.hovered is None
    assert len(panel.biography.ranks.canvas.widget.layout.shapes) == 0
    trace = panel.biography.ranks.canvas.widget.data[0]
    panel.biography.ranks.canvas._hovered(trace, type("Points", (), {"point_inds": [0]})(), None)
    layer, kv_head = (int(index) for index in trace.customdata[0])
    assert panel.state.hovered == (layer, kv_head)
    assert panel.map.widget.layout.shapes[-1].xanchor == layer
    assert len(panel.map.widget.layout.shapes) == base + 1


def test_one_line_tells_of_the_head_under_the_pointer_or_else_the_selected_one() -> None:
    plan = make_plan()
    state = State(profile=PROFILE, plan=plan, n_tokens=1024, layer=4, kv_head=1)
    biography = Biography({"this profile": PROFILE})
    kept = int(plan.spans(1024)[4, 1])
    assert told_head(state, biography) == f"{biography.told(4, 1)} Under {plan.name} it keeps {kept:,} of 1,024 tokens."
    assert told_head(state, None, {(4, 1)}) == f"Layer 4, KV head 1. Under {plan.name} it keeps {kept:,} of 1,024 tokens, pinned."
    state.set(hovered=(9, 0))
    assert told_head(state, biography).startswith(biography.told(9, 0))


def test_keys_move_the_selected_head_on_the_map_in_front_and_space_pins_it() -> None:
    bench = Workbench.open(DEMO)
    heads, budget = bench.panels["Heads"], bench.panels["Budget"]
    for key in ("left", "up", "right", "down", "down", "down"):
        bench.press(key)
    assert (bench.state.layer, bench.state.kv_head, heads.heads.head()) == (1, 1, 3)
    heads.order.value = heads.order.options[1]
    before = heads.heads.row()
    bench.press("right")
    assert (bench.state.layer, heads.heads.row()) == (2, before), "rows are those that are shown"
    bench.show("Budget")
    budget.map.order.value = "span, longest first"
    bench.state.set(layer=29, kv_head=int(budget._answer.spans[29].argmax()))
    bench.press("right")
    assert bench.state.layer == 29, "the last layer"
    bench.press("space")
    assert list(budget.budget.pinned) == [(29, bench.state.kv_head)]
    assert "pinned." in bench.line.box.value
    bench.press("space")
    assert not budget.budget.pinned
    with pytest.raises(ValueError, match="keys are"):
        bench.press("enter")


def test_figures_of_kinds_scores_and_ranks_tell_every_head() -> None:
    kinds = head_patterns(PROFILE, *KEY).kinds
    heat = kind_map(kinds).data[0]
    assert [KINDS[index] for index in np.unique(heat.z)] == [kind for kind in KINDS if kind in kinds]
    assert heat.text[0][0] == kinds[0, 0][0].upper()
    with pytest.raises(ValueError, match="'odd'"):
        kind_map(np.full((2, 2), "odd"))
    values = np.random.default_rng(1).random((30, 3))
    scores = score_map(values, "theirs").data[0]
    assert scores.customdata[int(values[4].argmax())][4] == 1 + (values > values[4].max()).sum()
    fig = ranks_compared(values, values, "ours", "theirs", kinds)
    assert sum(len(trace.x) for trace in fig.data) == 90
    assert all(list(trace.x) == list(trace.y) for trace in fig.data)
    with pytest.raises(ValueError, match="same heads"):
        ranks_compared(values, values[:2], "ours", "theirs")


def test_scores_of_another_model_are_not_loaded_on_the_panel(tmp_path: Path) -> None:
    panel = HeadsPanel(State(profile=PROFILE))
    panel.biography.path.value = str(write_duo(tmp_path / "llama", np.ones((32, 8))))
    press(panel, "Load scores")
    assert "32 x 8 heads" in said(panel)
    assert panel.biography.biography.scores == {}
    assert isinstance(read_head_scores(write_duo(tmp_path / "own", np.ones((30, 3))), SMOL), HeadScores)
