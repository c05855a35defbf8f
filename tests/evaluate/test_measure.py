from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from texts import bpe_tokenizer
from tiny import tiny_model

import moa_lab as ml
from moa_lab.calibration import requests
from moa_lab.evaluate import perplexity, retrieval
from moa_lab.evaluate.harness import harness
from moa_lab.models import geometry_of
from moa_lab.plan import dense_plan, uniform_plan
from moa_lab.storage import RecordError


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


def test_a_plan_may_be_the_path_of_its_card(tmp_path: Path) -> None:
    model, tokenizer = tiny_model("llama", max_length=1024), bpe_tokenizer()
    plan = uniform_plan(geometry_of(model), 0.5)
    card = str(plan.save(tmp_path / "plan.json"))
    for measure in (retrieval, perplexity):
        assert measure(model, tokenizer, card, lengths=[512], n=1).rows == measure(model, tokenizer, plan, lengths=[512], n=1).rows
    assert ml.parity(model, tokenizer, card, n_tokens=40).settings["plan_identity"] == plan.identity()


TAKES_A_PLAN: dict[str, Callable[[Any, Any, Any], Any]] = {
    "retrieval": lambda model, tokenizer, plan: retrieval(model, tokenizer, plan, lengths=[128]),
    "perplexity": lambda model, tokenizer, plan: perplexity(model, tokenizer, plan, lengths=[128], kind="summaries"),
    "parity": lambda model, tokenizer, plan: ml.parity(model, tokenizer, plan),
    "harness": lambda model, tokenizer, plan: harness(model, tokenizer, plan, ["any"]),
    "generate": lambda model, tokenizer, plan: ml.generate(model, tokenizer, "a", plan=plan),
    "profile": lambda model, _, plan: ml.profile(model, [], plan=plan),
    "refine": lambda model, _, plan: ml.refine(model, plan, [], None, 0.5),
    "apply_plan": lambda model, _, plan: ml.apply_plan(model, plan).__enter__(),
}


@pytest.mark.parametrize("use", TAKES_A_PLAN.values(), ids=TAKES_A_PLAN)
def test_what_is_no_plan_is_refused_wherever_one_is_taken(use: Callable[[Any, Any, Any], Any], tmp_path: Path) -> None:
    model, tokenizer = tiny_model("llama"), bpe_tokenizer()
    with pytest.raises(RecordError, match="no such file"):
        use(model, tokenizer, tmp_path / "plan.json")
    with pytest.raises(ValueError, match="must be a Plan or the path of a config card, got dict"):
        use(model, tokenizer, {})


@pytest.mark.parametrize("measure", [retrieval, perplexity])
def test_a_dense_plan_of_another_geometry_is_refused_too(measure: Any) -> None:
    other = dense_plan(geometry_of(tiny_model("olmo2")))
    with pytest.raises(ValueError, match="another geometry"):
        measure(tiny_model("llama"), bpe_tokenizer(), other, lengths=[128])


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
