"""The trace panel without a browser: a click on a token shows heads, room brings an answer back, undo takes it away."""

from __future__ import annotations

import re
import threading
from dataclasses import replace

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from tiny_plans import mixed_plan, small_plan

from moa_lab.models import geometry_of
from moa_lab.plan import dense_plan, with_span
from moa_lab.workbench import tracing as tracing_module
from moa_lab.workbench.room import GAP, WIDEST, room
from moa_lab.workbench.state import State
from moa_lab.workbench.token_heads import LIST
from moa_lab.workbench.trace_panel import TracePanel
from moa_lab.workbench.tracing import Tracing
from tests.workbench.hands import at_last, ended, press, said

torch.set_num_threads(1)


def panel_of(family: str = "llama", plan: object = small_plan) -> TracePanel:
    model = tiny_model(family)
    panel = TracePanel(State(plan=plan(model)), lambda: Tracing(model, tiny_tokenizer()), length=480)  # type: ignore[operator]
    panel.kind.value, panel.text.value, panel.new.value = "prompt", 60, 6
    return panel


def asked(family: str = "llama", plan: object = small_plan) -> TracePanel:
    panel = panel_of(family, plan)
    press(panel, "Answer")
    ended(panel.work)
    assert said(panel) == ""
    return panel


def texts(panel: TracePanel) -> list[str]:
    return [button.description for button in panel.tokens.box.children]


def plain(html: str) -> str:
    return re.sub(r"<[^>]+>", "", html)


@pytest.mark.parametrize("kind", ["prompt", "needle", "lost needle"])
def test_one_progress_runs_over_all_steps_of_an_answer_and_says_which_it_is_at(kind: str) -> None:
    panel, done, steps = panel_of(), [], []
    panel.kind.value = kind
    panel.work.bar.observe(lambda change: done.append(change["new"] / panel.work.bar.max), "value")
    panel.work.label.observe(lambda change: steps.append(change["new"]), "value")
    press(panel, "Answer")
    ended(panel.work)
    assert done == sorted(done), "a bar that starts again tells nothing"
    told = " ".join(steps)
    assert "running: looking for a lost sample" in told if kind == "lost needle" else "running: the dense model answers" in told
    if said(panel) == "":
        assert done[-1] > 0.6
        assert "running: the plan answers" in told
        assert "running: heads behind the token" in told


@pytest.mark.parametrize("family", ["llama", "mqa", "gemma3", "gpt_oss", "gpt_neox"])
def test_a_prompt_is_answered_and_a_click_on_a_token_shows_its_heads(family: str) -> None:
    panel = asked(family)
    assert len(texts(panel)) == 6
    assert panel.behind.layout.display == ""
    panel.tokens.box.children[4].click()
    ended(panel.work)
    assert "selected" in panel.tokens.box.children[4]._dom_classes
    assert plain(panel.why.value)
    geometry = geometry_of(panel._tracing.model)
    assert panel.token.map.widget.data[0].z.shape == (geometry.kv_heads, geometry.layers)
    assert 0 < len(panel.token.heads.box.children) <= min(9, geometry.layers * geometry.kv_heads)
    panel.token.heads.box.children[-1].click()
    assert f"What layer {panel.state.layer}, KV head {panel.state.kv_head} read" in panel.token.where.value
    assert "<svg" in panel.token.reach.value
    assert "moa-text" in panel.token.read.value


def test_sink_and_window_of_a_head_that_sees_everything_are_all_tokens_and_none_twice() -> None:
    panel = asked("llama", lambda model: dense_plan(geometry_of(model)))
    sink, window = (int(count.replace(",", "")) for count in re.findall(r"(?:sink|window), ([\d,]+) tokens", panel.token.reach.value))
    assert sink + window == panel._tracing.trace.position


def test_the_head_under_the_pointer_is_the_same_in_the_list_on_the_map_and_in_what_it_read() -> None:
    panel = asked()
    token, state = panel.token, panel.state
    rows = token.heads.box.children
    number = next(index for index, row in enumerate(rows) if "selected" not in row._dom_classes)
    base, before = len(token.map.widget.layout.shapes), token.where.value
    panel.errors.show("an error that was not read yet")
    token.pointed._handle_custom_msg({"over": number}, [])
    layer, kv_head = state.hovered
    assert rows[number].description.split()[:2] == [str(layer), str(kv_head)]
    assert "pointed" in rows[number]._dom_classes
    assert f"What layer {layer}, KV head {kv_head} read" in token.where.value
    assert f"layer {layer}, KV head {kv_head}:" in token.reach.value
    mark = token.map.widget.layout.shapes[base]
    assert (mark.xanchor, mark.yanchor) == (layer, kv_head)
    token.pointed._handle_custom_msg({"over": None}, [])
    assert state.hovered is None
    assert (token.where.value, len(token.map.widget.layout.shapes)) == (before, base)
    assert not any("pointed" in row._dom_classes for row in rows)
    token.map._hovered(token.map.widget.data[0], type("Points", (), {"point_inds": [(kv_head, layer)]})(), None)
    assert "pointed" in rows[number]._dom_classes
    token.pointed._handle_custom_msg({"over": 99}, [])
    assert state.hovered is None, "a row that is gone"
    assert said(panel) == "an error that was not read yet", "a pointer on its way clears nothing"


def test_a_change_answers_again_and_undo_takes_it_back() -> None:
    panel = asked()
    before, first = texts(panel), panel.state.plan
    panel.what_if.scope.value = "its whole layer"
    press(panel, "Restore")
    ended(panel.work)
    edited = panel.state.plan
    assert edited.spans(70)[panel.state.layer].tolist() == [70, 70]
    assert len(panel.what_if.tried.box.children) == 2
    press(panel, "Undo")
    ended(panel.work)
    assert panel.state.plan is first
    assert texts(panel) == before
    press(panel, "Redo")
    ended(panel.work)
    assert panel.state.plan is edited
    panel.what_if.tried.box.children[1].click()
    ended(panel.work)
    assert panel.state.plan is first
    panel.what_if.scope.value, panel.what_if.span.value = "this head", 2
    press(panel, "Set span")
    ended(panel.work)
    assert "shortest, 5 tokens, got 2" in said(panel)
    press(panel, "Cut")
    ended(panel.work)
    assert panel.state.plan.spans(70)[panel.state.layer, panel.state.kv_head] == 5


def test_room_for_the_head_that_lost_a_token_changes_the_plan() -> None:
    panel = asked()
    for index in range(6):
        panel.tokens.box.children[index].click()
        ended(panel.work)
        if not panel.room.disabled:
            break
    layer, kv_head, tokens = panel._tracing.room()
    press(panel, "Give that head the room")
    ended(panel.work)
    assert panel.state.plan.spans(1000)[layer, kv_head] == tokens
    assert "selected" in panel.tokens.box.children[index]._dom_classes
    assert (panel.state.layer, panel.state.kv_head) == (layer, kv_head)


def test_room_in_a_plan_of_the_budget_is_pinned_there_and_the_rest_is_solved_again(monkeypatch: pytest.MonkeyPatch) -> None:
    panel = asked()
    pinned: list[tuple[int, ...]] = []
    backs: list[object] = []

    class Budget:
        def holds(self, plan: object) -> bool:
            return plan is panel.state.plan

        def give(self, *room: int) -> object:
            pinned.append(room)
            panel.state.set(plan=mixed_plan(panel._tracing.model))
            return panel.state.plan

        def back_to(self, plan: object) -> None:
            backs.append(plan)

    panel._budget = lambda: Budget()
    monkeypatch.setattr(panel._tracing, "room", lambda: (1, 0, 30))
    panel.give_room()
    ended(panel.work)
    assert said(panel) == ""
    assert pinned == [(1, 0, 30, panel._tracing.case.n_tokens)]
    assert panel._tracing.trials.current.plan is panel.state.plan
    assert panel._tracing.trials.current.what == "layer 1, KV head 0: room for its source, the rest solved again"
    first = panel._tracing.trials.tried[0].plan
    press(panel, "Undo")
    ended(panel.work)
    assert backs[-1] is panel.state.plan is first, "the budget goes back with the answer"


def test_the_answer_comes_back_with_room_for_all_heads_that_lost_it() -> None:
    panel = asked(plan=lambda model: with_span(replace(dense_plan(geometry_of(model)), sink_tokens=4, min_span=6), 1, None, 6))
    assert not panel.rooms.disabled
    press(panel, "Give room until the answer is back")
    ended(panel.work)
    assert said(panel) == ""
    assert panel._tracing.trials.current.is_same
    assert panel.rooms.disabled


def test_a_plan_of_another_panel_is_tried_when_it_is_chosen() -> None:
    panel = asked()
    other = mixed_plan(panel._tracing.model).renamed("other")
    panel.state.set(plan=other)
    ended(panel.work)
    assert panel._tracing.trials.current.plan is other
    assert "other" in plain(panel.said.value)


@pytest.mark.parametrize("change", ["Answer", "Restore"])
def test_a_plan_that_is_chosen_while_an_answer_is_made_stays_and_is_answered_next(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    panel = asked()
    gate, answer = threading.Event(), tracing_module.answer

    def slow(*given: object, **named: object) -> object:
        assert gate.wait(20)
        return answer(*given, **named)

    monkeypatch.setattr(tracing_module, "answer", slow)
    press(panel, change)
    other = mixed_plan(panel._tracing.model).renamed("other")
    panel.state.set(plan=other)
    gate.set()
    at_last(lambda: panel._tracing.trials.current is not None and panel._tracing.trials.current.plan is other)
    ended(panel.work)
    assert panel.state.plan is other
    assert said(panel) == ""


def test_a_token_that_was_to_come_next_is_forgotten_with_what_was_cancelled() -> None:
    panel = asked()
    shown = panel._tracing.trace.index
    panel._wanted = shown + 1
    press(panel, "Restore")
    ended(panel.work)
    assert panel._tracing.trace.index == shown


def test_a_plan_that_keeps_everything_and_what_cannot_be_asked_are_told_in_words() -> None:
    panel = asked(plan=lambda model: dense_plan(geometry_of(model)))
    assert "Nothing is lost" in panel.why.value
    assert panel.room.disabled
    panel.prompt.value = " "
    press(panel, "Answer")
    ended(panel.work)
    assert "the prompt is empty" in said(panel)
    assert "the last question has none" in plain(panel.said.value), "what is shown is the answer before"
    panel.prompt.value = "And what else?"
    press(panel, "Answer")
    ended(panel.work)
    assert "the last question has none" not in plain(panel.said.value)
    assert re.search(r"your own prompt: \d+ tokens of prompt, 6 of answer", plain(panel.said.value))
    panel.kind.value = "lost needle"
    panel.length.value = 64
    press(panel, "Answer")
    ended(panel.work)
    assert "too short" in said(panel)


def test_what_is_shown_is_text_and_no_markup() -> None:
    panel = panel_of()
    panel.prompt.value, panel.text.value = "<b>bold</b> & <script>x</script>", 0
    panel.state.plan = replace(panel.state.plan, name="<i>plan</i>")
    press(panel, "Answer")
    ended(panel.work)
    for shown in (panel.said.value, panel.token.read.value, panel.token.reach.value, panel.why.value):
        assert "<script>" not in shown
        assert "<i>plan" not in shown
        assert "<b>bold" not in shown


def test_the_map_takes_the_room_that_the_list_of_heads_leaves() -> None:
    panel = asked()
    for width, beside in ((824, False), (984, True), (1488, True)):
        panel.state.set(width=width)
        taken = panel.token.map.widget.layout.width + (LIST + GAP if beside else 0)
        assert taken == room(width) or panel.token.map.widget.layout.width == WIDEST
