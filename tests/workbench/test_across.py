"""Several runs over each other: scores against each run's own dense model, fronts of common goals, and what is no run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from figure_records import ORIGIN, make_front, make_measurements, make_plan

from moa_lab.evaluate.compare import excess_over_dense, share_of_hits
from moa_lab.figures import fronts_over
from moa_lab.geometry import ModelGeometry
from moa_lab.plan import Plan
from moa_lab.records import Front, Measurements
from moa_lab.workbench.across import EXCESS, SHARE, Across, read_run
from moa_lab.workbench.across_panel import AcrossPanel
from moa_lab.workbench.state import State
from tests.workbench.hands import press, said
from tests.workbench.lab import PROJECT

RUNS = PROJECT / "data" / "runs"
NAMES = ("demo", "standard-25", "standard-50", "qwen2.5-coder-0.5b-50")


@pytest.fixture(scope="module")
def across() -> Across:
    return Across([RUNS / name for name in NAMES])


def test_scores_are_those_against_each_runs_own_dense_model(across: Across) -> None:
    rows = {row.plan: row for row in across.scores("needles", 2048)}
    assert set(rows) == {f"{name}: {plan}" for name in NAMES for plan in ("moa", "uniform")}
    stored = Measurements.load(RUNS / "standard-25" / "measurements.json")
    ours, dense = (stored.select(plan=plan, task="needles", length=2048)[0] for plan in ("moa", "dense"))
    expected = share_of_hits(ours, dense)
    found = rows["standard-25: moa"]
    assert (found.metric, found.value, found.low, found.high, found.n) == (SHARE, expected.value, expected.low, expected.high, expected.n)
    assert found.detail["line"] == "smollm2, moa, n = 128"
    (text,) = [row for row in across.scores("documents", 16384) if row.plan.endswith("moa")]
    coder = Measurements.load(RUNS / "qwen2.5-coder-0.5b-50" / "measurements.json")
    expected = excess_over_dense(coder.rows, "moa", "documents", 16384)
    assert (text.metric, text.value, text.low, text.high) == (EXCESS, expected.value, expected.low, expected.high)
    assert {row.plan for row in across.scores("needles", 4096, every=True)} > {row.plan for row in across.scores("needles", 4096)}
    with pytest.raises(ValueError, match="no open run measured needles at 1,000 tokens"):
        across.scores("needles", 1000)


def test_what_most_runs_measured_comes_first_and_nothing_that_lacks_a_dense_score(across: Across) -> None:
    places = across.places()
    assert places[0] == ("needles", 2048)
    assert ("documents", 16384) in places
    assert "lines" not in {task for task, _ in places}


def test_goals_are_those_of_all_fronts_and_fronts_are_named_by_model_and_run(across: Across) -> None:
    goals = across.goals()
    assert goals[:2] == ("questions", "summaries")
    assert goals[-1] == "density"
    assert "questions@1024/sum" not in goals, "only the demo's front has it"
    assert list(across.fronts())[1:3] == ["smollm2, standard-25", "smollm2, standard-50"]


def test_models_of_one_name_and_other_weights_are_told_apart(tmp_path: Path) -> None:
    for name, weights in (("a", "aaaa00001111"), ("b", "bbbb00001111")):
        plan = make_plan()
        plan.save(tmp_path / name / "plan.json")
        origin = replace(ORIGIN, weights=weights)
        replace(make_measurements(), provenance=origin).save(tmp_path / name / "measurements.json")
    across = Across([tmp_path / "a", tmp_path / "b"])
    assert [across.model(run) for run in across.runs.values()] == ["smollm2 (aaaa00)", "smollm2 (bbbb00)"]
    across.close(next(iter(across.runs)))
    assert [across.model(run) for run in across.runs.values()] == ["smollm2"]
    with pytest.raises(ValueError, match="is not open"):
        across.close("nowhere")


def test_runs_in_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [tmp_path / owner / "demo" for owner in ("mine", "yours")]
    for folder in folders:
        folder.mkdir(parents=True)
        for record in ("plan.json", "front.json", "measurements.json"):
            (folder / record).symlink_to(PROJECT / "data" / "runs" / "demo" / record)
    across = Across(folders)
    assert list(across.fronts()) == ["smollm2, mine/demo", "smollm2, yours/demo"]
    assert {row.plan.partition(":")[0] for row in across.scores("needles", 2048)} == {"mine/demo", "yours/demo"}


def test_a_folder_without_results_is_refused_by_name(tmp_path: Path) -> None:
    make_measurements().save(tmp_path / "measurements.json")
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match="neither measurements of a plan nor a front"):
            read_run(folder)
    with pytest.raises(ValueError, match="name the folder"):
        Across([" "])


def test_fronts_lie_over_each_other_each_with_its_own_line() -> None:
    other = make_front(ModelGeometry(4, 4, 2, 16, 8192), count=5)
    first, second = "questions@2048/all_or_nothing", "density"
    fig = fronts_over({"one": make_front(), "two": other}, first, second)
    markers = [trace for trace in fig.data if trace.mode == "markers"]
    assert [trace.name for trace in markers] == ["one", "two"]
    assert [len(trace.x) for trace in markers] == [14, 5]
    assert list(markers[1].x) == [point.predicted[first] for point in other]
    lines = [trace for trace in fig.data if trace.mode == "lines"]
    assert [line.line.color for line in lines] == [trace.marker.color for trace in markers]
    assert lines[0].line.color != lines[1].line.color
    with pytest.raises(ValueError, match="no plan of two has both"):
        fronts_over({"one": make_front(), "two": Front((), ("density",))}, first, second)
    with pytest.raises(ValueError, match="no front"):
        fronts_over({}, first, second)


def test_the_panel_reads_nothing_before_it_is_asked_and_says_what_it_cannot_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(PROJECT)
    panel = AcrossPanel(State())
    assert "no run is compared" in panel.table.value
    assert panel.measured.layout.display == panel.predicted.layout.display == "none"
    panel.path.value = str(tmp_path)
    press(panel, "Add run")
    assert "neither measurements of a plan nor a front" in said(panel)
    panel.path.value = str(RUNS / "standard-25")
    press(panel, "Add run")
    assert said(panel) == ""
    assert {trace.name for trace in panel.scores.widget.data} == {"smollm2, moa, n = 128", "smollm2, uniform, n = 128"}
    panel.every.value = True
    assert len(panel.scores.widget.data) > 2
    press(panel, "Remove")
    assert panel.measured.layout.display == "none"


def test_a_head_is_told_of_in_every_run_with_its_span_and_where_there_is_a_profile_its_kind(across: Across) -> None:
    titles, rows = across.head(18, 2)
    assert all(len(row) == len(titles) for row in rows)
    by_run = {Path(row[0]).name: row for row in rows}
    plan = Plan.load(RUNS / "standard-25" / "plan.json")
    n = max(plan.lengths)
    assert by_run["standard-25"][3].startswith(f"{int(plan.spans(n)[18, 2]):,} of {n:,} tokens, rank ")
    assert by_run["standard-25"][4] == "the run keeps no profile"
    assert "retrieval in 2" in by_run["demo"][4]
    assert by_run["qwen2.5-coder-0.5b-50"][4] == "no such head: 24 x 2"


def test_the_runs_panel_follows_the_selected_head() -> None:
    state = State(plan=make_plan())
    panel = AcrossPanel(state, Across([RUNS / "demo"]))
    assert "Layer 0, KV head 0" in panel.head.value
    state.set(layer=18, kv_head=2)
    assert "Layer 18, KV head 2" in panel.head.value
    assert "retrieval in 2" in panel.head.value
