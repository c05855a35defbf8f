"""A plan belongs to the thread or task that entered it; whoever else calls the model is told so."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tiny import random_tokens, tiny_model
from tiny_plans import small_plan
from transformers import PreTrainedModel

from moa_lab.interface import route_attention
from moa_lab.models import geometry_of
from moa_lab.plan import Plan, dense_plan
from moa_lab.runtime import RingCache, apply_plan, ring_cache

torch.set_num_threads(1)

ELSEWHERE = "holds this model in another thread or task: enter `apply_plan`"
TOKENS = random_tokens(1, 50)


def say(model: PreTrainedModel) -> list[int]:
    return model.generate(TOKENS, do_sample=False, max_new_tokens=8, min_new_tokens=8)[0].tolist()


def plans(model: PreTrainedModel) -> list[Plan]:
    plan = small_plan(model)
    other = Plan(geometry=plan.geometry, rules=plan.rules[::-1], sink_tokens=4, min_span=5)
    return [plan, other, dense_plan(geometry_of(model))]


def under(model: PreTrainedModel, plan: Plan) -> list[int]:
    with apply_plan(model, plan, 58):
        return say(model)


def together(*works: Callable[[], Any]) -> list[Any]:
    """What every work returned, or the exception that it raised; all run at once."""
    found: list[Any] = [None] * len(works)
    start = threading.Barrier(len(works))

    def run(index: int) -> None:
        start.wait()
        try:
            found[index] = works[index]()
        except Exception as error:
            found[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def elsewhere(work: Callable[[], Any]) -> Any:
    return together(work)[0]


def test_threads_with_plans_of_their_own_say_what_each_would_alone() -> None:
    model = tiny_model("llama", tie_word_embeddings=False)
    before, own = model.config._attn_implementation, say(model)
    alone = [under(model, plan) for plan in plans(model)]
    assert alone[2] == own
    assert alone[0] != alone[1] != own
    fresh = tiny_model("llama", tie_word_embeddings=False)
    found = together(*(lambda plan=plan: [under(fresh, plan) for _ in range(3)] for plan in plans(model)))
    assert found == [[tokens] * 3 for tokens in alone]
    assert fresh.config._attn_implementation == before
    assert say(fresh) == own
    assert not fresh._forward_pre_hooks
    assert "_prepare_cache_for_generation" not in vars(fresh)


def test_threads_without_a_plan_say_what_they_would_alone_or_are_refused() -> None:
    model = tiny_model("gemma2", tie_word_embeddings=False)
    own, planned = say(model), under(model, small_plan(model))
    works = [lambda: [under(model, small_plan(model)) for _ in range(3)], *[lambda: [say(model) for _ in range(3)]] * 2]
    found = together(*works)
    assert found[0] == [planned] * 3
    for answer in found[1:]:
        assert answer == [own] * 3 or (isinstance(answer, RuntimeError) and ELSEWHERE in str(answer))


@pytest.mark.parametrize("call", [say, lambda model: model(TOKENS), lambda model: model.model(TOKENS), lambda model: model.forward(TOKENS)])
def test_a_thread_begun_within_a_plan_is_not_dense_without_a_word(call: Callable[[PreTrainedModel], Any]) -> None:
    model = tiny_model("llama")
    with apply_plan(model, small_plan(model)):
        refused = elsewhere(lambda: call(model))
    assert isinstance(refused, RuntimeError)
    assert ELSEWHERE in str(refused)
    assert "\n" not in str(refused)
    assert not isinstance(elsewhere(lambda: call(model)), Exception)


def test_a_thread_that_runs_in_a_copy_of_the_context_is_under_the_plan() -> None:
    model = tiny_model("llama", tie_word_embeddings=False)
    with apply_plan(model, small_plan(model), 58):
        expected, context = say(model), contextvars.copy_context()
        assert elsewhere(lambda: context.run(say, model)) == expected
        assert isinstance(elsewhere(lambda: context.run(ring_cache, model)), RingCache)
        assert isinstance(elsewhere(lambda: ring_cache(model)), ValueError)


def test_a_pass_under_way_when_another_thread_enters_a_plan_ends_as_it_began() -> None:
    for implementation in ("sdpa", "eager"):
        model = tiny_model("llama", attn_implementation=implementation)
        own = model(TOKENS, use_cache=False).logits
        inside, leave = threading.Event(), threading.Event()

        def hold(model: PreTrainedModel = model, inside: threading.Event = inside, leave: threading.Event = leave) -> None:
            with apply_plan(model, small_plan(model)):
                inside.set()
                leave.wait(60)

        thread = threading.Thread(target=hold)

        def enter(*_: Any, thread: threading.Thread = thread, inside: threading.Event = inside) -> None:
            if not thread.ident:
                thread.start()
                inside.wait(60)

        with apply_plan(model, small_plan(model)):
            pass
        hook = model.model.layers[0].mlp.register_forward_hook(enter)
        found = model(TOKENS, use_cache=False).logits
        assert inside.is_set()
        leave.set()
        thread.join()
        hook.remove()
        torch.testing.assert_close(found, own, atol=0, rtol=0)


def test_plans_may_be_left_in_another_order_than_they_were_entered() -> None:
    model = tiny_model("llama", tie_word_embeddings=False)
    own, first, second = say(model), *(under(model, plan) for plan in plans(model)[:2])
    one, other = apply_plan(model, plans(model)[0], 58), apply_plan(model, plans(model)[1], 58)
    one.__enter__()
    other.__enter__()
    assert say(model) == second
    one.__exit__(None, None, None)
    assert say(model) == second
    other.__exit__(None, None, None)
    assert say(model) == own
    assert under(model, plans(model)[0]) == first


def test_a_generator_may_be_closed_in_another_thread_than_it_was_begun_in() -> None:
    model = tiny_model("llama", tie_word_embeddings=False)
    own = say(model)

    def held() -> Iterator[list[int]]:
        with apply_plan(model, small_plan(model), 58):
            while True:
                yield say(model)

    generator = held()
    assert next(generator) != own
    assert elsewhere(generator.close) is None
    assert say(model) == own
    assert model.config._attn_implementation == "sdpa"


def test_tasks_hold_plans_of_their_own() -> None:
    model = tiny_model("llama", tie_word_embeddings=False)
    alone = [under(model, plan) for plan in plans(model)[:2]]

    async def planned(plan: Plan) -> list[list[int]]:
        said = []
        with apply_plan(model, plan, 58):
            for _ in range(2):
                await asyncio.sleep(0)
                said.append(say(model))
        return said

    async def plain() -> None:
        await asyncio.sleep(0)
        say(model)

    async def all_of_them() -> list[Any]:
        return await asyncio.gather(*(planned(plan) for plan in plans(model)[:2]), plain(), return_exceptions=True)

    *found, refused = asyncio.run(all_of_them())
    assert found == [[tokens] * 2 for tokens in alone]
    assert ELSEWHERE in str(refused)


def test_a_model_that_shares_its_config_with_one_under_a_plan_needs_a_plan_of_its_own() -> None:
    one = tiny_model("llama", tie_word_embeddings=False)
    other = type(one)(one.config).eval()
    own = say(other)
    with apply_plan(one, small_plan(one)):
        with pytest.raises(ValueError, match="shares its config"):
            say(other)
        with apply_plan(other, dense_plan(geometry_of(other))):
            assert say(other) == own
    assert say(other) == own


def test_an_attention_implementation_changed_within_a_plan_is_refused() -> None:
    model = tiny_model("llama")
    with apply_plan(model, small_plan(model)):
        model.set_attn_implementation("eager")
        with pytest.raises(RuntimeError, match="change it before `apply_plan`"):
            model(TOKENS)
    assert model.config._attn_implementation == "sdpa"


def test_layers_run_again_in_the_backward_pass_meet_the_plan_they_ran_under() -> None:
    model = tiny_model("llama").requires_grad_(True).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = []
    for run in (lambda work: work(), elsewhere):
        model.zero_grad()
        with apply_plan(model, small_plan(model)):
            loss = model(TOKENS, labels=TOKENS).loss
            # On a GPU it is a thread of autograd's that runs them.
            assert run(loss.backward) is None
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(found[1], found[0])


def test_a_route_within_a_plan_makes_no_rings() -> None:
    model = tiny_model("llama")
    with apply_plan(model, small_plan(model)), route_attention(model, lambda layer: lambda call: torch.zeros_like(call.query)):
        assert not isinstance(model(TOKENS).past_key_values, RingCache)
