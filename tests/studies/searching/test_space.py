from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from moa_lab.evaluate.intervals import Interval
from moa_lab.search import default_goals, limit_lengths, loss_table, mean_goal
from moa_lab.studies import StudyRecord
from moa_lab.studies.gains import Gain
from moa_lab.studies.searching.space import STEPS, ratio_table, space_answer, space_plans, step_pairs
from tests.search.tables import goal_values, keeps, random_profile, small_geometry


@pytest.fixture(scope="module")
def record(records: dict[str, StudyRecord]) -> StudyRecord:
    return records["space"]


def test_ratios_alone_are_scaled_as_the_default_grid_is() -> None:
    profile = random_profile(1)
    ratios, full = ratio_table(profile), loss_table(profile)
    assert all(rule.alpha == 0 and rule.beta > 0 for rule in ratios.rules)
    shared = [rule for rule in ratios.rules if rule in full.rules]
    assert len(shared) > 10
    for rule in shared:
        np.testing.assert_allclose(ratios.losses[..., ratios.rules.index(rule)], full.losses[..., full.rules.index(rule)])


def test_one_ratio_per_layer_is_the_best_of_all_pairs_of_ratios() -> None:
    profile = random_profile(2)
    table = ratio_table(profile)
    plans, _, _ = space_plans(profile, 0.5, 5.0)
    pairs = np.array(list(product(range(len(table.rules)), repeat=2)))
    choices = np.repeat(pairs[:, :, None], 2, axis=2)
    goal = mean_goal(default_goals(table))
    fine = keeps(table, choices, dict.fromkeys(limit_lengths(table), 0.5))
    best = goal_values(table, goal, choices)[fine].min()
    found = plans["layers"]
    assert all(len(set(row)) == 1 for row in found.rules)
    assert goal.value(table.predict(table.choice(found))) == pytest.approx(best, rel=1e-3)


def test_every_step_predicts_no_more_loss_than_the_step_before() -> None:
    profile = random_profile(3)
    plans, _, _ = space_plans(profile, 0.5, 5.0)
    table = loss_table(profile, tuple({rule: None for name in STEPS for row in plans[name].rules for rule in row} | dict.fromkeys(
        loss_table(profile).rules)))  # fmt: skip
    goal = mean_goal(default_goals(table))
    values = [goal.value(table.predict(table.choice(plans[name]))) for name in STEPS]
    assert values == sorted(values, reverse=True)
    assert values[0] > values[-1]


def test_variants_keep_their_limits_and_twins_are_not_measured_twice() -> None:
    profile = random_profile(6, geometry=small_geometry(layers=4, kv_heads=3))
    plans, same, left_out = space_plans(profile, 0.5, 5.0)
    for most in (1, 2):
        assert max(len(set(row)) for row in plans[f"rules-{most}"].rules) == most
    assert plans["min-span-256"].min_span == 256
    # Three KV heads: three rules a layer are no limit. A mean over the group is its sum, scaled.
    assert {same["rules-3"], same["pool-max"], same["min-span-128"]} == {"elastic"}
    assert same["pool-mean"] == "pool-sum"
    assert not set(plans) & (set(same) | set(left_out))
    for name, plan in plans.items():
        assert max(plan.density(n) for n in (512, 1024, 2048)) <= 0.5 + 1e-9, name


def test_what_is_infeasible_is_left_out_with_its_reason_and_steps_skip_it() -> None:
    plans, _, left_out = space_plans(random_profile(5), 0.3, 5.0)
    assert "min_span 256" in left_out["min-span-256"]
    assert step_pairs({name: plans[name] for name in ("uniform", "heads")}) == [("heads", "uniform")]
    nothing, same, _ = space_plans(random_profile(5), 0.2, 5.0)
    assert list(nothing) == ["uniform"]
    assert not same


def found(plan: str, low: float, high: float, against: str = "elastic", density: float = 0.25) -> Gain:
    return Gain(plan, against, "needles_gained", "needles", (2048,), Interval((low + high) / 2, 9, low, high), density, 0.25)


def test_the_answer_says_yes_no_and_undecided() -> None:
    steps = [found("layers", -0.1, 0.2, "uniform"), found("heads", 0.2, 0.4, "layers"), found("elastic", -0.4, -0.2, "heads", 0.2)]
    others = [found("pool-sum", -0.5, -0.3), found("min-span-192", -0.1, 0.1)]
    text = space_answer([*steps, *others], (2048,), {"pool-mean": "pool-sum"}, 0.25)
    assert "one ratio per layer: not decided for needles (+0.050 [-0.100, 0.200])" in text
    assert "one ratio per head: helps needles" in text
    assert "elastic rules per head: harms needles" in text
    assert "pool-sum is worse" in text
    assert "nothing is decided for min-span-192" in text
    assert "the same plan as pool-sum: pool-mean" in text
    assert "elastic 20.0% and heads 25.0% at 2,048 tokens" in text
    assert "no two steps" in space_answer([], (2048,), {}, 0.25)


def test_the_study_measures_steps_and_variants_and_pairs_them(record: StudyRecord) -> None:
    assert {"dense", *STEPS} <= {row.plan for row in record.rows}
    assert {row.length for row in record.rows} == {0, 512, 640}
    for metric, task in (("needles_gained", "needles"), ("nats_saved", "documents"), ("nats_saved", "summaries")):
        rows = record.select(metric=metric, task=task, length=640)
        assert {row.plan for row in rows} >= {"layers", "heads", "elastic"}
        assert all(row.low <= row.value <= row.high for row in rows)
    assert record.answer.startswith("At 50% kept, each step")
    assert set(record.settings["solved"]) >= set(STEPS)
