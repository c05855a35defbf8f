"""The choice among plans is made by what was measured, not by what was predicted."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import VOCABULARY, tiny_model
from transformers import PreTrainedModel

from moa_lab.calibration.answers import fill_greedily, score_answers
from moa_lab.calibration.samples import Sample
from moa_lab.evaluate.scoring import sample_loss
from moa_lab.evaluate.store import ScoreStore
from moa_lab.evaluate.validate import choose, validation_length
from moa_lab.models import geometry_of
from moa_lab.plan import Plan, dense_plan, uniform_plan
from moa_lab.provenance import Provenance
from moa_lab.records import Front, FrontPoint
from moa_lab.runtime import apply_plan

torch.set_num_threads(1)

DENSITIES = (0.1, 0.9, 0.3)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def samples(model: PreTrainedModel) -> list[Sample]:
    """Answers that the dense model gives itself; one task has three times the samples of the other."""

    def draft(task: str, seed: int, n_tokens: int) -> Sample:
        tokens = np.random.default_rng(seed).integers(5, VOCABULARY, n_tokens)
        detail = {"facts": [{"depth": 0.5, "wording": "a"}]} if task == "needles" else {}
        return fill_greedily(model, [Sample(task, tokens, ((n_tokens - 10, n_tokens),), detail)])[0]

    return [*(draft("needles", seed, 100) for seed in range(3)), draft("summaries", 3, 160)]


def plan_of(model: PreTrainedModel, density: float, name: str) -> Plan:
    return uniform_plan(geometry_of(model), density, sink_tokens=4, min_span=5).renamed(name)


def front_of(model: PreTrainedModel) -> Front:
    """The emptiest plan has the best prediction."""
    points = tuple(
        FrontPoint(plan_of(model, density, f"plan {density}"), {"needles@100/sum": density}, {"100": density}, "milp")
        for density in DENSITIES
    )
    return Front(points, ("needles@100/sum", "density"), provenance=Provenance(model="tiny", seed=3))


def measured_excess(model: PreTrainedModel, plan: Plan, samples: list[Sample]) -> float:
    by_task: dict[str, list[float]] = {}
    for sample in samples:
        dense = sample_loss(score_answers(model, [sample])[0])
        with apply_plan(model, plan, sample.length):
            by_task.setdefault(sample.task, []).append(sample_loss(score_answers(model, [sample])[0]) - dense)
    return float(np.mean([np.mean(values) for values in by_task.values()]))


def test_the_plan_with_the_lowest_measured_loss_is_kept_whatever_was_predicted(model: PreTrainedModel, samples: list[Sample]) -> None:
    found = choose(model, front_of(model), samples)
    expected = {f"plan {density}": measured_excess(model, plan_of(model, density, "any"), samples) for density in DENSITIES}
    assert found.excess == pytest.approx(expected, abs=1e-5)
    best = min(expected, key=lambda name: expected[name])
    assert best != "plan 0.1", "the prediction would have chosen this one"
    assert found.best.search["candidate"] == best
    assert found.best.name == "moa"
    assert found.best.identity() == plan_of(model, float(best.split()[1]), "any").identity()


def test_the_card_of_the_chosen_plan_tells_its_measured_scores(model: PreTrainedModel, samples: list[Sample]) -> None:
    found = choose(model, front_of(model), samples, name="chosen")
    assert found.best.name == "chosen"
    chosen = found.best.search["candidate"]
    assert found.best.search["excess_loss"] == found.excess[chosen]
    assert found.best.search["origin"] == "milp"
    assert set(found.best.scores) == {
        "validation needles@100 cross_entropy", "validation needles@100 retrieval", "validation summaries@160 cross_entropy",
    }  # fmt: skip
    score = found.best.scores["validation needles@100 retrieval"]
    assert set(score) == {"value", "n", "low", "high"}
    assert score["n"] == 3
    assert Plan.from_card(found.best.card()) == found.best


def test_rows_hold_every_plan_and_the_dense_model(model: PreTrainedModel, samples: list[Sample]) -> None:
    found = choose(model, front_of(model), samples)
    assert {row.plan for row in found.measurements} == {"dense", *(f"plan {density}" for density in DENSITIES)}
    for row in found.measurements.select(metric="retrieval", plan="dense"):
        assert row.value == 1.0, "the answers are the dense model's own"
    assert found.measurements.settings["chosen"] == found.best.search["candidate"]
    assert found.measurements.provenance == Provenance(model="tiny", seed=3)


def test_a_second_validation_takes_its_scores_from_the_store(model: PreTrainedModel, samples: list[Sample], tmp_path: Path) -> None:
    store = ScoreStore(tmp_path, "weights")
    steps: list[tuple[int, int]] = []
    first = choose(model, front_of(model), samples, store=store, progress=lambda *step: steps.append(step))
    assert steps == [(done, 4 * len(samples)) for done in range(4, 4 * len(samples) + 1, 4)]
    forwards: list[int] = []
    hook = model.register_forward_pre_hook(lambda *_: forwards.append(1))
    try:
        second = choose(model, front_of(model), samples, store=store)
    finally:
        hook.remove()
    assert forwards == []
    assert second.excess == first.excess


def test_nothing_to_choose_from_or_by_is_refused(model: PreTrainedModel, samples: list[Sample]) -> None:
    with pytest.raises(ValueError, match="at least one plan and one sample"):
        choose(model, Front((), ()), samples)
    with pytest.raises(ValueError, match="at least one plan and one sample"):
        choose(model, front_of(model), [])


def test_different_plans_of_one_name_are_refused_and_the_same_one_counts_once(model: PreTrainedModel, samples: list[Sample]) -> None:
    whole = dense_plan(geometry_of(model))

    def front(*plans: Plan) -> Front:
        return Front(tuple(FrontPoint(plan, {}, {"100": 1.0}, "milp") for plan in plans), ("density",))

    # The second's losses would be taken for the first's, which is the one that comes out.
    with pytest.raises(ValueError, match="two different plans are named 'kept'"):
        choose(model, front(whole.with_bits(4, "kept"), whole.renamed("kept")), samples)
    with pytest.raises(ValueError, match="two different plans are named 'dense'"):
        choose(model, front(whole.with_bits(8)), samples)
    coarse = whole.with_bits(4, "coarse")
    assert choose(model, front(coarse, coarse, whole), samples).best.is_dense


@pytest.mark.parametrize(("lengths", "expected"), [((512, 1024, 2048), 4096), ((2048, 512, 1024), 4096), ((1024,), 2048), ((3000,), 4096)])
def test_validation_is_at_twice_the_longest_profiled_length_as_far_as_the_model_goes(lengths: tuple[int, ...], expected: int) -> None:
    assert validation_length(lengths, 4096) == expected


@pytest.mark.parametrize(("used", "expected"), [((512, 3072), 3072), ((1024, 512), 2048), ((9000,), 2048), ((1500, 4096), 4096)])
def test_validation_is_at_the_longest_length_of_use_beyond_the_profiled_ones(used: tuple[int, ...], expected: int) -> None:
    assert validation_length((512, 1024), 4096, used) == expected


@pytest.mark.parametrize(("lengths", "expected"), [((1024, 2048, 4096), 3072), ((4096,), 3072)])
def test_where_the_model_goes_no_further_validation_is_between_the_longest_profiled_lengths(
    lengths: tuple[int, ...], expected: int
) -> None:
    assert validation_length(lengths, 4096) == expected


def test_the_validation_length_is_never_a_profiled_one_and_never_beyond_the_model() -> None:
    assert validation_length((2048, 2112), 2112) == 2080
    assert validation_length((512, 1024, 8192), 1024) == 768
    with pytest.raises(ValueError, match="lengths must hold one of at most 700 tokens"):
        validation_length((1024,), 700)
