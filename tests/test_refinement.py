"""Refining: the measured loss goes down, the budget holds, and a killed refinement goes on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import VOCABULARY, tiny_model
from transformers import PreTrainedModel

from moa_lab.calibration.samples import Sample, SampleSet
from moa_lab.evaluate.scoring import sample_loss, score_samples
from moa_lab.models import geometry_of
from moa_lab.plan import Plan, full_or_floor_plan
from moa_lab.profiling import profile
from moa_lab.records import LossTable
from moa_lab.refinement import _Draws, _Scale, refine
from moa_lab.search import loss_table

torch.set_num_threads(1)

LENGTHS = (320, 448)
DENSITY = 0.6


def own_answer(model: PreTrainedModel, task: str, n_tokens: int, seed: int) -> Sample:
    """Random tokens whose answers are what the dense model itself finds likeliest: only the dense model knows them best."""
    tokens = np.random.default_rng(seed).integers(5, VOCABULARY, n_tokens)
    with torch.no_grad():
        likeliest = model(input_ids=torch.from_numpy(tokens)[None]).logits[0].argmax(-1).numpy()
    start = n_tokens - 60
    return Sample(task, np.concatenate([tokens[:start], likeliest[start - 1 : -1]]), ((start, n_tokens),))


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama", layers=3)


@pytest.fixture(scope="module")
def samples(model: PreTrainedModel) -> SampleSet:
    return SampleSet(tuple(own_answer(model, task, n, seed) for n in LENGTHS for task in ("questions", "summaries") for seed in range(4)))


@pytest.fixture(scope="module")
def table(model: PreTrainedModel, samples: SampleSet) -> LossTable:
    return loss_table(profile(model, samples))


def mean_loss(model: PreTrainedModel, plan: Plan, samples: SampleSet) -> float:
    return float(np.mean([sample_loss(result) for result in score_samples(model, plan, list(samples))]))


@pytest.fixture(scope="module")
def worst(model: PreTrainedModel, samples: SampleSet) -> Plan:
    """Of the plans with two whole heads the one that loses most."""
    geometry = geometry_of(model)
    pairs = [((first, 0), (second, 1)) for first in range(3) for second in range(3)]
    plans = [full_or_floor_plan(geometry, whole=pair, floor_tokens=128) for pair in pairs]
    return max(plans, key=lambda plan: mean_loss(model, plan, samples))


def test_the_loss_goes_down_and_no_point_exceeds_the_budget(
    model: PreTrainedModel, samples: SampleSet, table: LossTable, worst: Plan
) -> None:
    points = refine(model, worst, samples, table, dict.fromkeys(LENGTHS, DENSITY), steps=12, points=4).points
    assert [point.plan.name for point in points] == ["refined-3", "refined-6", "refined-9", "refined-12"]
    for point in points:
        assert point.origin == "refined"
        assert point.plan.search["start"] == worst.name
        assert point.predicted == pytest.approx({**point.predicted, **table.predict(table.choice(point.plan))})
        for n in LENGTHS:
            assert point.density[str(n)] == pytest.approx(point.plan.density(n))
            assert point.plan.density(n) <= DENSITY + 1e-9
    losses = [mean_loss(model, point.plan, samples) for point in points]
    at_start = mean_loss(model, worst, samples)
    dense = mean_loss(model, full_or_floor_plan(worst.geometry, whole=list(np.ndindex(3, 2)), floor_tokens=128), samples)
    assert min(losses) - dense < 0.6 * (at_start - dense)


def test_the_same_call_after_a_kill_computes_nothing_twice_and_ends_the_same(
    model: PreTrainedModel, samples: SampleSet, table: LossTable, worst: Plan, tmp_path: Path
) -> None:
    def killed(done: int, total: int) -> None:
        assert total == 4
        if done == 2:
            raise KeyboardInterrupt

    unbroken = refine(model, worst, samples, table, DENSITY, steps=4, points=1)
    with pytest.raises(KeyboardInterrupt):
        refine(model, worst, samples, table, DENSITY, steps=4, points=1, parts_dir=tmp_path, progress=killed)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert before
    found = refine(model, worst, samples, table, DENSITY, steps=4, points=1, parts_dir=tmp_path)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(list(tmp_path.iterdir())) > len(before)
    assert [point.plan.rules for point in found] == [point.plan.rules for point in unbroken]


def test_the_number_of_rules_per_layer_is_kept(model: PreTrainedModel, samples: SampleSet, table: LossTable, worst: Plan) -> None:
    (found,) = refine(model, worst, samples, table, DENSITY, steps=2, points=1, max_rules_per_layer=1)
    assert found.plan.rules != worst.rules
    assert all(len(set(row)) == 1 for row in found.plan.rules)


@pytest.mark.parametrize(("steps", "points"), [(0, 1), (3, 4), (3, 0)])
def test_steps_and_points_that_make_no_sense_are_refused(
    model: PreTrainedModel, samples: SampleSet, table: LossTable, worst: Plan, steps: int, points: int
) -> None:
    with pytest.raises(ValueError, match=f"steps {steps}, points {points}"):
        refine(model, worst, samples, table, DENSITY, steps=steps, points=points)


def test_every_sample_is_drawn_before_any_comes_again(samples: SampleSet) -> None:
    four = samples.samples[:4]
    draws = _Draws(four, np.random.default_rng(0))
    for _ in range(3):
        assert {sample.identity for sample in draws.take(2) + draws.take(2)} == {sample.identity for sample in four}
    assert len(draws.take(9)) == 4


def test_an_upset_sample_counts_as_a_usual_one_and_the_present_choice_is_the_origin() -> None:
    scale = _Scale()
    random = np.random.default_rng(0)
    effects = random.normal(size=(5, 2, 3, 4))
    choice = random.integers(0, 4, (2, 3))
    ordinary = scale.scaled(effects, choice)
    np.testing.assert_allclose(np.take_along_axis(ordinary, choice[..., None], axis=-1), 0.0)
    upset = np.stack([effects[0], 1000 * effects[0]])
    one = scale.scaled(effects[:1], choice)
    np.testing.assert_array_less(np.abs(scale.scaled(upset, choice)).max(), 3 * np.abs(one).max())


def test_samples_without_any_effect_move_nothing() -> None:
    assert not _Scale().scaled(np.zeros((2, 2, 3, 4)), np.zeros((2, 3), dtype=np.int64)).any()
