"""One state: changes are heard once, and only by those who asked."""

from __future__ import annotations

import pytest
from figure_records import make_front, make_plan, make_profile

from moa_lab.workbench.state import State


def test_what_is_not_said_follows_from_the_records() -> None:
    state = State(profile=make_profile())
    assert (state.task, state.length, state.n_tokens) == ("questions", 4096, 4096)
    assert State().n_tokens == 0


def test_a_watcher_is_called_once_for_changes_made_together_and_not_for_others() -> None:
    state, heard = State(profile=make_profile()), []
    state.watch(["layer", "kv_head"], lambda: heard.append((state.layer, state.kv_head)))
    state.set(layer=3, kv_head=2)
    state.set(task="summaries")
    state.set(layer=3)
    assert heard == [(3, 2)]


def test_a_panel_behind_another_hears_of_changes_once_when_it_comes_to_the_front() -> None:
    state, heard = State(profile=make_profile()), []
    state.watch_in("Heads", ["layer"], lambda: heard.append(state.layer))
    state.set(layer=1)
    state.set(tab="Budget")
    state.set(layer=2)
    state.set(layer=3)
    assert heard == [1]
    state.set(tab="Heads")
    assert heard == [1, 3]
    state.set(tab="Front")
    state.set(tab="Heads")
    assert heard == [1, 3]


def test_what_a_panel_is_told_directly_also_waits_until_it_is_in_front() -> None:
    state, heard = State(), []
    changed = state.watch_in("Heads", ["layer"], lambda: heard.append(1))
    changed()
    assert heard == [1]
    state.set(tab="Budget")
    changed()
    changed()
    assert heard == [1]
    state.set(tab="Heads")
    assert heard == [1, 1]


def test_a_watcher_that_was_let_go_hears_nothing() -> None:
    state, heard = State(), []
    ends = state.watch(["plan"], lambda: heard.append(state.plan))
    plan = make_plan()
    state.set(plan=plan)
    ends()
    state.set(plan=make_plan(seed=1), front=make_front())
    assert heard == [plan]


@pytest.mark.parametrize(
    ("change", "words"), [({"colour": 1}, "no 'colour'"), ({"layer": 30}, "layer must lie in 0..29"), ({"kv_head": -1}, "0..2")]
)
def test_what_there_is_not_is_refused_and_changes_nothing(change: dict[str, int], words: str) -> None:
    state = State(profile=make_profile())
    with pytest.raises(ValueError, match=words):
        state.set(**change, n_tokens=7)
    assert state.n_tokens == 4096
