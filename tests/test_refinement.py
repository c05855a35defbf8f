"""Refining: the measured loss goes down, few heads move, the budget holds, and a killed refinement goes on."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from own_answers import DENSITY, LENGTHS, own_answers
from tiny import tiny_model
from transformers import PreTrainedModel

from moa_lab.calibration.samples import SampleSet
from moa_lab.engines import EngineLimits, meets
from moa_lab.evaluate.scoring import mean_losses, score_samples
from moa_lab.models import geometry_of
from moa_lab.plan import Plan, SpanRule, full_or_floor_plan, mixes_of, read_mixes
from moa_lab.profiling import profile
from moa_lab.records import LossTable
from moa_lab.refinement import refine
from moa_lab.search import loss_table

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama", layers=3)


@pytest.fixture(scope="module")
def samples(model: PreTrainedModel) -> SampleSet:
    return own_answers(model, 4)


@pytest.fixture(scope="module")
def table(model: PreTrainedModel, samples: SampleSet) -> LossTable:
    return loss_table(profile(model, samples))


def mean_loss(model: PreTrainedModel, plan: Plan, samples: SampleSet) -> float:
    return float(np.mean(list(mean_losses(list(samples), score_samples(model, plan, list(samples))).values())))


@pytest.fixture(scope="module")
def worst(model: PreTrainedModel, samples: SampleSet) -> Plan:
    """Of the plans with two whole heads the one that loses most."""
    geometry = geometry_of(model)
    pairs = [((first, 0), (second, 1)) for first in range(3) for second in range(3)]
    plans = [full_or_floor_plan(geometry, whole=pair, floor_tokens=128) for pair in pairs]
    return max(plans, key=lambda plan: mean_loss(model, plan, samples))


def test_every_point_loses_less_and_keeps_the_budget(model: PreTrainedModel, samples: SampleSet, table: LossTable, worst: Plan) -> None:
    front = refine(model, worst, samples, table, dict.fromkeys(LENGTHS, DENSITY), rounds=4)
    assert [point.plan.name for point in front] == [f"refined-{number}" for number in range(1, len(front) + 1)]
    losses = [mean_loss(model, worst, samples), *(mean_loss(model, point.plan, samples) for point in front)]
    assert all(later < earlier for earlier, later in pairwise(losses))
    dense = mean_loss(model, full_or_floor_plan(worst.geometry, whole=list(np.ndindex(3, 2)), floor_tokens=128), samples)
    assert losses[-1] - dense < 0.7 * (losses[0] - dense)
    for point, loss in zip(front, losses[1:], strict=True):
        assert point.origin == "refined"
        assert point.plan.search["start"] == worst.name
        assert point.plan.search["calibration_loss"] == pytest.approx(loss, rel=1e-5)
        assert point.predicted == pytest.approx({**point.predicted, **table.predict(table.choice(point.plan))})
        for n in LENGTHS:
            assert point.density[str(n)] == pytest.approx(point.plan.density(n))
            assert point.plan.density(n) <= DENSITY + 1e-9


def test_no_step_moves_more_heads_than_it_may(model: PreTrainedModel, samples: SampleSet, table: LossTable, worst: Plan) -> None:
    front = refine(model, worst, samples, table, dict.fromkeys(LENGTHS, DENSITY), rounds=2, moves=(3,))
    assert len(front)
    choices = [table.choice(worst), *(table.choice(point.plan) for point in front)]
    for point, (before, after) in zip(front, pairwise(choices), strict=True):
        told = point.plan.search
        assert told["moved_heads"] == (before != after).sum()
        assert 1 <= told["moved_heads"] <= 3 * told["steps"]


def test_only_heads_that_were_measured_move(model: PreTrainedModel, samples: SampleSet, table: LossTable, worst: Plan) -> None:
    front = refine(model, worst, samples, table, dict.fromkeys(LENGTHS, DENSITY), rounds=1, heads=2)
    assert len(front)
    for point in front:
        grown = SpanRule(*point.plan.search["spent"].values()) if "spent" in point.plan.search else SpanRule(0.0, 0.0)
        stayed = [
            after in (before, SpanRule(before.alpha + grown.alpha, before.beta + grown.beta))
            for rows in zip(point.plan.rules, worst.rules, strict=True)
            for after, before in zip(*rows, strict=True)
        ]
        assert stayed.count(False) <= 2


def test_where_no_plan_is_as_near_as_asked_the_nearest_is_taken(
    model: PreTrainedModel, samples: SampleSet, table: LossTable, worst: Plan
) -> None:
    # A budget that is used up to the last token: one head alone cannot grow.
    (point,) = refine(model, worst, samples, table, {n: worst.density(n) for n in LENGTHS}, rounds=1, moves=(1,))
    assert point.plan.search["moved_heads"] > 1


def test_where_nothing_is_lost_nothing_is_found(model: PreTrainedModel, samples: SampleSet, table: LossTable) -> None:
    dense = full_or_floor_plan(geometry_of(model), whole=list(np.ndindex(3, 2)), floor_tokens=128)
    told: list[tuple[int, int]] = []
    front = refine(model, dense, samples, table, 1.0, rounds=1, moves=(1,), progress=lambda *step: told.append(step))
    before = mean_loss(model, dense, samples)
    assert all(mean_loss(model, point.plan, samples) < before for point in front)
    assert told[-1] == (100, 100)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_the_same_call_after_a_kill_computes_nothing_twice_and_ends_the_same(
    model: PreTrainedModel, samples: SampleSet, table: LossTable, worst: Plan, tmp_path: Path
) -> None:
    def killed(done: int, total: int) -> None:
        if done > 50:
            raise KeyboardInterrupt

    kept = {"parts_dir": tmp_path}
    settings: dict[str, Any] = {"density": dict.fromkeys(LENGTHS, DENSITY), "rounds": 2}
    unbroken = refine(model, worst, samples, table, **settings)
    with pytest.raises(KeyboardInterrupt):
        refine(model, worst, samples, table, **settings, **kept, progress=killed)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert before
    found = refine(model, worst, samples, table, **settings, **kept)
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert {path: after[path] for path in before} == before
    assert [point.plan.rules for point in found] == [point.plan.rules for point in unbroken]


def test_the_number_of_rules_per_layer_is_kept(model: PreTrainedModel, samples: SampleSet, table: LossTable, worst: Plan) -> None:
    front = refine(model, worst, samples, table, 0.8, rounds=1, moves=(3,), max_rules_per_layer=1)
    assert len(front) == 1
    assert all(len(set(row)) == 1 for point in front for row in point.plan.rules)


def test_layers_that_an_engine_cuts_as_a_whole_move_as_a_whole(model: PreTrainedModel, samples: SampleSet, table: LossTable) -> None:
    engine = EngineLimits("some", windows_per_model=2, windows_per_layer=1)
    geometry = geometry_of(model)
    start = full_or_floor_plan(geometry, whole=[(0, head) for head in range(geometry.kv_heads)], floor_tokens=128)
    targets = dict.fromkeys(LENGTHS, 0.6)
    front = refine(model, start, samples, table, targets, rounds=2, engine=engine)
    first = mean_loss(model, start, samples)
    for point in front:
        assert meets(point.plan, engine, targets)
        assert {rule for row in point.plan.rules for rule in row} <= {rule for row in start.rules for rule in row}
        assert mean_loss(model, point.plan, samples) < first
    uneven = full_or_floor_plan(geometry, whole=[(0, 0)], floor_tokens=128)
    with pytest.raises(ValueError, match="engine some does not hold plan"):
        refine(model, uneven, samples, table, targets, engine=engine)


@pytest.mark.parametrize(("rounds", "heads", "moves"), [(0, None, (2,)), (1, None, ()), (1, None, (2, 0)), (1, 0, (2,))])
def test_rounds_heads_and_moves_that_make_no_sense_are_refused(
    model: PreTrainedModel, samples: SampleSet, table: LossTable, worst: Plan, rounds: int, heads: int | None, moves: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="rounds, heads and moves must be at least 1"):
        refine(model, worst, samples, table, DENSITY, rounds=rounds, heads=heads, moves=moves)


def test_a_start_that_keeps_more_than_the_density_is_refused_by_what_it_keeps(
    model: PreTrainedModel, samples: SampleSet, table: LossTable, worst: Plan
) -> None:
    asked = {n: 0.8 * worst.density(n) for n in LENGTHS}
    with pytest.raises(ValueError, match=r"keeps [\d.]+% at \d+ tokens, more than the density [\d.]+: raise density, or search"):
        refine(model, worst, samples, table, asked, rounds=1, heads=2)


@pytest.fixture(scope="module")
def of_bits(model: PreTrainedModel, samples: SampleSet) -> LossTable:
    return loss_table(profile(model, samples, rounding=True), mixes=read_mixes("16,8,4"))


def test_heads_move_to_other_bits_within_the_bytes(model: PreTrainedModel, samples: SampleSet, of_bits: LossTable, worst: Plan) -> None:
    targets = {n: worst.density(n) for n in LENGTHS}
    start = mean_loss(model, worst, samples)
    front = refine(model, worst, samples, of_bits, targets, rounds=3)
    best = front.points[-1].plan
    assert [point.plan.name for point in front] == [f"refined-{number}@per-head" for number in range(1, len(front) + 1)]
    assert len(mixes_of(best)) > 1
    for point in front:
        assert point.plan.search["calibration_loss"] < start
        assert point.plan.search["calibration_loss"] == pytest.approx(mean_loss(model, point.plan, samples), abs=0.02)
        assert all(point.density[str(n)] == point.plan.density(n) <= targets[n] + 1e-9 for n in LENGTHS)
    # At the same bytes fewer bits hold what spans alone must leave.
    alone = refine(model, worst, samples, of_bits.only(range(len(of_bits.rules) // 3)), targets, rounds=3)
    assert mean_loss(model, best, samples) < mean_loss(model, alone.points[-1].plan, samples)


def test_a_head_that_is_stored_in_too_few_bits_gets_more_and_others_pay(
    model: PreTrainedModel, samples: SampleSet, of_bits: LossTable
) -> None:
    """All heads are whole, in 4 bits but for one that 16 help least: bits move to where they help, and nothing is paid but with bits."""
    whole = full_or_floor_plan(geometry_of(model), whole=list(np.ndindex(3, 2)), floor_tokens=128)
    plans = {}
    for head in np.ndindex(3, 2):
        widths = np.full((3, 2, 2), 4)
        widths[head] = 16
        plans[head] = whole.with_bits(widths)
    losses = {head: mean_loss(model, plan, samples) for head, plan in plans.items()}
    start = max(losses, key=losses.__getitem__)
    front = refine(model, plans[start], samples, of_bits, {n: plans[start].density(n) for n in LENGTHS}, rounds=3)
    best = front.points[-1].plan
    assert mean_loss(model, best, samples) < losses[start]
    assert (best.widths()[start] < 16).any()


def test_a_plan_of_one_mix_is_refined_in_that_mix(model: PreTrainedModel, samples: SampleSet, table: LossTable, worst: Plan) -> None:
    stored = worst.with_bits(8)
    targets = {n: stored.density(n) for n in LENGTHS}
    front = refine(model, stored, samples, table, targets, rounds=1)
    assert [point.plan.name for point in front] == ["refined-1@8"]
    for point in front:
        assert (point.plan.widths() == 8).all()
        assert point.plan.search["calibration_loss"] < mean_loss(model, stored, samples)
        assert all(point.plan.density(n) <= targets[n] + 1e-9 for n in LENGTHS)


def test_bits_that_the_table_or_the_engine_lacks_are_refused(
    model: PreTrainedModel, samples: SampleSet, of_bits: LossTable, worst: Plan
) -> None:
    with pytest.raises(ValueError, match="the table knows no losses of 8\\+4 bits"):
        refine(model, worst.with_bits(np.array([8, 4])), samples, of_bits, DENSITY)
    with pytest.raises(ValueError, match="engine some knows no stored bits"):
        refine(model, worst, samples, of_bits, DENSITY, engine=EngineLimits("some"))
    widths = np.full((3, 2, 2), 8)
    widths[0, 0] = 4
    layers = EngineLimits("layers", windows_per_layer=1, stores_bits=True)
    dense = full_or_floor_plan(geometry_of(model), whole=list(np.ndindex(3, 2)), floor_tokens=128).with_bits(widths)
    with pytest.raises(ValueError, match="engine layers does not hold plan"):
        refine(model, dense, samples, of_bits, 1.0, engine=layers)
