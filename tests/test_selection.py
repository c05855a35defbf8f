"""Choosing whole heads by measuring: the budget holds, the measured best comes back, and a killed selection goes on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from own_answers import DENSITY, LENGTHS, own_answers
from tiny import tiny_model
from transformers import PreTrainedModel

from moa_lab.calibration.samples import SampleSet
from moa_lab.evaluate.effects import MeasuredLosses
from moa_lab.profiling import profile
from moa_lab.records import LossTable
from moa_lab.search import InfeasibleError, WholeHeads, head_scores, loss_table, ranked_plan
from moa_lab.selection import _LinearLoss, select_heads

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama", layers=3)


@pytest.fixture(scope="module")
def samples(model: PreTrainedModel) -> SampleSet:
    return own_answers(model, 2)


@pytest.fixture(scope="module")
def table(model: PreTrainedModel, samples: SampleSet) -> LossTable:
    return loss_table(profile(model, samples))


def test_the_points_are_the_best_of_what_was_measured_and_keep_the_density(
    model: PreTrainedModel, samples: SampleSet, table: LossTable, tmp_path: Path
) -> None:
    front = select_heads(model, samples, table, DENSITY, plans=14, floors=(128, 192), keep=3, parts_dir=tmp_path)
    losses = [point.plan.search["calibration_loss"] for point in front]
    assert len(front) == 3
    assert losses == sorted(front.settings["losses"])[:3]
    for point, loss in zip(front, losses, strict=True):
        assert all(point.plan.density(n) <= DENSITY for n in LENGTHS)
        assert loss == pytest.approx(np.mean(list(MeasuredLosses(model, samples)(point.plan).values())), rel=1e-6)
        assert point.origin == "selected"


def test_no_point_is_worse_than_the_plain_ranking(model: PreTrainedModel, samples: SampleSet, table: LossTable) -> None:
    front = select_heads(model, samples, table, DENSITY, plans=6, floors=(128,), keep=1)
    ranked = np.mean(list(MeasuredLosses(model, samples)(ranked_plan(table, DENSITY, floor_tokens=128)).values()))
    assert front.points[0].plan.search["calibration_loss"] <= ranked + 1e-9


def test_nothing_is_measured_twice_after_a_kill(
    model: PreTrainedModel, samples: SampleSet, table: LossTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = select_heads(model, samples, table, DENSITY, plans=8, floors=(128,), parts_dir=tmp_path)

    def fails(*_: object, **__: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr("moa_lab.evaluate.effects.score_samples", fails)
    again = select_heads(model, samples, table, DENSITY, plans=8, floors=(128,), parts_dir=tmp_path)
    assert [p.plan.rules for p in again] == [p.plan.rules for p in first]


def test_an_impossible_floor_is_left_out_and_no_floor_at_all_is_refused(
    model: PreTrainedModel, samples: SampleSet, table: LossTable
) -> None:
    front = select_heads(model, samples, table, {320: 0.5}, plans=2, floors=(128, 192))
    assert front.settings["floors"] == [128]
    with pytest.raises(InfeasibleError, match="infeasible"):
        select_heads(model, samples, table, {320: 0.3}, plans=2)
    with pytest.raises(ValueError, match="at least 2"):
        select_heads(model, samples, table, DENSITY, plans=1)


def test_the_learner_finds_heads_that_the_profile_ranks_low() -> None:
    # 40 heads, 8 may be whole; scores are mostly noise, the loss falls with the square of what is kept.
    rng = np.random.default_rng(3)
    worth = rng.exponential(size=40) ** 1.5
    worth /= worth.sum()
    scores = 0.5 * np.log(worth) + rng.standard_normal(40)
    scores = (scores - scores.mean()) / scores.std()

    class Arm:
        def choice(self, price: np.ndarray) -> np.ndarray:
            return np.isin(np.arange(40), np.argsort(price, kind="stable")[:8]).astype(int)

        def whole(self, choice: np.ndarray) -> np.ndarray:
            return choice == 1

    arm, learner = Arm(), _LinearLoss(scores, (128,))

    def loss(price: np.ndarray) -> float:
        return float(5 * (1 - worth[arm.choice(price) == 1].sum()) ** 2)

    found = []
    for step in range(160):
        _, price = learner.around_prior(rng) if step < 40 else learner.drawn(rng, {128: arm})  # type: ignore[dict-item]
        found.append(loss(price))
        learner.learn(arm.whole(arm.choice(price)), 128, found[-1])
    ranked, best = loss(-scores), loss(-worth)
    assert min(found) - best < 0.25 * (ranked - best)
    assert np.mean(found[-20:]) < np.mean(found[:40])


def test_whole_heads_are_the_cheapest_that_fit(table: LossTable) -> None:
    heads = WholeHeads(table, DENSITY, 128)
    price = np.arange(table.geometry.layers * table.geometry.kv_heads, dtype=float)
    whole = heads.whole(heads.choice(price)).ravel()
    assert whole.any()
    assert not whole.all()
    assert list(whole) == sorted(whole, reverse=True)
    assert table.density(heads.choice(price), LENGTHS[0]) <= DENSITY
    ranked = ranked_plan(table, DENSITY, floor_tokens=128)
    assert (table.choice(ranked) == heads.choice(-head_scores(table, floor_tokens=128))).all()
