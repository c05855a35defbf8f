"""Plans rounded up to what an engine holds, against every way to round them."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moa_lab.engines import ENGINES, EngineLimits, allocated_density, engine_of, fits, held, meets, padded_plan
from moa_lab.geometry import ModelGeometry
from moa_lab.plan import DENSE, Plan, SpanRule, dense_plan, uniform_plan

N = 1024
GEOMETRY = ModelGeometry(2, 4, 2, 16, 4096)
SPANS = st.lists(st.sampled_from([128, 129, 200, 256, 600, 1000, 1024]), min_size=4, max_size=4)


def plan_of(spans: list[int], geometry: ModelGeometry = GEOMETRY) -> Plan:
    """Constant spans, by layer and head; 1,024 and more are whole."""
    rules = [DENSE if span >= N else SpanRule(float(span), 0.0) for span in spans]
    size = geometry.kv_heads
    return Plan(geometry, tuple(tuple(rules[at : at + size]) for at in range(0, len(rules), size)))


LIMITS = st.builds(
    EngineLimits, name=st.just("some"), windows_per_model=st.sampled_from([None, 1, 2, 3]), windows_per_layer=st.sampled_from([None, 1, 2]),
    class_multiple=st.sampled_from([1, 2]), block_tokens=st.sampled_from([1, 16, 64]), tokens_in_flight=st.sampled_from([0, 32, 512]),
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(spans=SPANS, engine=LIMITS)
def test_a_held_plan_keeps_at_least_what_was_asked_within_the_limits(spans: list[int], engine: EngineLimits) -> None:
    plan = plan_of(spans)
    found = held(plan, engine, N)
    assert (found.spans >= plan.spans(N)).all()
    assert (found.spans <= N).all()
    assert (found.slots >= np.minimum(found.spans, N)).all()
    assert found.windows == len(set(found.spans.ravel()) - {N}) <= (engine.windows_per_model or 4)
    assert found.layer_windows <= (engine.windows_per_layer or 2)
    assert found.exact == (found.spans == plan.spans(N)).all()
    assert found.kv_bytes >= found.slots.sum() * GEOMETRY.kv_bytes_per_token()
    if engine.class_multiple == 1:
        assert found.exact == fits(plan, engine, N) == meets(plan, engine, {N: found.density})
        assert not meets(plan, engine, {N: found.density - 1e-6})


def cheapest(plan: Plan, engine: EngineLimits) -> int:
    """The fewest allocated tokens of all plans of the same or longer spans that keep the limits, by trying every one."""
    exact = plan.spans(N).ravel()
    least = None
    for spans in product(*(sorted({span for span in [*exact.tolist(), N] if span >= own}) for own in exact)):
        rows = np.array(spans).reshape(plan.geometry.layers, -1)
        if len(set(spans) - {N}) > (engine.windows_per_model or 99):
            continue
        if max(len(set(row)) for row in rows) > (engine.windows_per_layer or 99):
            continue
        total = int(engine.slots(rows, N).sum())
        unit, members = (plan.geometry.kv_heads, rows[:, 0]) if engine.cuts_layers else (1, rows.ravel())
        for window, count in zip(*np.unique(members, return_counts=True), strict=True):
            total += int(-int(count) % engine.class_multiple * engine.slots(window, N)) * unit
        least = total if least is None else min(least, total)
    assert least is not None
    return least


@settings(max_examples=100, deadline=None)
@given(
    spans=SPANS, most=st.sampled_from([None, 1, 2, 3]), cuts=st.booleans(), multiple=st.sampled_from([1, 2, 3]),
    block=st.sampled_from([1, 64]), flight=st.sampled_from([0, 100]),
)  # fmt: skip
def test_no_way_to_round_up_allocates_less(spans: list[int], most: int | None, cuts: bool, multiple: int, block: int, flight: int) -> None:
    engine = EngineLimits("some", most, 1 if cuts else None, multiple, block, flight)
    plan = plan_of(spans)
    assert held(plan, engine, N).kv_bytes == cheapest(plan, engine) * GEOMETRY.kv_bytes_per_token()


def test_blocks_and_tokens_in_flight_never_exceed_the_blocks_of_the_sequence() -> None:
    engine = EngineLimits("llama", block_tokens=256, tokens_in_flight=512)
    slots = engine.slots(np.array([128, 256, 257, 700, 1000]), 1000)
    assert slots.tolist() == [768, 768, 1024, 1024, 1024]
    assert engine.slots(np.array([300]), 4096).tolist() == [1024]


def test_a_layer_with_a_window_of_its_own_is_never_rounded_up_beyond_it() -> None:
    geometry = ModelGeometry(2, 2, 2, 16, 4096, (256, None))
    plan = plan_of([128, 256, 300, 1024], geometry)
    found = held(plan, EngineLimits("one", windows_per_model=1), N)
    assert found.spans.tolist() == [[256, 256], [1024, 1024]]
    assert found.density == pytest.approx(1.0)
    three = plan_of([128, 128, 300, 300, 128, 128], ModelGeometry(3, 2, 2, 16, 4096, (256, None, 512)))
    assert held(three, EngineLimits("one", windows_per_model=1), N).spans.tolist() == [[128, 128], [1024, 1024], [128, 128]]
    other = plan_of([200, 200, 300, 300, 300, 300], ModelGeometry(3, 2, 2, 16, 4096, (256, None, 512)))
    with pytest.raises(ValueError, match="holds 1 windows"):
        held(other, EngineLimits("one", windows_per_model=1), N)


def test_density_of_what_is_allocated_is_that_of_the_plan_where_nothing_is_rounded() -> None:
    plan = uniform_plan(GEOMETRY, 0.5)
    assert allocated_density(plan, ENGINES["moa-lab"], N) == plan.density(N) == 0.5
    assert held(plan.with_bits(8), ENGINES["moa-lab"], N).kv_bytes == plan.with_bits(8).kv_bytes(N)
    assert allocated_density(plan, ENGINES["llama.cpp"], N) == 1.0
    assert held(dense_plan(GEOMETRY), ENGINES["vllm"], N).exact


@settings(max_examples=50, deadline=None)
@given(spans=SPANS, engine=LIMITS)
def test_the_padded_plan_keeps_what_the_engine_keeps_and_is_one_that_it_holds(spans: list[int], engine: EngineLimits) -> None:
    plan, found = plan_of(spans), held(plan_of(spans), engine, N)
    padded = padded_plan(plan, engine, N)
    assert (padded.spans(N) == found.spans).all()
    assert meets(padded, engine, {N: found.density})
    assert (padded.spans(2 * N)[found.spans == N] == 2 * N).all()


def test_stored_bits_are_refused_where_an_engine_knows_none() -> None:
    with pytest.raises(ValueError, match="engine vllm knows no stored bits"):
        held(uniform_plan(GEOMETRY, 0.5).with_bits(8), ENGINES["vllm"], N)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"windows_per_model": 0}, "windows_per_model must be at least 1"), ({"windows_per_layer": 1.5}, "whole number"),
        ({"class_multiple": 0}, "class_multiple"), ({"block_tokens": 0}, "block_tokens"), ({"tokens_in_flight": -1}, "tokens_in_flight"),
        ({"name": " "}, "name must be a line"),
    ],
)  # fmt: skip
def test_limits_are_checked_in_words(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineLimits(**{"name": "some", **wrong})  # type: ignore[arg-type]


def test_engines_are_found_by_name_and_others_are_refused_with_the_names() -> None:
    assert engine_of("vllm") is ENGINES["vllm"]
    own = EngineLimits("own", windows_per_model=3)
    assert engine_of(own) is own
    read = engine_of("windows_per_model=4, block_tokens=16")
    assert (read.windows_per_model, read.block_tokens, read.told()) == (4, 16, "4 windows a model beside the whole, blocks of 16 tokens")
    for wrong in ("ollama", "", "windows=4", "block_tokens=x", "block_tokens=1,block_tokens=2"):
        with pytest.raises(ValueError, match=r"engine must be one of .*llama\.cpp"):
            engine_of(wrong)
    assert own.told() == "3 windows a model beside the whole"
    assert ENGINES["moa-lab"].told() == "any windows, to the token"
