from __future__ import annotations

import pytest
import torch
from texts import bpe_tokenizer
from tiny import tiny_model

from moa_lab.calibration import requests
from moa_lab.evaluate import perplexity, retrieval
from moa_lab.models import geometry_of
from moa_lab.plan import uniform_plan


def test_a_plan_that_keeps_everything_scores_as_the_dense_model() -> None:
    model, tokenizer = tiny_model("llama", max_length=1024), bpe_tokenizer()
    everything = uniform_plan(geometry_of(model), 1.0)
    for measure, metric in ((retrieval, "retrieval"), (perplexity, "cross_entropy")):
        dense = measure(model, tokenizer, lengths=[512], n=2)
        kept = measure(model, tokenizer, everything, lengths=[512], n=2)
        assert [(row.plan, row.metric, row.length, row.n) for row in dense] == [("dense", metric, 512, 2)]
        assert kept.rows[0].value == pytest.approx(dense.rows[0].value, abs=1e-5)
        assert dense.provenance.weights == kept.provenance.weights


def test_lines_and_the_models_own_summaries_are_measured_under_a_plan() -> None:
    model, tokenizer = tiny_model("llama", max_length=1024), bpe_tokenizer()
    plan = uniform_plan(geometry_of(model), 0.5)
    assert [row.task for row in retrieval(model, tokenizer, plan, lengths=[512, 640], n=1, kind="lines")] == ["lines", "lines"]
    (row,) = perplexity(model, tokenizer, plan, lengths=[640], n=1, kind="summaries")
    assert (row.task, row.density) == ("summaries", 0.5)


@pytest.mark.parametrize("measure", [retrieval, perplexity])
def test_an_unknown_kind_and_a_length_beyond_the_model_are_refused(measure: object) -> None:
    model, tokenizer = tiny_model("llama", max_length=256), bpe_tokenizer()
    assert callable(measure)
    with pytest.raises(ValueError, match="kind must be"):
        measure(model, tokenizer, lengths=[256], kind="poems")
    with pytest.raises(ValueError, match="length 512 is beyond the model's maximum of 256 tokens"):
        measure(model, tokenizer, lengths=[512])


def test_the_whole_library_in_one_screen() -> None:
    import moa_lab as ml

    model, tokenizer = tiny_model("llama", max_length=1024), bpe_tokenizer()
    samples = ml.calibrate(model, tokenizer, lengths=[384, 512], wanted=requests(questions=2, others=1, answer_tokens=8))
    profile = ml.profile(model, samples)
    front = ml.search(profile, density=0.6, time_limit_s=10, max_points=3)
    best = ml.validate(model, tokenizer, front, length=448, questions=2, summaries=1)
    assert best.density(512) <= 0.6 + 1e-9
    assert best.scores
    better = ml.refine(model, best, samples, ml.loss_table(profile), 0.6, rounds=1)
    assert all(point.plan.density(512) <= 0.6 + 1e-9 for point in better)
    before = model.config._attn_implementation
    with ml.apply_plan(model, best, n_tokens=64):
        tokens = torch.arange(1, 40)[None]
        assert model.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0).shape == (1, 43)
    assert model.config._attn_implementation == before
    with pytest.raises(ValueError, match="length 2048 is beyond the model's maximum of 1024 tokens"):
        ml.validate(model, tokenizer, front, length=2048)
