"""Learned spans keep the density, go to the heads that need them, and leave the model as it was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from own_answers import DENSITY, LENGTHS, own_answers
from tiny import tiny_model
from transformers import PreTrainedModel

from moa_lab.calibration.answers import answer_logits
from moa_lab.calibration.samples import SampleSet
from moa_lab.engines import EngineLimits, meets
from moa_lab.learning import checkpoint, learn_spans, slopes
from moa_lab.learning.descent import SHRINKING
from moa_lab.models import geometry_of
from moa_lab.plan import Plan, uniform_plan
from moa_lab.profiling import profile
from moa_lab.records import Front, LossTable
from moa_lab.runtime import apply_plan
from moa_lab.search import InfeasibleError, loss_table

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    made = tiny_model("llama", layers=3)
    # One KV head of six says something of its values; those of the others are nothing, whatever they see.
    with torch.no_grad():
        for layer in range(3):
            values = made.model.layers[layer].self_attn.v_proj.weight
            values[16:] = 0
            if layer != 1:
                values[:] = 0
    return made


@pytest.fixture(scope="module")
def samples(model: PreTrainedModel) -> SampleSet:
    return own_answers(model, 2)


@pytest.fixture(scope="module")
def table(model: PreTrainedModel, samples: SampleSet) -> LossTable:
    return loss_table(profile(model, samples))


@pytest.fixture(scope="module")
def front(model: PreTrainedModel, samples: SampleSet, table: LossTable) -> Front:
    return learn_spans(model, samples, table, DENSITY, steps=24)


def test_the_head_that_carries_all_keeps_most_and_the_density_holds(front: Front) -> None:
    learned = front.points[0]
    assert {point.origin for point in front} == {"learned"}
    for length in LENGTHS:
        spans = learned.plan.spans(length)
        assert spans.argmax() == 2
        assert spans[1, 0] > 0.9 * length
        assert learned.plan.density(length) <= DENSITY
    assert front.settings["steps"] == 24
    assert learned.plan.search["lesson_lengths"] == list(LENGTHS)
    assert set(learned.plan.search["drawn_divergence"]) == {"questions", "summaries"}


def divergence(model: PreTrainedModel, plan: Plan, samples: SampleSet) -> float:
    """Mean over the samples, nats a token, of the answers under `plan` from the dense model's."""
    found = []
    with torch.no_grad():
        for sample in samples:
            dense = answer_logits(model, [sample])[0].log_softmax(-1)
            with apply_plan(model, plan, sample.length):
                ours = answer_logits(model, [sample])[0].log_softmax(-1)
            found.append(float(torch.nn.functional.kl_div(ours, dense, reduction="batchmean", log_target=True)))
    return float(np.mean(found))


def test_the_answers_stay_nearer_to_the_dense_models_than_with_uniform_spans(
    front: Front, model: PreTrainedModel, samples: SampleSet
) -> None:
    uniform = uniform_plan(geometry_of(model), DENSITY, LENGTHS)
    assert divergence(model, front.points[0].plan, samples) < 0.5 * divergence(model, uniform, samples)


def test_a_seed_says_what_is_learned_and_progress_is_told(model: PreTrainedModel, samples: SampleSet, table: LossTable) -> None:
    told: list[tuple[int, int]] = []
    first = learn_spans(model, samples, table, DENSITY, steps=3, seed=5, progress=lambda done, total: told.append((done, total)))
    again = learn_spans(model, samples, table, DENSITY, steps=3, seed=5)
    assert first.points[0].plan.rules == again.points[0].plan.rules
    assert first.points[0].plan.search == again.points[0].plan.search
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_a_killed_descent_goes_on_where_it_was_and_another_begins_anew(
    model: PreTrainedModel, samples: SampleSet, table: LossTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    told: list[int] = []

    def kill_at_five(step: int, steps: int) -> None:
        if step == 5:
            raise Killed

    monkeypatch.setattr(checkpoint, "SAVE_S", 0.0)
    whole = learn_spans(model, samples, table, DENSITY, steps=8)
    with pytest.raises(Killed):
        learn_spans(model, samples, table, DENSITY, steps=8, parts_dir=tmp_path, progress=kill_at_five)
    resumed = learn_spans(model, samples, table, DENSITY, steps=8, parts_dir=tmp_path, progress=lambda step, steps: told.append(step))
    assert told == [5, 6, 7, 8]
    assert [point.plan.identity() for point in resumed] == [point.plan.identity() for point in whole]
    assert resumed.points[0].plan.search["drawn_divergence"] == whole.points[0].plan.search["drawn_divergence"]
    told.clear()
    learn_spans(model, samples, table, DENSITY, steps=8, seed=1, parts_dir=tmp_path, progress=lambda step, steps: told.append(step))
    assert told == list(range(9))
    for state in tmp_path.iterdir():
        state.write_bytes(state.read_bytes()[:100])
    again = learn_spans(model, samples, table, DENSITY, steps=8, parts_dir=tmp_path)
    assert [point.plan.identity() for point in again] == [point.plan.identity() for point in whole]


def test_a_task_of_no_weight_says_nothing(model: PreTrainedModel, samples: SampleSet, table: LossTable) -> None:
    first = learn_spans(model, samples, table, DENSITY, steps=4, weights={"summaries": 0.0}, name="asked")
    assert first.points[0].plan.name == "asked"
    assert first.settings["weights"] == {"summaries": 0.0}
    assert first.points[0].plan.search.items() >= {"weights": {"summaries": 0.0}, "shrinking": SHRINKING}.items()
    # Both tasks are answers of the model's own here: what is drawn is the same, what is learned is not.
    assert first.points[0].plan.search["drawn_divergence"].keys() == {"questions", "summaries"}


def test_a_layer_may_be_held_to_one_rule(model: PreTrainedModel, samples: SampleSet, table: LossTable) -> None:
    plan = learn_spans(model, samples, table, DENSITY, steps=2, max_rules_per_layer=1).points[0].plan
    assert all(len(set(row)) == 1 for row in plan.rules)
    assert all(plan.density(n) <= DENSITY for n in LENGTHS)


def test_learned_plans_are_held_by_the_engine_within_the_budget(model: PreTrainedModel, samples: SampleSet, table: LossTable) -> None:
    engine = EngineLimits("some", windows_per_model=2, windows_per_layer=1)
    front = learn_spans(model, samples, table, DENSITY, steps=2, engine=engine)
    assert len(front)
    for point in front:
        assert meets(point.plan, engine, dict.fromkeys(LENGTHS, DENSITY))
        assert point.plan.search["engine"]["name"] == "some"
    with pytest.raises(ValueError, match="engine some knows no stored bits"):
        learn_spans(model, samples, table, DENSITY, steps=2, engine=engine, bits=8)


def test_the_model_is_as_before(model: PreTrainedModel, samples: SampleSet, table: LossTable) -> None:
    tokens = torch.arange(10, 30)[None]
    before = model(input_ids=tokens).logits
    learn_spans(model, samples, table, DENSITY, steps=1)
    assert torch.equal(model(input_ids=tokens).logits, before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_cannot_be_learned_is_refused_in_words(model: PreTrainedModel, samples: SampleSet, table: LossTable) -> None:
    with pytest.raises(ValueError, match="at least one step and one sample, got 0 and 8"):
        learn_spans(model, samples, table, DENSITY, steps=0)
    lacking = tuple(sample for sample in samples if (sample.task, sample.length) != ("summaries", 448))
    with pytest.raises(ValueError, match="no samples of summaries at 448"):
        learn_spans(model, replace(samples, samples=lacking), table, DENSITY, steps=1)
    nothing = {task: 0.0 for task, _ in samples.keys}
    for weights in ({"summary": 1.0}, {"summaries": -1.0}, {"summaries": float("nan")}, {"summaries": float("inf")}, nothing):
        with pytest.raises(ValueError, match="of the tasks questions, summaries, got"):
            learn_spans(model, samples, table, DENSITY, steps=1, weights=weights)
    with pytest.raises(InfeasibleError, match="infeasible"):
        learn_spans(model, samples, table, 0.05, steps=1)


def test_fewer_bits_buy_longer_spans_under_which_keys_and_values_are_rounded(
    model: PreTrainedModel, samples: SampleSet, table: LossTable, front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[object] = []
    original = slopes.heads_as_stored
    monkeypatch.setattr(slopes, "heads_as_stored", lambda key, value, bits: seen.append(bits) or original(key, value, bits))
    low = learn_spans(model, samples, table, DENSITY / 2, steps=4, bits="8+4")
    assert set(seen) == {((8, 4),) * 2}
    for length in LENGTHS:
        for point in low:
            assert point.density[str(length)] == point.plan.density(length) <= DENSITY / 2 + 1e-9
            assert (point.plan.widths() == (8, 4)).all()
            assert point.plan.name.endswith("@8+4")
    assert low.points[0].plan.density(LENGTHS[-1]) > 0.97 * DENSITY / 2
    assert not len(learn_spans(model, samples, table, 0.9, steps=1, bits=4)), "all tokens fit"
    with pytest.raises(ValueError, match="one mix"):
        learn_spans(model, samples, table, DENSITY, steps=1, bits="8,4")
