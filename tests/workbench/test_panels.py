"""The budget, measuring and export panels without a browser: what a moved widget changes, and what is said when it cannot."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from figure_records import SMOL, make_front, make_plan, make_profile
from tiny import tiny_model, tiny_tokenizer

from moa_lab.bench.lifelike import lifelike_table
from moa_lab.capacity import estimated_weights_bytes
from moa_lab.models import geometry_of
from moa_lab.plan import Plan, dense_plan, uniform_plan
from moa_lab.records import LossTable, Measurements
from moa_lab.search import BudgetSolver
from moa_lab.workbench import Workbench
from moa_lab.workbench.budget_panel import BudgetPanel
from moa_lab.workbench.export_panel import ExportPanel
from moa_lab.workbench.exporting import PLAN
from moa_lab.workbench.measure_panel import MeasurePanel
from moa_lab.workbench.measuring import KINDS, Measuring
from moa_lab.workbench.state import State
from tests.workbench.hands import at_last, ended, press, said

DEMO = Path(__file__).resolve().parents[2] / "data" / "runs" / "demo"
PROFILE = make_profile(lengths=(512, 1024), samples=2)


@pytest.fixture(scope="module")
def table() -> LossTable:
    return lifelike_table(quick=True)


def test_the_density_box_moves_the_slider_the_plan_and_the_bytes(table: LossTable) -> None:
    state = State(table=table)
    panel = BudgetPanel(state)
    assert isinstance(state.plan, Plan)
    panel.number.value = 0.3
    assert panel.slider.value == 0.3
    assert all(state.plan.density(n) <= 0.3 + 1e-9 for n in panel.budget.lengths)
    assert panel.mib.value == pytest.approx(state.plan.kv_bytes(state.n_tokens) / 2**20, abs=0.01)
    assert f"{state.plan.density(state.n_tokens):.1%}" in panel.facts.value
    panel.mib.value = panel.mib.max * 0.6
    assert panel.slider.value == pytest.approx(0.6, abs=0.01)
    panel.mean.value = 0.4 * panel.budget.n_tokens
    assert panel.slider.value == pytest.approx(0.4, abs=0.001)
    assert panel.mean.value == round(state.plan.spans(state.n_tokens).mean())
    assert all(f"predicted loss at {n:,}" in panel.facts.value for n in table.lengths)
    assert np.array_equal(panel.map.canvas.widget.data[0].z, state.plan.spans(state.n_tokens).T)


def test_the_slider_stands_at_a_step_and_what_the_page_sends_back_of_it_changes_nothing(table: LossTable) -> None:
    panel = BudgetPanel(State(table=table))
    panel.number.value = 0.3333
    assert panel.slider.value == 0.335, "a page would round it, and send that back as a move"
    taken = uniform_plan(table.geometry, 0.5)
    panel.state.set(plan=taken)
    panel.slider.value = 0.33499999999999996
    assert (panel.number.value, panel.state.plan) == (0.3333, taken)
    panel.slider.value = 0.33999999999999997
    assert panel.number.value == 0.34
    assert panel.state.plan.search["density"] == 0.34


def test_a_density_that_cannot_be_had_is_told_and_the_next_that_can_takes_it_away(table: LossTable) -> None:
    panel = BudgetPanel(State(table=table))
    before = panel.state.plan
    panel.number.value = 0.01
    assert "infeasible" in said(panel)
    assert panel.state.plan is before
    panel.number.value = 0.6
    assert said(panel) == ""
    assert panel.state.plan is not before


def test_a_head_that_needs_room_is_pinned_and_the_rest_is_solved_again(table: LossTable) -> None:
    panel = BudgetPanel(State(table=table), density=0.4)
    n = max(panel.budget.lengths)
    plan = panel.give(0, 0, n // 2, n)
    assert panel.holds(plan)
    assert not panel.holds(None)
    assert plan is panel.state.plan
    assert plan.spans(n)[0, 0] >= n // 2
    assert plan.density(n) <= 0.4 + 1e-9
    assert "layer 0, KV head 0" in panel.pins.value
    with pytest.raises(ValueError, match="a span must lie in"):
        panel.give(0, 1, n + 1, n)
    assert list(panel.budget.pinned) == [(0, 0)]


def test_a_plan_from_before_room_was_given_has_its_density_and_its_pins_again(table: LossTable) -> None:
    panel = BudgetPanel(State(table=table), density=0.4)
    n = max(panel.budget.lengths)
    before = panel.state.plan
    after = panel.give(0, 0, n // 2, n)
    assert list(panel.pins_of(after)) == [(0, 0)]
    assert not panel.pins_of(before), "a head is pinned in the plan that was found with it pinned, and in no other"
    panel.number.value = 0.6
    panel.back_to(before)
    assert (panel.budget.density, panel.budget.pinned, panel.pins.value) == (0.4, {}, "no head is pinned")
    assert panel.holds(before)
    panel.back_to(after)
    assert (panel.budget.density, list(panel.budget.pinned)) == (0.4, [(0, 0)])
    panel.number.value = 0.5
    other = panel.state.plan
    panel.back_to(dense_plan(table.geometry))
    assert panel.holds(other), "of a plan that was not found here nothing is known"


def test_the_gpu_of_choice_tells_what_it_holds_and_how_fast(table: LossTable) -> None:
    panel = BudgetPanel(State(table=table), density=0.5)
    plan, n = panel.state.plan, panel.state.n_tokens
    assert panel.served.weights_bytes == pytest.approx(estimated_weights_bytes(plan.geometry), rel=0.01), "never 0 GB"
    assert "estimated" in panel.served.note.value
    panel.served.tokens.value = 4 * n
    assert f"of {4 * n:,} tokens" in panel.facts.value
    assert f"takes {plan.geometry.max_length:,} tokens at most" in panel.facts.value
    panel.served.tokens.value = n
    assert "tokens at most" not in panel.facts.value
    panel.state.set(weights_bytes=5 * 10**9)
    assert (panel.served.weights.value, panel.served.note.value) == (5.0, "of this model, in 16 bits")
    panel.served.weights.value = 0.0
    assert f"{1 / plan.density(n):.1f} times dense" in panel.facts.value
    panel.state.set(weights_bytes=6 * 10**9)
    assert panel.served.weights.value == 0.0, "what was written stays"
    panel.served.gpu.value = "l4"
    assert "sequences on L4 24GB" in panel.facts.value
    panel.served.weights.value = 23.9
    assert "not one sequence of" in panel.facts.value


def test_fewer_bits_buy_longer_spans_at_the_same_bytes(table: LossTable) -> None:
    panel = BudgetPanel(State(table=table), density=0.4)
    before = panel.state.plan
    panel.bits.value = "8"
    assert panel.slider.value == 0.4
    assert (panel.state.plan.widths() == 8).all()
    assert panel.state.plan.density(panel.state.n_tokens) <= 0.4 + 1e-9
    assert panel.state.plan.spans(panel.state.n_tokens).mean() > before.spans(panel.state.n_tokens).mean()
    assert "8 bits" in panel.facts.value
    panel.number.value = 0.01
    assert "density 0.01 at length" in said(panel)
    panel.length.value = max(panel.budget.lengths)
    assert panel.budget.bits == "8"
    panel.bits.value = "16"
    assert panel.state.plan.bits == ()
    # What fewer bits could keep is out of reach again.
    assert panel.slider.value >= panel.slider.min > 0


def test_a_pinned_head_is_told_drawn_and_released(table: LossTable) -> None:
    panel = BudgetPanel(State(table=table))
    panel.layer.value, panel.head.value = 2, 3
    assert (panel.state.layer, panel.state.kv_head) == (2, 3)
    press(panel, "Pin to full")
    n = panel.budget.n_tokens
    assert f"layer 2, KV head 3: {n:,} tokens" in panel.pins.value
    assert panel.state.plan.spans(n)[2, 3] == n
    crosses = next(trace for trace in panel.map.canvas.widget.data if trace.name == "pinned")
    assert (list(crosses.x), list(crosses.y)) == ([2], [3])
    panel.length.value = max(panel.budget.lengths)
    assert panel.state.n_tokens == max(panel.budget.lengths)
    assert "layer 2, KV head 3" in panel.pins.value, "a pin outlives the length that is shown"
    panel.head.value = 1
    panel.span.value = 200
    press(panel, "Pin to span")
    assert len(panel.budget.pinned) == 2
    press(panel, "Release")
    assert list(panel.budget.pinned) == [(2, 3)]
    press(panel, "Release all")
    assert panel.pins.value == "no head is pinned"


def test_the_cap_on_rules_holds_after_the_exact_solve_and_not_before(table: LossTable) -> None:
    panel = BudgetPanel(State(table=table), density=0.4)
    panel.rules.value = 1
    assert "press Solve exactly" in panel.facts.value
    press(panel, "Solve exactly")
    ended(panel.exact)
    at_last(lambda: "exact" in panel.facts.value)
    assert "press Solve exactly" not in panel.facts.value
    assert all(len(set(row)) == 1 for row in panel.state.plan.rules)


def test_a_head_chosen_elsewhere_is_the_one_that_a_pin_is_for(table: LossTable) -> None:
    panel = BudgetPanel(State(table=table))
    panel.state.set(layer=1, kv_head=2)
    assert (panel.layer.value, panel.head.value) == (1, 2)
    ring = next(trace for trace in panel.map.canvas.widget.data if trace.name == "selected")
    assert (ring.x[0], ring.y[0]) == (1, 2)


def test_what_is_measured_is_kept_in_the_history_and_in_the_state(tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=False)
    geometry = geometry_of(model)
    state = State(plan=make_plan(geometry, name="budget"), n_tokens=448, measurements=Measurements((), {"from": "a run"}))
    panel = MeasurePanel(state, lambda: Measuring(model, tiny_tokenizer()), length=448, n=2)
    assert [plan.name for _, plan in panel.plans.options] == ["budget", "dense", "uniform"]
    for box in panel.kinds:
        box.value = False
    press(panel, "Measure")
    assert "choose what to measure" in said(panel)
    panel.kinds[KINDS.index("memory")].value = True
    press(panel, "Measure")
    ended(panel.work)
    at_last(lambda: "budget" in panel.history.value)
    assert state.measurements.settings == {"from": "a run"}
    assert [(row.plan, row.detail[PLAN]) for row in state.measurements] == [("budget", state.plan.identity())]
    panel.file.value = str(tmp_path / "history.json")
    press(panel, "Save history")
    assert "1 rows in" in panel.saved.value
    assert Measurements.load(panel.file.value).rows == state.measurements.rows
    press(panel, "Save history")
    assert "exists: choose another name" in said(panel)


def test_one_job_at_a_time_runs_on_the_model_and_another_model_keeps_the_history() -> None:
    model, go = tiny_model("llama", tie_word_embeddings=False), threading.Event()
    made: list[int] = []

    def make() -> Measuring:
        go.wait(30)
        made.append(1)
        return Measuring(model, tiny_tokenizer())

    panel = MeasurePanel(State(plan=make_plan(geometry_of(model), name="budget"), n_tokens=448), make, length=448, n=1)
    for box, kind in zip(panel.kinds, KINDS, strict=True):
        box.value = kind == "memory"
    press(panel, "Measure")
    press(panel, "Generate")
    assert "the model is busy (Measure)" in said(panel)
    with pytest.raises(ValueError, match="busy"):
        panel.another_model()
    go.set()
    ended(panel.work)
    at_last(lambda: "budget" in panel.history.value)
    panel.another_model()
    press(panel, "Measure")
    ended(panel.work)
    at_last(lambda: panel.history.value.count("KV cache of one sequence") == 2)
    assert len(made) == 2
    assert len(panel.state.measurements.rows) == 2


def test_what_a_run_measured_is_in_the_history_before_anything_is_measured_here() -> None:
    panel = Workbench.open(DEMO).panels["Apply & measure"]
    assert "<td>needles retrieved</td><td>needles</td><td>2,048</td><td>93.8% [71.7%, 98.9%]</td><td>16</td>" in panel.history.value
    assert "<td>lines retrieved</td><td>lines</td>" in Workbench.open(DEMO.parent / "standard-50").panels["Apply & measure"].history.value
    assert "<td>cache</td><td>2,048</td><td>22.5 MiB</td>" in panel.history.value, "what is counted has no interval"
    assert "x86_64 CPU" in panel.history.value


def test_a_loaded_plan_is_offered_and_chosen(tmp_path: Path) -> None:
    panel = MeasurePanel(State(plan=make_plan(), n_tokens=1024), lambda: pytest.fail("no model is needed yet"))
    press(panel, "Load plan")
    assert "there is no plan at" in said(panel)
    make_plan(name="mine", seed=3).save(tmp_path / "mine.json")
    panel.path.value = str(tmp_path / "mine.json")
    press(panel, "Load plan")
    assert [plan.name for plan in panel.plans.value] == ["mine"]


def test_a_new_plan_of_the_state_can_be_measured_and_nothing_is_saved_before() -> None:
    state = State(plan=make_plan(), n_tokens=1024)
    panel = MeasurePanel(state, lambda: pytest.fail("no model is needed yet"))
    state.set(plan=make_plan(name="another", seed=3))
    assert panel.plans.options[0][0].startswith("another (")
    panel.plans.value = ()
    press(panel, "Measure")
    assert "choose at least one plan" in said(panel)
    press(panel, "Save history")
    assert "nothing was measured yet" in said(panel)


def test_the_chosen_formats_are_written_and_nothing_is_replaced_unasked(tmp_path: Path) -> None:
    state = State(profile=PROFILE, front=make_front(), plan=make_plan(), n_tokens=1024)
    panel = ExportPanel(state, tmp_path / "out")
    for box in panel.formats:
        box.value = box.description in ("config card", "HTML report")
    press(panel, "Export")
    ended(panel.work)
    assert said(panel) == ""
    assert state.plan.identity() in panel.done.value
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"my_plan.json", "my_plan.html"}
    press(panel, "Export")
    ended(panel.work)
    assert "allow replacing it" in said(panel)
    assert panel.done.value == ""
    panel.replace.value = True
    press(panel, "Export")
    ended(panel.work)
    assert said(panel) == ""


def test_an_export_goes_on_beside_its_panel_and_can_be_cancelled(table: LossTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = uniform_plan(table.geometry, 0.5)
    panel = ExportPanel(State(table=table, plan=plan, n_tokens=1024), tmp_path)
    for box in panel.formats:
        box.value = box.description in ("config card", "desk page")
    entered, gate, solve = threading.Event(), threading.Event(), BudgetSolver.solve

    def slow(self: BudgetSolver, *given: object) -> object:
        entered.set()
        assert gate.wait(30)
        return solve(self, *given)

    monkeypatch.setattr(BudgetSolver, "solve", slow)
    press(panel, "Export")
    assert entered.wait(30)
    panel.state.set(plan=uniform_plan(table.geometry, 0.25))
    assert "25.0%" in panel.plan.value, "the panel answers meanwhile"
    panel.work.stop()
    gate.set()
    ended(panel.work)
    assert "cancelled" in panel.work.label.value
    assert [path.name for path in tmp_path.iterdir()] == ["my_plan.json"], "half a page is none"
    panel.replace.value = True
    press(panel, "Export")
    panel.state.set(plan=plan)
    ended(panel.work)
    assert said(panel) == ""
    exported = Plan.load(tmp_path / "my_plan.json")
    assert exported.identity() == uniform_plan(table.geometry, 0.25).identity(), "what was chosen when the button was pressed"
    assert exported.identity() in (tmp_path / "my_plan.desk.html").read_text(encoding="utf-8")


def test_without_a_plan_or_a_format_nothing_is_written(tmp_path: Path) -> None:
    panel = ExportPanel(State(), tmp_path / "out")
    press(panel, "Export")
    assert "no plan is chosen" in said(panel)
    panel.state.set(plan=dense_plan(SMOL), n_tokens=1024)
    assert "dense" in panel.plan.value
    for box in panel.formats:
        box.value = False
    press(panel, "Export")
    ended(panel.work)
    assert "choose at least one of config card" in said(panel)
    assert not (tmp_path / "out").exists()
    assert "(config card, Python snippet not ticked)" in panel.launch.value
    panel.formats[0].value = True
    (tmp_path / "out").write_text("")
    press(panel, "Export")
    ended(panel.work)
    assert said(panel) == f"{tmp_path / 'out'} is a file: name a folder"


def test_paths_may_have_blanks_around_them_and_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    panel = ExportPanel(State(plan=make_plan(), n_tokens=1024), " ~/out ")
    assert f"cd {tmp_path}/out &amp;&amp; python my_plan.py" in panel.launch.value
    panel.name.value = " mine "
    press(panel, "Export")
    ended(panel.work)
    assert (tmp_path / "out" / "mine.json").is_file()
    (tmp_path / "run").symlink_to(DEMO)
    bench = Workbench.open(" ~/run ")
    bench.panels["Front"].path.value = " ~/run/front.json "
    press(bench.panels["Front"], "Load front")
    assert said(bench.panels["Front"]) == ""
    bench.run.value = "~/run "
    press(bench, "Open run")
    assert said(bench) == ""


def test_the_recorded_run_opens_with_all_panels_and_its_chosen_plan_is_known_to_be_measured() -> None:
    bench = Workbench.open(DEMO)
    assert list(bench.tabs.titles) == ["Heads", "Budget", "Front", "Which one", "Runs", "Trace", "Apply & measure", "Export"]
    bench.show("Export")
    bench.state.set(plan=Plan.load(DEMO / "plan.json"))
    assert "a report holds 3 measured rows" in bench.panels["Export"].plan.value
    bench.show("Front")
    bench.panels["Front"].pick(bench.state.front.points[0].plan.name)
    bench.show("Budget")
    bench.panels["Budget"].number.value = 0.3
    bench.show("Export")
    assert "not measured yet" in bench.panels["Export"].plan.value
