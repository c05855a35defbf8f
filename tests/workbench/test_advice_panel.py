"""The panel that says which measured plan to take, and what is behind it, without a browser."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from moa_lab.bench.lifelike import lifelike_table
from moa_lab.capacity import GPUS, capacity
from moa_lab.evaluate.options import Wish, options_of
from moa_lab.evaluate.over_bytes import scores_over_bytes
from moa_lab.plan import Plan, dense_plan
from moa_lab.records import Measurement, Measurements
from moa_lab.workbench.advice_panel import AdvicePanel
from moa_lab.workbench.advising import Advising
from moa_lab.workbench.budget_panel import BudgetPanel
from moa_lab.workbench.jobs import Handle
from moa_lab.workbench.measuring import Entry
from moa_lab.workbench.nearest import lost_text
from moa_lab.workbench.opening import open_run
from moa_lab.workbench.state import State
from tests.workbench.hands import at_last, press, said

RUNS = Path(__file__).resolve().parents[2] / "data" / "runs"
HALF, QUARTER = RUNS / "standard-50", RUNS / "standard-25"


def smollm2() -> State:
    return State(measurements=Measurements.load(HALF / "measurements.json"), n_tokens=4096)


@pytest.fixture
def panel() -> AdvicePanel:
    return AdvicePanel(smollm2())


def test_runs_of_the_same_model_are_found_and_others_left_out() -> None:
    found = Advising(smollm2()).options(known=[HALF, QUARTER, RUNS / "qwen2.5-coder-0.5b-50", RUNS / "nothing"])
    assert sorted(option.source for option in found) == ["standard-25", "standard-50"]
    with pytest.raises(ValueError, match="no measured run of this model is known"):
        Advising(State()).options(known=[HALF])


def test_a_wish_is_answered_shown_and_taken(panel: AdvicePanel) -> None:
    panel.folders.value = f"{HALF}, {QUARTER}"
    panel.needles.number.value = 80.0
    press(panel, "Recommend")
    assert "Take moa (standard-25)" in panel.told.value
    assert "fewer bytes was measured" in panel.told.value
    assert "standard-50" in panel.table.value
    assert panel.canvas.box.layout.display == ""
    assert {trace.name for trace in panel.canvas.widget.data} >= {"moa (standard-25, -50)"}
    press(panel, "Take it")
    assert panel.state.plan.density(4096) == pytest.approx(0.25, abs=0.01)
    # Words cost more: 25% is not sure to stay within 5%.
    panel.perplexity.wanted.value, panel.perplexity.number.value = True, 5.0
    press(panel, "Recommend")
    assert "Take moa (standard-50)" in panel.told.value
    assert "but is not sure to hold: perplexity of documents" in panel.told.value


def test_it_answers_at_once_and_follows_every_wish() -> None:
    panel = AdvicePanel(smollm2())
    first = Advising(smollm2()).advise()
    assert first.plan is not None
    assert panel.advising.advice.plan.identity() == first.plan.identity()
    assert "Take moa" in panel.told.value
    assert "0.9 asked" in panel.told.value
    assert not panel.take.disabled
    panel.needles.number.value = 80.0
    assert "0.8 asked" in panel.told.value
    panel.needles.number.value = 100.0
    assert "No measured plan meets the wish" in panel.told.value
    panel.needles.wanted.value = False
    assert "nothing is asked for" in said(panel)
    assert panel.told.value == ""
    panel.needles.wanted.value = True
    assert (said(panel), panel.take.disabled) == ("", True)


def test_so_many_sequences_at_once_narrow_the_choice_on_the_gpu_and_length_that_are_set(panel: AdvicePanel) -> None:
    panel.on.gpu.value, panel.on.tokens.value = "rtx-4090", 32768
    before = panel.advising.advice.plan
    held = capacity(GPUS["rtx-4090"], panel.on.weights_bytes, before.kv_bytes(32768)).batch
    panel.sequences.number.value = held + 1
    assert panel.advising.advice.plan is before, "not asked for yet"
    panel.sequences.wanted.value = True
    assert panel.advising.advice.plan is not before
    panel.sequences.number.value = held
    assert panel.advising.advice.plan is before
    assert f"{held:,} sequences of 32,768 tokens at once on RTX 4090 24GB, {held:,} asked" in panel.told.value
    assert "at 32,768 nobody knows what it loses" in panel.told.value
    # A GPU of more memory holds more, and is asked at once.
    panel.sequences.number.value, panel.on.gpu.value = held + 1, "h200"
    assert "on H200 141GB" in panel.told.value
    assert panel.advising.advice.plan is before


def test_a_model_without_measured_runs_is_told_so_and_nothing_is_called_an_error() -> None:
    panel = AdvicePanel(State())
    assert "no measured run of this model is known" in panel.told.value
    assert (said(panel), panel.take.disabled) == ("", True)


def test_where_no_plan_holds_nothing_can_be_taken(panel: AdvicePanel) -> None:
    panel.folders.value = str(HALF)
    panel.needles.number.value = 99.0
    press(panel, "Recommend")
    assert "No measured plan meets the wish" in panel.told.value
    assert panel.take.disabled
    with pytest.raises(ValueError, match="no plan is recommended"):
        panel.advising.take()


def test_what_the_gpu_of_choice_holds_is_told_of_every_plan_also_where_none_holds_the_wish(panel: AdvicePanel) -> None:
    panel.folders.value = f"{HALF},{QUARTER}"
    panel.needles.number.value = 150.0
    assert (panel.needles.number.value, said(panel)) == (100.0, ""), "nobody finds more than the dense model for sure"
    panel.needles.number.value, panel.on.gpu.value = 99.0, "rtx-4090"
    panel.on.tokens.value = 32768
    press(panel, "Recommend")
    assert panel.advising.advice.plan is None
    plans = [dense_plan(panel.advising.advice.judged[0].option.plan.geometry), *(one.option.plan for one in panel.advising.advice.judged)]
    held = [capacity(GPUS["rtx-4090"], panel.on.weights_bytes, plan.kv_bytes(32768)) for plan in plans]
    assert held[0].batch < min(one.batch for one in held[1:])
    for one in held:
        assert f"<td>{one.batch:,} sequences, {one.tokens_s:,.0f} tokens/s</td>" in panel.table.value
    assert "on RTX 4090 24GB, 32,768 tokens each" in panel.table.value
    assert "the model takes 8,192 tokens at most" in panel.table.value
    panel.needles.number.value = 50.0
    assert "the model takes 8,192 tokens at most" in panel.served.value
    assert "at most" not in panel.table.value.rpartition("</table>")[2], "told once"
    panel.on.tokens.value = 4096
    assert "4,096 tokens each" in panel.table.value
    assert "at most" not in panel.table.value.rpartition("</table>")[2]


def test_a_speed_is_foretold_on_the_gpu_of_choice(panel: AdvicePanel) -> None:
    panel.folders.value = f"{HALF},{QUARTER}"
    panel.needles.wanted.value, panel.speed.wanted.value, panel.on.gpu.value = False, True, "l4"
    panel.speed.number.value = 10.0
    press(panel, "Recommend")
    assert "tokens/s foretold, 10 asked" in panel.told.value
    assert panel.wish().gpu.name == "L4 24GB"


def test_nothing_wished_for_and_folders_without_plans_are_told(panel: AdvicePanel) -> None:
    panel.needles.wanted.value = False
    press(panel, "Recommend")
    assert "nothing is asked for" in said(panel)
    panel.needles.wanted.value, panel.folders.value = True, str(RUNS.parent / "texts")
    press(panel, "Recommend")
    assert "holds no measured plan" in said(panel)
    assert (panel.told.value, panel.take.disabled) == ("", True)


def test_a_script_can_ask_as_well() -> None:
    advising = Advising(smollm2())
    advice = advising.advise(Wish(needles=0.8), f"{HALF},{QUARTER}")
    assert advice.plan is not None
    advising.take()
    assert advising.state.plan is advice.plan
    served = {"gpu": GPUS["l4"], "weights_bytes": 270_000_000, "n_tokens": 4096}
    dense = capacity(GPUS["l4"], 270_000_000, dense_plan(advice.plan.geometry).kv_bytes(4096)).batch
    assert advising.advise(Wish(sequences=3 * dense, **served), f"{HALF},{QUARTER}").plan.density(4096) == pytest.approx(0.25, abs=0.01)
    assert advising.advise(Wish(sequences=5 * dense, **served), f"{HALF},{QUARTER}").plan is None
    rows = scores_over_bytes(advising.options(f"{HALF},{QUARTER}"), "needles", 4096)
    assert {row.plan for row in rows} == {"dense", "moa (standard-25, -50)-25", "moa (standard-25, -50)-49.9"}


def test_measured_scores_stand_beside_the_budget_and_follow_its_density() -> None:
    state = replace(open_run(RUNS / "demo"))
    panel = BudgetPanel(state)
    assert panel.curves.box.layout.display == ""
    assert next(task for task, _ in panel.curves.places) == "needles"
    panel.number.value = 0.4
    (line,) = panel.curves.canvas.widget.layout.shapes
    assert line.x0 == line.x1 == pytest.approx(100 * state.plan.density(panel.curves.place.value[1]))
    rows = panel.curves._drawn
    nearest = min((row for row in rows if row.density < 1), key=lambda row: (abs(row.density - line.x0 / 100), -row.n))
    assert f"Measured nearest, at {100 * nearest.density:.1f}%: " in panel.curves.nearest.value
    assert f": {nearest.value:.1%} [" in panel.curves.nearest.value
    assert f"({nearest.detail['run']}, n = {nearest.n})" in panel.curves.nearest.value
    assert "; dense " in panel.curves.nearest.value
    panel.curves.place.value = panel.curves.places[-1]
    assert "own answers" in {value: name for name, value in panel.curves.place.options}[panel.curves.places[-1]]
    assert len(panel.curves.canvas.widget.layout.shapes) == 1


def test_a_density_is_marked_where_its_plan_lies_at_the_length_that_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    options = options_of([RUNS / "smollm2-135m-25", RUNS / "smollm2-135m-50"])
    monkeypatch.setattr(Advising, "options", lambda _: options)
    state = replace(open_run(RUNS / "demo"))
    panel = BudgetPanel(state)
    panel.number.value = 0.9
    assert state.plan.density(8192) < 0.5, "its longest rule is of 3,072 tokens"
    assert "Measured at 25.0% and 8,192 tokens" in panel.curves.lost.value
    for place in (("needles", 8192), ("needles", 2048)):
        panel.curves.place.value = place
        (line,) = panel.curves.canvas.widget.layout.shapes
        assert line.x0 == pytest.approx(100 * state.plan.density(place[1]))
    assert "Measured nearest, at 50.0%" in panel.curves.nearest.value


def test_the_budget_says_so_where_another_plan_is_shown_and_measures_its_own() -> None:
    state = replace(open_run(RUNS / "demo"))
    panel = BudgetPanel(state, measuring=FakeMeasuring)
    assert panel.elsewhere.layout.display == "none"
    own = state.plan
    state.set(plan=Plan.load(RUNS / "smollm2-135m-25" / "plan.json"))
    assert "the plan moa, chosen elsewhere" in panel.elsewhere.value
    press(panel.curves, "Measure this density")
    at_last(lambda: bool(panel.curves.now))
    assert panel.curves.now[0].density == pytest.approx(own.density(2048))
    panel.number.value = 0.4
    assert panel.elsewhere.layout.display == "none"


def test_without_measured_runs_the_budget_shows_no_empty_figure() -> None:
    panel = BudgetPanel(State(table=lifelike_table(quick=True)))
    assert panel.curves.box.layout.display == "none"
    panel.number.value = 0.4
    assert said(panel) == ""


class FakeMeasuring:
    """Tells a row a plan, as `Measuring` does."""

    def measure(self, plans: Sequence[Plan], kinds: Sequence[str], length: int, n: int, seed: int, handle: Handle) -> list[Entry]:
        assert kinds == ["retrieval"]
        rows = [Measurement(plan.name, "retrieval", "needles", length, 0.5, n, 0.2, 0.8, plan.density(length)) for plan in plans]
        return [Entry(row, "", "cpu", "tiny") for row in rows]


def test_a_density_is_measured_beside_what_runs_measured() -> None:
    state = replace(open_run(RUNS / "demo"))
    panel = BudgetPanel(state, measuring=FakeMeasuring)
    panel.curves.texts.value = 8
    panel.number.value = 0.4
    press(panel.curves, "Measure this density")
    at_last(lambda: bool(panel.curves.now))
    (row,) = panel.curves.now
    assert row.plan == f"measured now, n = 8-{100 * row.density:.3g}"
    assert row.density == pytest.approx(state.plan.density(row.length))
    at_last(lambda: any("measured now" in trace.name for trace in panel.curves.canvas.widget.data))
    panel.curves.place.value = next(place for place in panel.curves.places if place[0] == "summaries")
    press(panel.curves, "Measure this density")
    assert "measured by a run" in said(panel)


def test_without_measured_runs_the_dense_model_is_measured_too() -> None:
    panel = BudgetPanel(State(table=lifelike_table(quick=True)), measuring=FakeMeasuring)
    assert panel.curves.box.layout.display == ""
    assert panel.curves.canvas.box.layout.display == "none"
    press(panel.curves, "Measure this density")
    at_last(lambda: len(panel.curves.now) == 2)
    assert {row.plan.partition(",")[0] for row in panel.curves.now} == {"dense", "measured now"}
    at_last(lambda: panel.curves.canvas.box.layout.display == "")


def test_what_a_density_loses_is_told_in_one_sentence_of_the_run_that_is_nearest() -> None:
    panel = BudgetPanel(replace(open_run(RUNS / "demo")))
    panel.number.value = 0.25
    told = panel.curves.lost.value
    start = "Measured at 25.0% and 2,048 tokens, the nearest (smollm2-135m-25): needles 93.0% [90.4%, 94.9%], dense 98.4%; "
    assert start in told
    for task in ("documents", "own answers"):
        assert re.search(rf"{task} \d\.\d{{3}} \[\d\.\d{{3}}, \d\.\d{{3}}\], dense \d\.\d{{3}} nats a token", told)
    panel.number.value = 0.5
    assert "Measured at 50.0% and 2,048 tokens, the nearest (smollm2-135m-50)" in panel.curves.lost.value
    assert lost_text((), lambda _: 0.5) == ""


def test_a_gpu_and_a_length_are_chosen_once_for_all_panels() -> None:
    state = replace(open_run(RUNS / "demo"))
    budget, advice = BudgetPanel(state), AdvicePanel(state)
    advice.on.gpu.value, advice.on.tokens.value = "l4", 8192
    assert (budget.served.gpu.value, budget.served.n_tokens) == ("l4", 8192)
    assert f"on {GPUS['l4'].name}" in budget.facts.value
    budget.served.gpu.value = "a10"
    assert advice.on.gpu.value == "a10"
    assert AdvicePanel(state).on.gpu.value == "a10", "also a panel that is made later"
    assert AdvicePanel(state).on.n_tokens == 8192


def test_another_gpu_is_told_by_its_memory_and_how_fast_it_reads_in_all_panels() -> None:
    state = replace(open_run(RUNS / "demo"))
    budget, advice = BudgetPanel(state), AdvicePanel(state)
    assert budget.served.memory.layout.display == "none"
    advice.on.gpu.value = "l4"
    advice.on.gpu.value = "another"
    # Begun from what was chosen before.
    assert advice.on.memory.value == round(GPUS["l4"].memory_bytes / 1e9, 1)
    assert advice.on.reads.value == round(GPUS["l4"].read_bytes_s / 1e9)
    assert budget.served.memory.layout.display is None
    advice.on.memory.value = 31.0
    advice.on.reads.value = 700.0
    for on in (advice.on, budget.served):
        assert (on.gpu.value, on.memory.value, on.reads.value) == ("another", 31.0, 700.0)
        assert on.device.memory_bytes == 31 * 10**9
        assert on.device.read_bytes_s == 700e9
    plan, n = state.plan, budget.served.n_tokens
    held = capacity(budget.served.device, budget.served.weights_bytes, plan.kv_bytes(n)).batch
    assert f"{held:,} of {n:,} tokens" in budget.facts.value
    assert "on another GPU" in budget.facts.value
    budget.served.memory.value = 0.0
    assert "a GPU has some GB" in budget.errors.box.value
    budget.served.memory.value = 12.0
    assert budget.errors.box.value == ""
    assert AdvicePanel(state).on.device.memory_bytes == 12 * 10**9, "also a panel that is made later"
