"""Measured effects of heads: each equals the difference of two plans' losses, and what is on disk is not measured again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny import random_tokens, tiny_model
from transformers import PreTrainedModel

from moa_lab.calibration.samples import Sample, SampleSet
from moa_lab.evaluate import effects
from moa_lab.evaluate.effects import MeasuredLosses, head_effects
from moa_lab.evaluate.scoring import mean_losses, score_samples
from moa_lab.plan import SpanRule, read_mixes
from moa_lab.profiling import profile
from moa_lab.records import LossTable
from moa_lab.search import loss_table

LENGTHS = (320, 448)
RULES = (SpanRule(128, 0.0), SpanRule(192, 0.0), SpanRule(0.0, 1.0))


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def samples() -> SampleSet:
    return SampleSet(tuple(Sample("questions", random_tokens(1, n, seed=n)[0].numpy(), ((n - 40, n),)) for n in LENGTHS))


@pytest.fixture(scope="module")
def table(model: PreTrainedModel, samples: SampleSet) -> LossTable:
    return loss_table(profile(model, samples), RULES)


def test_an_effect_is_the_loss_with_one_head_changed_less_the_loss_as_it_is(
    model: PreTrainedModel, samples: SampleSet, table: LossTable
) -> None:
    choice = np.array([[1, 0], [2, 1]])
    heads = [(0, 0), (0, 1), (1, 0)]
    found = head_effects(MeasuredLosses(model, samples), table, choice, heads)
    here = mean_losses(list(samples), score_samples(model, table.plan(choice, "here"), list(samples)))
    assert set(found) == {("questions", n) for n in LENGTHS}
    for (end, rule), (layer, head) in [(pair, at) for pair in ((0, 0), (1, 2)) for at in heads]:
        changed = choice.copy()
        changed[layer, head] = rule
        losses = mean_losses(list(samples), score_samples(model, table.plan(changed, "changed"), list(samples)))
        for key, values in found.items():
            assert values.spans[end, layer, head] == pytest.approx(losses[key] - here[key], abs=1e-7)
    assert any(abs(values.spans[0, 0, 0]) > 1e-5 for values in found.values()), "a test in which nothing matters shows nothing"
    # At an end already, and not asked for.
    ends = [values.spans for values in found.values()]
    assert all(values[0, 0, 1] == values[1, 1, 0] == values[0, 1, 1] == values[1, 1, 1] == 0 for values in ends)
    assert all((values.bits == 0).all() for values in found.values()), "all heads are stored in the table's one mix"


def test_an_effect_of_bits_is_that_of_one_head_stored_in_others_with_its_own_span(
    model: PreTrainedModel, samples: SampleSet, table: LossTable
) -> None:
    stored = table.in_mixes(read_mixes("16,4"))
    # (layer 0, head 0) keeps 192 tokens in 4 bits, the others of the first layer 128 in 16.
    choice = np.array([[4, 0], [2, 1]])
    found = head_effects(MeasuredLosses(model, samples), stored, choice, [(0, 0), (1, 1)])
    here = mean_losses(list(samples), score_samples(model, stored.plan(choice, "here"), list(samples)))
    for part, end, head, rule in (("bits", 0, (0, 0), 1), ("bits", 1, (1, 1), 4), ("spans", 0, (0, 0), 3), ("spans", 1, (0, 0), 5)):
        changed = choice.copy()
        changed[head] = rule
        losses = mean_losses(list(samples), score_samples(model, stored.plan(changed, "changed"), list(samples)))
        for key, values in found.items():
            assert getattr(values, part)[end, *head] == pytest.approx(losses[key] - here[key], abs=1e-7)
            assert abs(losses[key] - here[key]) > 1e-6
    assert all(values.bits[1, 0, 0] == values.bits[0, 1, 1] == 0 for values in found.values())


def test_progress_counts_the_plans_to_measure(model: PreTrainedModel, samples: SampleSet, table: LossTable) -> None:
    told: list[tuple[int, int]] = []
    choice = np.array([[1, 0], [2, 1]])
    head_effects(MeasuredLosses(model, samples), table, choice, [(0, 0), (0, 1)], progress=lambda *step: told.append(step))
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_what_is_on_disk_is_not_measured_again(
    model: PreTrainedModel, samples: SampleSet, table: LossTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, other = (table.plan(np.full((2, 2), rule), "plan") for rule in (0, 1))
    first = MeasuredLosses(model, samples, tmp_path)(plan)
    fewer = SampleSet(samples.samples[:1])
    on_fewer = MeasuredLosses(model, fewer, tmp_path)(plan)
    assert set(on_fewer) < set(first), "losses on other samples are other losses"

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("measured again")

    with monkeypatch.context() as patched:
        patched.setattr(effects, "score_samples", refuse)
        assert MeasuredLosses(model, samples, tmp_path)(plan) == first
        with pytest.raises(AssertionError, match="measured again"):
            MeasuredLosses(model, samples, tmp_path)(other)
        with pytest.raises(AssertionError, match="measured again"):
            MeasuredLosses(tiny_model("llama", seed=1), samples, tmp_path)(plan)
    for path in tmp_path.iterdir():
        path.write_text(path.read_text()[:-20])
    assert MeasuredLosses(model, samples, tmp_path)(plan) == first, "a broken file is measured again"
