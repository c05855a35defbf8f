"""Opening a run: what its folder holds, which runs there are, which model they are of."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path

import plotly.graph_objects as go
import pytest
import torch
from figure_records import make_chosen, make_front, make_plan, make_profile, make_validation

from moa_lab.geometry import ModelGeometry
from moa_lab.plan import dense_plan
from moa_lab.storage import RecordError
from moa_lab.workbench import Workbench, desk
from moa_lab.workbench.exporting import PLAN
from moa_lab.workbench.opening import DEMO, default_run, known_runs, model_of, model_title, named, open_run
from moa_lab.workbench.page import BUNDLE, Figure
from moa_lab.workbench.state import State
from tests.workbench.hands import at_last, below, ended, press, said

STANDARD = DEMO.parent / "standard-50"


def test_the_recorded_run_has_all_records_and_its_chosen_plan_is_the_one_that_was_measured() -> None:
    state = open_run(DEMO)
    assert None not in (state.profile, state.table, state.front, state.plan)
    assert state.plans == (state.plan,)
    assert {row.detail[PLAN] for row in state.measurements if row.plan == "moa"} == {state.plan.identity()}
    assert model_of(state) == "smollm2"


def test_a_run_without_profile_and_table_has_the_length_of_its_front() -> None:
    state = open_run(STANDARD)
    assert (state.profile, state.table) == (None, None)
    assert state.n_tokens == max(int(n) for point in state.front for n in point.density)


def test_a_plan_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    make_profile(lengths=(512,), samples=1).save(tmp_path / "profile.safetensors")
    dense_plan(ModelGeometry(1, 1, 1, 8, 512)).save(tmp_path / "plan.json")
    with pytest.raises(ValueError, match=r"plan\.json is of another model than profile\.safetensors: it has 1 layers"):
        open_run(tmp_path)


def test_a_profile_alone_gives_a_loss_table(tmp_path: Path) -> None:
    make_profile(lengths=(512,), samples=1).save(tmp_path / "profile.safetensors")
    table = open_run(tmp_path).table
    assert (table.profiled_lengths, table.lengths) == ((512,), (512, 1024))
    assert model_of(State()) == "smollm2"


def test_a_folder_without_records_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="moa-lab run --out"):
        open_run(tmp_path)


def test_runs_are_found_once_and_the_one_that_the_lab_was_given_is_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b", "a"):
        make_front().save(tmp_path / name / "front.json")
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("MOA_LAB_RUN", str(tmp_path / "b"))
    assert default_run() == tmp_path / "b"
    assert [path.name for path in known_runs((tmp_path, tmp_path, tmp_path / "nowhere"))] == ["b", "a"]
    monkeypatch.delenv("MOA_LAB_RUN")
    assert default_run() == DEMO
    assert DEMO in known_runs()


def test_a_run_is_named_from_the_working_folder_where_that_is_shorter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    assert named(tmp_path / "runs" / "mine") == str(Path("..", "runs", "mine"))
    assert named(Path("/x")) == str(Path("/x").resolve())


def test_another_run_is_opened_in_place_of_the_first_with_the_panels_that_it_has_records_for(tmp_path: Path) -> None:
    bench = Workbench.open()
    assert bench.model.value == "smollm2"
    assert Path(bench.run.value).resolve() == DEMO
    assert bench.run.value in bench.run.options
    bench.dark.value = True
    bench.run.value = str(tmp_path)
    press(bench, "Open run")
    assert "holds no profile" in said(bench)
    before = bench.state
    assert before.profile is not None
    bench.run.value = str(STANDARD)
    press(bench, "Open run")
    assert said(bench) == ""
    assert list(bench.tabs.titles) == ["Heads", "Front", "Which one", "Runs", "Trace", "Apply & measure", "Export"]
    assert bench.state.dark
    assert (bench.state.tab, bench.state.plan.name) == ("Heads", "moa")
    bench.show("Apply & measure")
    assert "moa (" in bench.panels["Apply & measure"].plans.options[0][0]
    with pytest.raises(ValueError, match="no panel 'Budget'"):
        bench.show("Budget")
    bench.reopen(DEMO)
    assert list(bench.tabs.titles) == ["Heads", "Budget", "Front", "Which one", "Runs", "Trace", "Apply & measure", "Export"]


class _Model:
    """As much of a model as is asked for: its name, its weights, where it is."""

    def __init__(self, name: str) -> None:
        self.name, self.device = name, torch.device("cpu")

    def parameters(self) -> list[torch.Tensor]:
        return [torch.empty(1000, device="meta")]


class _Measuring:
    def __init__(self, model: _Model, _: object) -> None:
        self.model, self.history, self.go = model, [], threading.Event()

    def measure(self, *_: object) -> list[object]:
        assert self.go.wait(20)
        return []


def test_a_model_that_is_named_while_another_is_at_work_is_refused_and_the_name_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desk, "load_model", lambda name: (_Model(name), None))
    monkeypatch.setattr(desk, "Measuring", _Measuring)
    bench = Workbench.open()
    panel = bench.panels["Apply & measure"]
    press(panel, "Measure")
    at_last(lambda: panel._measuring is not None)
    bench.model.value = "another"
    assert "busy (Measure)" in said(bench)
    assert bench.model.value == "smollm2"
    panel._measuring.go.set()
    ended(panel.work)
    bench.model.value = " another "
    assert said(bench) == ""
    press(panel, "Measure")
    at_last(lambda: panel._measuring is not None)
    panel._measuring.go.set()
    ended(panel.work)
    assert panel._measuring.model.name == "another"


def test_the_weights_of_a_model_count_for_the_run_that_it_was_loaded_for_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()

    def load(name: str) -> tuple[_Model, None]:
        assert go.wait(20)
        return _Model(name), None

    monkeypatch.setattr(desk, "load_model", load)
    bench = Workbench.open()
    loading = threading.Thread(target=bench._loaded)
    loading.start()
    bench.reopen(DEMO.parent / "qwen2.5-coder-0.5b-50")
    go.set()
    loading.join()
    assert bench.state.weights_bytes == 0
    bench._loaded()
    assert bench.state.weights_bytes == 2000


def test_where_the_runs_plan_is_worse_than_a_simple_one_the_first_line_says_so(tmp_path: Path) -> None:
    make_front().save(tmp_path / "front.json")
    make_chosen().save(tmp_path / "plan.json")
    make_validation().save(tmp_path / "validation.json")
    (tmp_path / "summary.json").write_text(json.dumps({"worse": ["moa is worse than <uniform> here."]}))
    bench = Workbench.open(tmp_path)
    assert bench.state.validation == make_validation()
    # What tells the page's width shows nothing.
    shown = [widget for widget in bench.box.children[2:] if hasattr(widget, "value") and widget.layout.display != "none"]
    assert re.sub(r"<[^>]+>", "", shown[0].value) == "moa is worse than &lt;uniform&gt; here."
    bench.reopen(STANDARD)
    assert bench.state.worse == ()
    assert bench.worse.layout.display == "none"


def test_a_validation_that_cannot_be_read_is_refused_by_name(tmp_path: Path) -> None:
    make_front().save(tmp_path / "front.json")
    make_validation(chosen=None).save(tmp_path / "validation.json")
    with pytest.raises(RecordError, match=r"validation\.json: field chosen"):
        open_run(tmp_path)


def test_the_page_says_whether_figures_are_dark() -> None:
    bench = Workbench(State(front=make_front(), plan=make_plan()))
    theme = bench.box.children[1]
    theme.dark = True
    assert bench.state.dark
    bench.dark.value = False
    assert not bench.state.dark, "the button decides until the page changes again"


def test_a_figure_reaches_the_page_filled_and_only_when_its_panel_is_in_front() -> None:
    bench = Workbench.open()
    budget, heads, front = (bench.panels[title] for title in ("Budget", "Heads", "Front"))
    assert len(heads.map.box.children) == 1
    assert [canvas.box.children for canvas in (budget.map.canvas, front.scatter, front.parallel)] == [(), (), ()]
    with pytest.raises(ValueError, match="nothing was drawn"):
        assert budget.map.canvas.widget
    bench.show("Budget")
    found = budget.map.canvas.widget.get_state()
    assert found["_widget_data"][0]["type"] == "heatmap"
    assert found["_widget_layout"]["width"] > 0
    assert found["_config"]["showSendToCloud"] is False


def test_plotly_is_brought_to_the_page_once_for_all_figures() -> None:
    first, second = (Figure(go.Figure(go.Scatter(y=[1, 2]))).get_state() for _ in range(2))
    assert len(first["_esm"]) == len(second["_esm"]) < 5000
    assert BUNDLE.is_file()
    sent = {name for name in Figure.class_trait_names() if name.startswith("_py2js_")}
    assert sent == {f"_py2js_{name}" for name in re.findall(r'"(\w+)"', first["_esm"].partition("const SENT = [")[2].partition("]")[0])}


@pytest.mark.parametrize(
    ("name", "title"),
    [("models/gemma-3-270m.gguf", "gemma-3-270m"), ("/a/b/mine", "mine"), ("owner/name", "owner/name"), ("smollm2", "smollm2")],
)
def test_a_model_is_shown_by_its_own_name_wherever_it_lay(name: str, title: str) -> None:
    assert model_title(name) == title


def test_no_box_has_null_for_a_tooltip() -> None:
    bench = Workbench.open()
    boxes = [box for title in bench.panels for box in below(bench.panels[title].box)] + below(bench.box)
    described = [box for box in boxes if hasattr(box, "description_allow_html")]
    assert len(described) > 80
    assert [box.description for box in described if box.tooltip is None and box.description] == []


def test_a_panel_is_made_at_the_first_look_and_the_budgets_plan_is_there_before() -> None:
    bench = Workbench.open()
    assert list(bench.panels.made) == ["Heads"]
    assert "Budget" in bench.panels
    plan = bench.state.plan
    assert (plan.name, bench.state.n_tokens) == ("budget", 1536)
    other = bench.state.plans[0]
    bench.state.set(plan=other)
    bench.tabs.selected_index = list(bench.panels).index("Budget")
    budget = bench.panels.made["Budget"]
    assert bench.state.plan is other, "a look at the budget chooses nothing"
    assert budget.holds(plan)
    assert budget.map.canvas.widget.data[0].z.tolist() == plan.spans(1536).T.tolist()
    budget.number.value = 0.3
    assert budget.holds(bench.state.plan)
