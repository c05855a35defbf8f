"""Plans searched for what an engine can hold, against every choice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moa_lab.engines import EngineLimits, held
from moa_lab.records import InfluenceProfile, LossTable
from moa_lab.search import InfeasibleError, default_goals, loss_table, mean_goal, search, solve_budget, solve_milp
from moa_lab.search.candidates import METHODS
from moa_lab.search.holding import held_table
from tests.search.tables import all_choices, goal_values, random_profile, random_table, small_geometry

LIMITS = st.builds(
    EngineLimits, name=st.just("some"), windows_per_model=st.sampled_from([None, 1, 2, 3]), windows_per_layer=st.sampled_from([None, 1, 2]),
    class_multiple=st.sampled_from([1, 2, 3]), block_tokens=st.sampled_from([1, 64, 256]), tokens_in_flight=st.sampled_from([0, 100]),
)  # fmt: skip
TARGETS = st.dictionaries(st.sampled_from([512, 2048, 3000]), st.floats(0.3, 1.0), min_size=1, max_size=2)


def whole(table: LossTable, layer: int, rule: int, lengths: Iterable[int]) -> str:
    """Not empty where a rule keeps all that a layer with a window of its own shows, at all of the lengths."""
    own = table.geometry.layer_windows[layer]
    every = own and all(table.span_tokens(n)[layer, rule] == table.geometry.dense_span_tokens(layer, n) for n in lengths)
    return "whole" if every else ""


def held_choices(table: LossTable, targets: dict[int, float]) -> np.ndarray:
    """The choices of a held table that its engine holds within the densities, each counted by hand.

    Heads have one window where they have one rule and keep the same at all of the lengths, or keep all that their layers' own window
    shows. Those that keep everything do not count.
    """
    engine, fine = table.engine, []
    assert engine is not None
    kept = {n: table.span_tokens(n) for n in targets}
    for choice in all_choices(table):
        windows: Counter[tuple[object, ...]] = Counter()
        for layer, row in enumerate(choice.tolist()):
            for rule in row:
                windows[whole(table, layer, rule, targets) or rule, *(int(kept[n][layer, rule]) for n in targets)] += 1
        cut = [rule for rule, *_ in windows if rule == "whole" or not table.rules[int(str(rule))].keeps_everything]
        room = len(cut) <= (engine.windows_per_model or len(windows))
        for at, (n, most) in enumerate(targets.items()):
            filled = sum(-(-count // engine.class_multiple) * engine.class_multiple * int(engine.slots(window[1 + at], n))
                         for window, count in windows.items())  # fmt: skip
            room &= filled <= most * table.dense_tokens(n) + 1e-6
        fine.append(room)
    return all_choices(table)[fine]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000), engine=LIMITS, targets=TARGETS, own=st.sampled_from([(), (600, None)]), monotone=st.booleans(),
)  # fmt: skip
def test_the_exact_search_under_limits_equals_trying_every_choice(
    seed: int, engine: EngineLimits, targets: dict[int, float], own: tuple[int | None, ...], monotone: bool
) -> None:
    table = held_table(random_table(seed, geometry=small_geometry(layer_windows=own), monotone=monotone), engine)
    goal = mean_goal(default_goals(table))
    choices = held_choices(table, targets)
    if not len(choices):
        with pytest.raises(InfeasibleError):
            solve_milp(table, targets, goal=goal, mip_gap=0.0)
        return
    answer = solve_milp(table, targets, goal=goal, mip_gap=0.0)
    best = goal_values(table, goal, choices).min()
    assert answer.value == pytest.approx(best, rel=1e-5, abs=1e-7)
    assert answer.bound <= best + 1e-7
    assert (choices == answer.choice).all(axis=(1, 2)).any()


@pytest.fixture(scope="module")
def profile() -> InfluenceProfile:
    return random_profile(3, geometry=small_geometry(layers=4, kv_heads=3))


ENGINES_TRIED = (
    EngineLimits("whole layers", windows_per_layer=1, block_tokens=64, tokens_in_flight=16),
    EngineLimits("two a layer, three a model", windows_per_model=3, windows_per_layer=2),
    EngineLimits("pairs of layers", windows_per_model=2, windows_per_layer=1, class_multiple=2),
)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES_TRIED, ids=lambda engine: engine.name)
def test_every_plan_found_is_held_as_it_is_within_the_budget_that_the_engine_allocates(
    profile: InfluenceProfile, engine: EngineLimits
) -> None:
    targets = {512: 0.7, 1024: 0.5}
    front = search(profile, targets, engine=engine, methods=METHODS, time_limit_s=1)
    origins = {point.origin for point in front}
    assert "uniform" in origins
    assert origins & {"default", "paper", "worst-questions", "worst-others"}
    for point in front:
        assert point.plan.geometry == profile.geometry
        for n, asked in targets.items():
            found = held(point.plan, engine, n)
            assert found.density <= asked + 1e-9, point.plan.name
            assert found.exact or engine.class_multiple > 1
            assert found.windows <= (engine.windows_per_model or 12)
            assert found.layer_windows <= (engine.windows_per_layer or 3)
            told = point.plan.search["engine"]
            assert told["name"] == engine.name
            assert told["allocated"][str(n)] == pytest.approx(found.density, abs=1e-6)
    # The last method spends the budget: the best plan leaves little of it.
    assert max(held(point.plan, engine, 1024).density for point in front) > 0.47


def test_losses_of_whole_layers_are_those_of_all_their_heads(profile: InfluenceProfile) -> None:
    engine = EngineLimits("layers", windows_per_layer=1)
    table = loss_table(profile)
    for point in search(table, 0.5, engine=engine, time_limit_s=1):
        wide = table.with_plans(point.plan)
        predicted = wide.predict(wide.choice(point.plan))
        assert {name: point.predicted[name] for name in predicted} == pytest.approx(predicted, abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), engine=LIMITS, density=st.floats(0.3, 1.0))
def test_the_fast_solver_keeps_the_limits_and_its_bound_holds(seed: int, engine: EngineLimits, density: float) -> None:
    table = held_table(random_table(seed), engine)
    targets = {1024: density, 2048: density}
    goal = mean_goal(default_goals(table))
    choices = held_choices(table, targets)
    try:
        answer = solve_budget(table, targets, goal=goal)
    except InfeasibleError:
        # The windows are chosen by a heuristic, which fills up no classes.
        assert not len(choices) or engine.class_multiple > 1
        return
    assert (choices == answer.choice).all(axis=(1, 2)).any()
    assert answer.bound <= goal_values(table, goal, choices).min() + 1e-7


def test_bits_and_engines_that_are_not_known_are_refused(profile: InfluenceProfile) -> None:
    with pytest.raises(ValueError, match="engine vllm knows no stored bits"):
        search(profile, 0.5, engine="vllm", bits=8)
    with pytest.raises(ValueError, match="engine must be one of"):
        search(profile, 0.5, engine="vLLM")
    with pytest.raises(InfeasibleError, match=r"min_span 128 in llama\.cpp"):
        search(profile, 0.3, engine="llama.cpp")


def test_a_table_keeps_its_engine_in_a_file(tmp_path: Path) -> None:
    table = held_table(random_table(), EngineLimits("own", windows_per_model=3, block_tokens=16))
    assert LossTable.load(table.save(tmp_path / "table.safetensors")).engine == table.engine
