"""Answers token by token: dense against plan, what the plan says itself, and the cases that are traced."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import FAMILIES, random_tokens, tiny_model, tiny_tokenizer
from tiny_plans import small_plan, stored_plan

from moa_lab.models import geometry_of
from moa_lab.plan import dense_plan
from moa_lab.runtime import apply_plan
from moa_lab.trace import Case, answer, drawn_cases, first_lost, prompt_case, say

torch.set_num_threads(1)
N, START = 90, 80


def made_case(n: int = N, start: int = START) -> Case:
    return Case(random_tokens(1, n)[0].numpy(), start, n)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("make", [small_plan, stored_plan])
def test_every_token_has_the_probability_of_one_pass_under_the_plan(family: str, make: object) -> None:
    model, case = tiny_model(family), made_case()
    plan = make(model)  # type: ignore[operator]
    found = answer(model, case, plan)
    with torch.no_grad(), apply_plan(model, plan, N):
        logits = model(input_ids=torch.from_numpy(case.tokens)[None]).logits[0, START - 1 : -1]
    told = logits.log_softmax(dim=-1)[torch.arange(N - START), torch.from_numpy(case.answer)]
    np.testing.assert_allclose(found.log_probabilities, told.numpy(), atol=2e-3)
    assert found.loss == pytest.approx(-float(told.mean()), abs=2e-3)


def test_the_dense_models_own_answer_has_no_first_difference_and_a_plan_says_its_own_words() -> None:
    model = tiny_model("llama")
    dense, plan, prompt = dense_plan(geometry_of(model)), small_plan(model), random_tokens(1, START)[0].numpy()
    said = say(model, dense, prompt, N, N - START)
    case = Case(np.array([*prompt, *said]), START, N)
    found = answer(model, case, dense)
    assert found.first_difference is None
    assert list(found.said) == said
    cut = answer(model, case, plan)
    assert cut.first_difference is not None
    assert list(cut.said) == say(model, plan, prompt, N, N - START)
    assert cut.said[: cut.first_difference] == found.said[: cut.first_difference]
    assert cut.said[cut.first_difference] == cut.likeliest[cut.first_difference] != found.said[cut.first_difference]


def test_a_prompt_is_answered_up_to_the_token_that_ends_it_and_an_empty_answer_is_that_token() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    case = prompt_case(model, tokenizer, "We have met.", 8)
    assert len(case.answer) == 8
    model.generation_config.eos_token_id = int(case.answer[0])
    empty = prompt_case(model, tokenizer, "We have met.", 8)
    assert empty.answer.tolist() == [case.answer[0]]
    assert answer(model, empty, small_plan(model)).losses.shape == (1,)
    with pytest.raises(ValueError, match="empty"):
        prompt_case(model, tokenizer, " ", 8)
    with pytest.raises(ValueError, match="at least one new token"):
        prompt_case(model, tokenizer, "We", 0)
    with pytest.raises(ValueError, match="maximum length"):
        prompt_case(model, tokenizer, "We", 512)


def test_a_text_before_the_prompt_makes_it_longer() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    short, long = (prompt_case(model, tokenizer, "What is this?", 2, text_tokens=n) for n in (0, 200))
    assert long.start > short.start + 150


def test_a_needle_knows_where_it_was_planted() -> None:
    tokenizer = tiny_tokenizer()
    case = drawn_cases(tokenizer, "needle", 480, 1)[0]
    (start, stop), *_ = case.planted
    assert case.tokens[start:stop].tolist() == case.answer.tolist()
    assert case.n_tokens == 480
    with pytest.raises(ValueError, match="needle or line"):
        drawn_cases(tokenizer, "song", 480, 1)


def test_the_first_lost_sample_is_one_that_the_dense_model_answers() -> None:
    model, prompt = tiny_model("llama"), random_tokens(1, START)[0].numpy()
    dense, plan = dense_plan(geometry_of(model)), small_plan(model)
    right = Case(np.array([*prompt, *say(model, dense, prompt, N, N - START)]), START, N)
    told: list[float] = []
    lost = first_lost(model, plan, [made_case(), right], progress=lambda done, _: told.append(done))
    assert told == sorted(told), "a count within a sample adds to that of samples"
    told = sorted({done for done in told if done == int(done)})
    assert lost is not None
    assert (lost.case, lost.tried, told) == (right, 2, [0, 1])
    assert first_lost(model, dense, [made_case(), right]) is None


def test_a_case_without_an_answer_or_a_prompt_is_refused() -> None:
    for start in (0, 10):
        with pytest.raises(ValueError, match="an answer needs"):
            made_case(10, start)
