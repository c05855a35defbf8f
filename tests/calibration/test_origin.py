"""A record is held against the model it meets: other weights, another tokenizer, token ids without an embedding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from own_answers import own_answers
from tiny import VOCABULARY, tiny_model, tiny_tokenizer
from transformers import PreTrainedModel

from moa_lab.calibration import SampleSet, calibrate, requests
from moa_lab.calibration.origin import check_folder, check_origin, check_vocabulary, same_weights
from moa_lab.calibration.samples import Sample
from moa_lab.evaluate.agreement import agreement_rows
from moa_lab.evaluate.scoring import score_samples
from moa_lab.learning import learn_spans, mean_slopes
from moa_lab.models import geometry_of, model_name, tokenizer_fingerprint, weights_fingerprint
from moa_lab.plan import dense_plan
from moa_lab.profiling import profile
from moa_lab.profiling.gates import train_gates
from moa_lab.profiling.inputs import check_inputs
from moa_lab.provenance import Provenance
from moa_lab.records import LossTable, Measurements
from moa_lab.refinement import refine
from moa_lab.search import loss_table

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama", layers=3)


@pytest.fixture(scope="module")
def other() -> PreTrainedModel:
    return tiny_model("llama", layers=3, seed=1)


@pytest.fixture(scope="module")
def samples(model: PreTrainedModel) -> SampleSet:
    return replace(own_answers(model, 1), provenance=origin_of(model))


@pytest.fixture(scope="module")
def table(model: PreTrainedModel, samples: SampleSet) -> LossTable:
    return loss_table(profile(model, samples))


def origin_of(model: PreTrainedModel) -> Provenance:
    return Provenance(model=model_name(model), weights=weights_fingerprint(model), tokenizer=tokenizer_fingerprint(tiny_tokenizer()))


def test_samples_of_another_model_are_refused_before_any_work(
    model: PreTrainedModel, other: PreTrainedModel, samples: SampleSet, table: LossTable
) -> None:
    plan = table.plan(np.zeros((3, 2), dtype=np.int64), "cut")
    calls: list[Any] = [
        lambda: profile(other, samples),
        lambda: train_gates(other, samples, steps=1),
        lambda: refine(other, plan, samples, table, 0.6),
        lambda: learn_spans(other, samples, table, 0.6, steps=1),
        lambda: mean_slopes(other, samples, table, np.ones((6, len(table.rules))) / len(table.rules), steps=1),
    ]
    other.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    for call in calls:
        with pytest.raises(ValueError, match=f"samples: made with weights {weights_fingerprint(model)} .*, this is") as told:
            call()
        assert "any_model=True" in str(told.value)
        assert "\n" not in str(told.value)
    other._forward_pre_hooks.clear()


def test_any_model_takes_them_all_the_same(other: PreTrainedModel, samples: SampleSet) -> None:
    assert profile(other, samples, any_model=True).tasks == ("questions", "summaries")


def test_a_table_of_another_model_is_refused(model: PreTrainedModel, other: PreTrainedModel, samples: SampleSet, table: LossTable) -> None:
    theirs = replace(samples, provenance=origin_of(other))
    with pytest.raises(ValueError, match=r"loss table \(profile\): made with weights"):
        refine(other, table.plan(np.zeros((3, 2), dtype=np.int64), "cut"), theirs, table, 0.6)
    with pytest.raises(ValueError, match="the loss table is of another geometry"):
        learn_spans(tiny_model("llama", layers=2), samples, table, 0.6, steps=1, any_model=True)


def test_a_table_of_the_same_heads_at_another_maximum_length_is_taken(model: PreTrainedModel, samples: SampleSet, table: LossTable) -> None:
    longer = replace(table, geometry=replace(table.geometry, max_length=table.geometry.max_length * 2))
    check_inputs(model, samples, longer)


def test_another_tokenizer_is_refused_where_it_is_given(model: PreTrainedModel, samples: SampleSet) -> None:
    ours, foreign = tiny_tokenizer(), tiny_tokenizer(chat_template=None)
    profile(model, samples, tokenizer=ours)
    with pytest.raises(ValueError, match=f"made with tokenizer {tokenizer_fingerprint(ours)} .*, this is {tokenizer_fingerprint(foreign)}"):
        profile(model, samples, tokenizer=foreign)


def test_token_ids_beyond_the_vocabulary_are_refused_in_words(model: PreTrainedModel) -> None:
    far = Sample("text", np.array([1, 2, VOCABULARY, 3]), ((2, 3),))
    small = tiny_model("llama", vocab_size=64)
    plan = dense_plan(geometry_of(model))
    for call in (
        lambda: check_vocabulary([far], model),
        lambda: profile(model, SampleSet((far,)), any_model=True),
        lambda: score_samples(model, plan, [far]),
        lambda: agreement_rows(model, [plan], [far]),
    ):
        with pytest.raises(ValueError, match=f"token id {VOCABULARY} of a 'text' sample is outside the vocabulary of model"):
            call()
    with pytest.raises(ValueError, match="outside the vocabulary of model 'LlamaForCausalLM' \\(0 to 63\\)"):
        calibrate(small, tiny_tokenizer(), [512], wanted=requests(questions=1, others=0))


def test_loads_of_one_file_in_other_number_formats_are_the_same_weights() -> None:
    whole, half, brain = (tiny_model("llama", seed=3).to(dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16))
    assert weights_fingerprint(half) != weights_fingerprint(whole)
    assert same_weights(origin_of(whole), brain)
    assert same_weights(origin_of(brain), whole)
    assert same_weights(origin_of(half), whole)
    # What a float16 load had before cannot be told: its name decides.
    assert same_weights(origin_of(whole), half)
    assert not same_weights(replace(origin_of(whole), model="another"), half)
    assert not same_weights(origin_of(whole), tiny_model("llama", seed=4))
    check_origin(Provenance(), half, "samples")


def test_a_runs_folder_is_not_gone_on_with_by_other_weights(
    tmp_path: Path, model: PreTrainedModel, other: PreTrainedModel, samples: SampleSet
) -> None:
    samples.save(tmp_path / "samples.safetensors")
    Measurements((), provenance=origin_of(model)).save(tmp_path / "measurements.json")
    (tmp_path / "broken.json").write_text("{")
    check_folder(tmp_path, model, tiny_tokenizer())
    with pytest.raises(ValueError, match=r"measurements.json: made with weights .*; choose another folder, or delete this one"):
        check_folder(tmp_path, other, tiny_tokenizer())
    (tmp_path / "measurements.json").unlink()
    with pytest.raises(ValueError, match=r"samples.safetensors: made with tokenizer"):
        check_folder(tmp_path, model, tiny_tokenizer(chat_template=None))


def test_scores_of_two_models_are_not_one_table(model: PreTrainedModel, other: PreTrainedModel) -> None:
    ours, theirs = (Measurements((), provenance=origin_of(each)) for each in (model, other))
    assert ours.plus(ours) == ours
    with pytest.raises(ValueError, match="scores of different models are not one table"):
        ours.plus(theirs)
