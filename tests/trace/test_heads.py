"""Why a token was lost: the head that carried it, how far, and the room that brings it back."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import FAMILIES, random_tokens, tiny_model, tiny_tokenizer
from tiny_plans import mixed_plan, small_plan
from transformers import PreTrainedModel

from moa_lab.models import geometry_of
from moa_lab.plan import Plan, dense_plan, with_span
from moa_lab.trace import Case, Tracer, answer, carrier, culprit, named_head, say, why

torch.set_num_threads(1)
N, START = 120, 110


def own_case(model: PreTrainedModel, seed: int = 0) -> Case:
    prompt = random_tokens(1, START, seed)[0].numpy()
    return Case(np.array([*prompt, *say(model, dense_plan(geometry_of(model)), prompt, N, N - START)]), START, N)


def all_but(model: PreTrainedModel, whole: set[tuple[int, int]]) -> Plan:
    """Everything in the heads of `whole`, almost nothing in the others."""
    plan = replace(dense_plan(geometry_of(model)), sink_tokens=4, min_span=12, name="cut")
    for layer, head in np.ndindex(plan.geometry.layers, plan.geometry.kv_heads):
        if (layer, head) not in whole:
            plan = with_span(plan, layer, head, 12)
    return plan


def silence(model: PreTrainedModel, layer: int, kv_head: int) -> None:
    """A head whose values are all 0 brings nothing from anywhere."""
    width = model.config.head_dim
    model.model.layers[layer].self_attn.v_proj.weight[kv_head * width : (kv_head + 1) * width] = 0


def test_of_two_heads_that_are_cut_the_one_that_carried_the_needle_is_named_and_room_brings_it_back() -> None:
    model, tokenizer = tiny_model("llama", layers=2), tiny_tokenizer()
    silence(model, 1, 0)
    plan = all_but(model, {(0, 0), (0, 1)})
    case = own_case(model)
    dense, cut = answer(model, case, dense_plan(plan.geometry)), answer(model, case, plan)
    index = int(np.argmax(cut.losses - dense.losses))
    trace = Tracer(model, case).token(index, plan)
    share = culprit(trace)
    assert share is not None
    assert (share.layer, share.kv_head) == (1, 1)
    assert trace.share(1, 0).brought == trace.share(1, 0).regained == 0
    assert not trace.share(0, 0).is_cut
    assert share.distance <= trace.position - 1 - share.source
    assert share.misses == share.distance + 1 - (12 - 4)
    said = why(tokenizer, trace, cut)
    assert f"layer 1, KV head 1 read it {share.distance} tokens back" in said
    assert f"span of 12 tokens, which ends {share.misses} tokens short of it" in said
    # What the dense model would not say either is not lost.
    assert " was lost " in why(tokenizer, trace, cut, dense)
    assert " was lost " not in why(tokenizer, trace, cut, replace(dense, likeliest=dense.wanted + 1))
    # Where both round to the same percent, a digit more tells them apart.
    close = replace(trace, dense=replace(trace.dense, probability=0.0342), cut=replace(trace.cut, probability=0.0311))
    assert "(3.4% in the dense model, 3.1% under the plan)" in why(tokenizer, close, cut)
    # What is not lost was carried by a head as well.
    most = max(trace.shares, key=lambda one: one.brought)
    assert carrier(trace) == most
    found = replace(trace, cut=trace.dense)
    assert f"Layer {most.layer}, KV head {most.kv_head} brought most of it" in why(tokenizer, found, dense)
    assert (named_head(trace, cut), named_head(found, dense)) == (share, most)
    assert "and the plan lets that head see it" in why(tokenizer, found, dense)
    assert "and the plan hides it from that head" in why(tokenizer, replace(found, shares=(share,)), dense)
    assert carrier(replace(trace, shares=(trace.share(1, 0),))) is None
    # The head alone was cut: with everything again, the answer is the dense one.
    again = answer(model, case, with_span(plan, 1, 1, None))
    np.testing.assert_allclose(again.losses, dense.losses, atol=1e-4)
    roomy = with_span(plan, 1, 1, share.room)
    assert roomy.windows(N)[1, 1] > N - 2 - share.source
    assert not Tracer(model, case).token(index, roomy).share(1, 1).is_cut


@pytest.mark.parametrize("family", FAMILIES)
def test_sources_that_are_missed_lie_outside_the_window_and_others_within(family: str) -> None:
    model = tiny_model(family)
    plan, case = mixed_plan(model), own_case(model)
    trace = Tracer(model, case).token(3, plan)
    assert len(trace.shares) == plan.geometry.layers * plan.geometry.kv_heads
    for share in trace.shares:
        if share.is_cut:
            assert plan.sink_tokens <= share.source < trace.window_start(share.layer, share.kv_head)
            assert share.misses == share.distance + 1 - plan.windows(N)[share.layer, share.kv_head]
            assert share.span < share.room <= N
            assert share.source in trace.sources(share.layer, share.kv_head)
        else:
            assert share.room == 0
        own = plan.geometry.layer_windows[share.layer]
        assert own is None or share.distance < own
    regained = [share.regained for share in trace.shares]
    assert max(regained) == regained[0] or regained[0] <= 0


def test_under_a_plan_that_keeps_everything_nothing_is_lost() -> None:
    model = tiny_model("mqa")
    case, dense = own_case(model), dense_plan(geometry_of(model))
    trace = Tracer(model, case).token(0, dense)
    assert culprit(trace) is None
    assert all(share.lost == share.regained == share.misses == 0 for share in trace.shares)
    assert "Nothing is lost" in why(tiny_tokenizer(), trace, answer(model, case, dense))
    assert [share.brought for share in trace.shares] == sorted((share.brought for share in trace.shares), reverse=True)


def test_what_comes_before_the_question_is_run_once_for_every_plan() -> None:
    model = tiny_model("llama")
    case, tracer, told = own_case(model), None, []
    tracer = Tracer(model, case)
    for index in (0, 1, 5):
        tracer.token(index, small_plan(model), lambda done, _: told.append(done))
    assert told == [0, 1], "the prefix in the dense model, and under the plan"
    fresh = Tracer(model, case).token(5, small_plan(model))
    np.testing.assert_allclose(tracer.token(5, small_plan(model)).cut.cuts, fresh.cut.cuts)
    with pytest.raises(ValueError, match="tokens 0 to 9"):
        tracer.token(10, small_plan(model))


def test_a_head_and_a_layer_get_another_span() -> None:
    plan = mixed_plan(tiny_model("llama"))
    assert with_span(plan, 1, 0, 20).spans(N)[1].tolist() == [20, plan.spans(N)[1, 1]]
    assert with_span(plan, 0, None, None).spans(N)[0].tolist() == [N, N]
    twice = with_span(with_span(plan, 0, None, None), 1, None, plan.min_span)
    assert twice.name == "plan (edited)"
    for layer, head, tokens in ((2, 0, 20), (0, 2, 20), (0, 0, plan.min_span - 1)):
        with pytest.raises(ValueError, match=r"there is no layer|at least the plan's shortest"):
            with_span(plan, layer, head, tokens)
