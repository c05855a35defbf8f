"""The budget controller on the recorded table of the embedded model: what the slider, the pins and the exact solve give."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import numpy as np
import pytest

from moa_lab.records import LossTable
from moa_lab.search import Goal, InfeasibleError
from moa_lab.workbench.budget import Answer, Budget
from moa_lab.workbench.budget_facts import kept

DEMO = Path(__file__).resolve().parents[2] / "data" / "runs" / "demo"


@pytest.fixture(scope="module")
def table() -> LossTable:
    return LossTable.load(DEMO / "table.safetensors")


@pytest.fixture
def budget(table: LossTable) -> Budget:
    return Budget(table)


def within(answer: Answer, budget: Budget, density: float) -> bool:
    return all(answer.plan.density(n) <= density + 1e-9 for n in budget.lengths)


@pytest.mark.parametrize("density", [0.15, 0.25, 0.5, 0.8])
def test_an_answer_keeps_the_density_and_says_what_it_costs(density: float, budget: Budget) -> None:
    answer = budget.answer(density)
    assert budget.density == density
    assert within(answer, budget, density)
    assert answer.density == answer.plan.density(budget.n_tokens)
    assert answer.kv_bytes == answer.allocated_bytes == answer.plan.kv_bytes(budget.n_tokens)
    assert answer.kv_bytes == pytest.approx(answer.density * answer.dense_bytes, rel=1e-6)
    assert answer.losses["mean"] == pytest.approx(np.mean([value for name, value in answer.losses.items() if name != "mean"]))
    assert set(answer.losses_at) == set(budget.table.lengths)
    assert np.mean(list(answer.losses_at.values())) == pytest.approx(answer.losses["mean"]), "both lengths weigh the same"
    assert 0 <= answer.gap < 0.05


def test_more_density_costs_less(budget: Budget) -> None:
    losses = [budget.answer(density).losses["mean"] for density in (0.15, 0.3, 0.5, 0.75, 1.0)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == pytest.approx(0, abs=1e-9)


def test_the_least_density_can_be_had_and_less_is_refused_in_words_that_name_it(budget: Budget) -> None:
    assert within(budget.answer(budget.least), budget, budget.least)
    with pytest.raises(InfeasibleError, match="least"):
        budget.answer(budget.least * 0.5)
    assert budget.density == budget.least, "what cannot be had is not kept"


@pytest.mark.parametrize("tokens", [None, 300, 1])
def test_a_pinned_head_gets_its_span_and_the_rest_is_solved_again(tokens: int | None, budget: Budget) -> None:
    before = budget.answer(0.4)
    got = budget.pin(4, 1, tokens)
    after = budget.answer()
    assert after.plan.spans(budget.n_tokens)[4, 1] == got
    assert got == budget.n_tokens if tokens is None else got >= tokens
    assert within(after, budget, 0.4)
    assert after.losses["mean"] >= before.losses["mean"] * (1 - 0.05)
    budget.release(4, 1)
    assert np.array_equal(budget.answer().choice, before.choice)


def test_a_pin_that_leaves_too_little_for_the_rest_is_refused_and_leaves_all_as_it_was(budget: Budget) -> None:
    budget.answer(budget.least)
    with pytest.raises(InfeasibleError):
        budget.pin(0, 0)
    assert budget.pinned == {}


@pytest.mark.parametrize(
    ("pin", "words"),
    [((30, 0, None), "no layer 30"), ((0, 3, None), "KV head 3"), ((0, 0, 0), r"1\.\.\d+ tokens, got 0"), ((0, 0, 9999), "9999")],
)
def test_a_pin_of_what_there_is_not_is_refused(pin: tuple[int, int, int | None], words: str, budget: Budget) -> None:
    with pytest.raises(ValueError, match=words):
        budget.pin(*pin)


def test_the_exact_solve_is_no_worse_keeps_pins_and_the_cap_on_rules(budget: Budget) -> None:
    quick = budget.answer(0.4)
    exact = budget.exact()
    assert exact.solver == "exact (optimal)"
    assert exact.losses["mean"] <= quick.losses["mean"] + 1e-9
    budget.pin(2, 2)
    budget.max_rules = 2
    assert budget.answer().rules_ignored
    capped = budget.exact(time_limit_s=20)
    assert not capped.rules_ignored
    assert max(len(set(row)) for row in capped.choice.tolist()) <= 2
    assert capped.plan.spans(budget.n_tokens)[2, 2] == budget.n_tokens
    assert within(capped, budget, 0.4)


def test_an_exact_solve_can_be_stopped(budget: Budget) -> None:
    budget.max_rules = 1
    budget.answer(0.3)
    stop = threading.Event()
    stop.set()
    assert budget.exact(cancel=stop).solver in ("exact (cancelled)", "exact (optimal)")


def test_bytes_and_density_are_two_names_of_one_slider(budget: Budget) -> None:
    answer = budget.answer(0.5)
    assert budget.density_of_bytes(0.5 * answer.dense_bytes) == 0.5
    assert budget.density_of_bytes(0) == budget.least
    assert budget.density_of_bytes(1e15) == 1.0


def test_a_loss_is_told_at_every_length_that_a_goal_looks_at(table: LossTable) -> None:
    long = Goal("long", {"questions@2048/all_or_nothing": 1.0})
    answer = Budget(table, goals=(long,)).answer(0.3)
    assert answer.losses_at == {2048: pytest.approx(answer.losses["long"])}


def test_a_mean_span_is_another_name_of_the_same_slider(budget: Budget) -> None:
    answer = budget.answer(0.5)
    assert budget.density_of_span(answer.plan.spans(budget.n_tokens).mean()) == pytest.approx(answer.density)
    assert budget.density_of_span(0) == budget.least
    assert budget.density_of_span(1e9) == 1.0


@pytest.mark.parametrize("bits", ["8", "8+4", "4"])
def test_fewer_bits_keep_more_tokens_in_the_same_bytes(bits: str, table: LossTable) -> None:
    budget, whole = Budget(table, bits=bits), Budget(table)
    answer, before = budget.answer(0.25), whole.answer(0.25)
    assert answer.plan.name == f"budget@{bits}"
    assert within(answer, budget, 0.25)
    assert answer.kv_bytes == answer.allocated_bytes == answer.plan.kv_bytes(budget.n_tokens)
    assert answer.density == pytest.approx(0.25, rel=0.03)
    assert answer.plan.spans(2048).mean() > 1.5 * before.plan.spans(2048).mean()
    assert answer.losses["mean"] < before.losses["mean"]
    assert budget.least < whole.least
    budget.answer(budget.density_of_span(700))
    assert budget.answer().plan.spans(budget.n_tokens).mean() == pytest.approx(700, rel=0.05)
    assert budget.exact(time_limit_s=1).plan.widths().tolist() == answer.plan.widths().tolist()


def test_bits_that_hold_everything_keep_everything_and_one_mix_is_asked_for(table: LossTable) -> None:
    budget = Budget(table, bits=4)
    answer = budget.answer(0.9)
    assert (answer.plan.spans(2048) == 2048).all()
    assert answer.density < 0.3
    budget.bits = 16
    assert budget.answer(0.5).plan.bits == ()
    with pytest.raises(ValueError, match="one mix"):
        budget.bits = "16,8"


def test_where_a_limit_binds_at_another_length_the_facts_say_so(budget: Budget) -> None:
    assert dict(kept(budget.answer(0.5), budget))["density"] == "49.8% of the bytes at 1,536 tokens"
    told = dict(kept(budget.answer(0.25), budget))["density"]
    assert re.fullmatch(r"24\.\d% of the bytes at 1,536 tokens, 25\.0% at 1,024: the limit holds at every length", told)
