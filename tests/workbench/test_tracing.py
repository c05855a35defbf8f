"""Trace and what if as a script uses them: an answer, plans tried on it, undo and redo, and the head that gets room."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import FAMILIES, random_tokens, tiny_model, tiny_tokenizer
from tiny_plans import mixed_plan, small_plan

from moa_lab.models import geometry_of
from moa_lab.plan import dense_plan, with_span
from moa_lab.trace import Case, say
from moa_lab.workbench.jobs import Cancelled, Handle
from moa_lab.workbench.loaded import Loaded
from moa_lab.workbench.tracing import FEW, Tracing, given
from moa_lab.workbench.trials import Trials

torch.set_num_threads(1)
N, START = 100, 90


def handle(stop_after: int | None = None) -> Handle:
    stop, heard = threading.Event(), []

    def tell(done: int, total: int) -> None:
        heard.append((done, total))
        if stop_after is not None and len(heard) >= stop_after:
            stop.set()

    return Handle(stop, tell)


def traced(family: str = "llama") -> Tracing:
    tracing = Tracing(tiny_model(family), tiny_tokenizer())
    prompt = random_tokens(1, START)[0].numpy()
    said = say(tracing.model, dense_plan(tracing.geometry), prompt, N, N - START)
    tracing.take(Case(np.array([*prompt, *said]), START, N), handle())
    return tracing


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_is_told_token_by_token_and_a_head_is_changed_and_changed_back(family: str) -> None:
    tracing = traced(family)
    plan = small_plan(tracing.model)
    trial = tracing.try_plan(plan, "small", handle())
    rows = tracing.rows()
    assert len(rows) == N - START
    marked = [index for index, row in enumerate(rows) if row.is_first_difference]
    assert marked == ([] if trial.is_same else [trial.answer.first_difference])
    lost = [row.loss_change for row in rows]
    worded = next((index for index, row in enumerate(rows) if row.text.strip()), 0)
    assert tracing.telling() == (marked[0] if marked else np.argmax(lost) if max(lost) >= FEW else worded)
    assert np.mean([row.loss_change for row in rows]) == pytest.approx(trial.loss_change, abs=1e-6)
    assert all((row.instead is None) == (trial.answer.likeliest[i] == trial.answer.wanted[i]) for i, row in enumerate(rows))
    first = tracing.look(tracing.telling(), handle())
    assert tracing.look(tracing.telling(), handle()) is first
    assert tracing.why()
    whole = tracing.change(1, None, None, handle())
    assert whole.plan.spans(N)[1].tolist() == dense_plan(tracing.geometry).spans(N)[1].tolist()
    assert whole.what == "layer 1: everything"
    assert whole.density > trial.density
    with pytest.raises(ValueError, match=r"layer 1: everything of these .* is what it keeps already"):
        tracing.change(1, None, None, handle())
    assert tracing.trials.current is whole
    assert tracing.trials.undo() is trial
    assert tracing.look(0, handle()).plan is plan
    again = tracing.try_plan(with_span(plan, 1, None, None), "again", handle())
    assert again is whole, "the same plan is not run again"


def test_room_for_the_head_that_lost_the_token_shows_it_its_source() -> None:
    tracing = traced()
    tracing.try_plan(with_span(dense_plan(tracing.geometry), 0, 1, 128), "one head", handle())
    tracing.look(tracing.telling(), handle())
    with pytest.raises(ValueError, match="no head that the plan cuts"):
        tracing.room()
    tracing.try_plan(small_plan(tracing.model), "small", handle())
    for index in range(N - START):
        tracing.look(index, handle())
        try:
            layer, kv_head, tokens = tracing.room()
        except ValueError:
            continue
        tracing.change(layer, kv_head, tokens, handle())
        assert not tracing.look(index, handle()).share(layer, kv_head).is_cut
        return
    raise AssertionError("no token was lost by a head")


def test_room_is_given_round_by_round_until_the_answer_is_back() -> None:
    tracing = traced()
    # In the last layer a token's own query is all that counts.
    plan = with_span(replace(dense_plan(tracing.geometry), sink_tokens=4, min_span=6), 1, None, 6)
    assert not tracing.try_plan(plan, "last layer cut", handle()).is_same
    with pytest.raises(ValueError, match="still another"):
        tracing.rescue(handle(), rounds=0)
    found = tracing.rescue(handle())
    assert found.is_same
    assert (found.plan.spans(N) >= plan.spans(N)).all()
    densities = [trial.density for trial in tracing.trials.tried]
    assert densities == sorted(densities)
    assert tracing.rescue(handle()) is found
    assert given([(1, 0, 9)]) == "layer 1, KV head 0: room for its source"
    assert given([(1, 0, 9), (1, 1, 9), (2, 0, 9)]) == "layer 1, KV head 0; layer 1, KV head 1 and 1 more: room for their sources"


def test_the_dense_plan_costs_nothing() -> None:
    tracing = traced("mqa")
    trial = tracing.try_plan(dense_plan(tracing.geometry), "dense", handle())
    assert trial.answer is tracing.dense
    assert (trial.loss_change, trial.density, trial.is_same) == (0, 1, True)
    assert {row.loss_change for row in tracing.rows()} == {0}


def test_a_prompt_and_test_samples_are_asked() -> None:
    tracing = Tracing(tiny_model("llama"), tiny_tokenizer())
    assert tracing.ask("What is this?", 4, handle(), text_tokens=40).kind == "prompt"
    assert tracing.draw("needle", 480, 0, handle()).n_tokens == 480
    # A random model answers none of them.
    with pytest.raises(ValueError, match="loses none of 2 samples"):
        tracing.draw_lost("needle", 480, 0, mixed_plan(tracing.model), handle(), n=2)


def test_what_needs_a_question_says_so_and_work_can_be_stopped() -> None:
    tracing = Tracing(tiny_model("llama"), tiny_tokenizer())
    for call in (tracing.rows, tracing.telling, lambda: tracing.try_plan(small_plan(tracing.model), "", handle())):
        with pytest.raises(ValueError, match="press Answer first"):
            call()
    asked = traced()
    for call in (tracing_look(asked), lambda: asked.change(0, 0, None, handle()), asked.rows):
        with pytest.raises(ValueError, match="no plan was tried"):
            call()
    with pytest.raises(ValueError, match="choose a token"):
        asked.why()
    asked.try_plan(small_plan(asked.model), "small", handle())
    with pytest.raises(Cancelled):
        asked.look(0, handle(stop_after=1))
    assert asked.look(0, handle()).index == 0


def tracing_look(tracing: Tracing) -> Callable[[], object]:
    return lambda: tracing.look(0, handle())


def test_undo_and_redo_follow_the_path_and_the_history_keeps_every_plan_once() -> None:
    tracing = traced()
    plan = small_plan(tracing.model)
    first = tracing.try_plan(plan, "first", handle())
    second = tracing.change(0, 0, None, handle())
    third = tracing.change(0, 1, None, handle())
    trials = tracing.trials
    assert trials.undo() is second
    assert trials.undo() is first
    assert not trials.can_undo
    with pytest.raises(ValueError, match="nothing to undo"):
        trials.undo()
    assert trials.redo() is second
    assert trials.choose(2) is third
    assert not trials.can_redo
    assert trials.undo() is second
    trials.keep(first)
    with pytest.raises(ValueError, match="nothing to redo"):
        trials.redo()
    assert trials.tried == [first, second, third]
    assert (trials.index, trials.current) == (0, first)
    with pytest.raises(ValueError, match="number 3"):
        trials.choose(3)
    assert Trials().current is None


def test_panels_share_a_model_until_another_is_named() -> None:
    name, loads = ["a"], []

    def load(asked: str) -> tuple[str, str]:
        loads.append(asked)
        return asked, "tokenizer"

    loaded = Loaded(lambda: name[0], load)  # type: ignore[arg-type]
    assert loaded() == loaded() == ("a", "tokenizer")
    name[0] = "b"
    assert loaded() == ("b", "tokenizer")
    assert loads == ["a", "b"]


def test_geometry_is_the_models() -> None:
    model = tiny_model("gemma3")
    assert Tracing(model, tiny_tokenizer()).geometry == geometry_of(model)
