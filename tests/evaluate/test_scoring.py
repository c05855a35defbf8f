"""Scores under a plan: one pass says what generating the answers would, and rows count what was asked."""

import contextlib
import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import VOCABULARY, tiny_model
from transformers import DynamicCache, PreTrainedModel

from moa_lab.calibration.answers import AnswerScore, fill_greedily, score_answers
from moa_lab.calibration.samples import Sample
from moa_lab.evaluate import scoring
from moa_lab.evaluate.intervals import mean, proportion
from moa_lab.evaluate.scoring import loss_rows, retrieval_rows, sample_loss, score_plans, score_samples
from moa_lab.evaluate.store import ScoreStore
from moa_lab.models import geometry_of
from moa_lab.plan import Plan, dense_plan, uniform_plan
from moa_lab.runtime import apply_plan

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


def small_plan(model: PreTrainedModel, density: float = 0.25) -> Plan:
    return uniform_plan(geometry_of(model), density, sink_tokens=4, min_span=5)


def random_sample(
    n_tokens: int = 80, answers: tuple[tuple[int, int], ...] = ((50, 54), (70, 76)), seed: int = 0, task: str = "needles", **detail: Any
) -> Sample:
    return Sample(task, np.random.default_rng(seed).integers(5, VOCABULARY, n_tokens), answers, detail)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_exact_match_in_one_pass_is_what_generation_under_the_plan_gives(family: str) -> None:
    model = tiny_model(family, tie_word_embeddings=False)
    plan = small_plan(model)
    draft = random_sample(answers=((70, 76),))
    with apply_plan(model, plan, 80):
        (own,) = fill_greedily(model, [draft])
    (dense,) = fill_greedily(model, [draft])
    wrong = own.tokens.copy()
    wrong[73] = (wrong[73] + 1) % VOCABULARY
    samples = [own, dense, Sample("needles", wrong, own.answers)]
    scores = [result[0].exact for result in score_samples(model, plan, samples)]
    for sample, exact in zip(samples, scores, strict=True):
        prompt = torch.from_numpy(sample.tokens[:70])[None]
        with apply_plan(model, plan, 80):
            said = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=6, eos_token_id=None)
        assert exact == (said[0, 70:].tolist() == sample.tokens[70:76].tolist())
    assert scores == [True, False, False]


def test_rules_are_evaluated_at_each_samples_own_length(model: PreTrainedModel) -> None:
    plan = small_plan(model)
    samples = [random_sample(80), random_sample(200, seed=1)]
    for sample, scores in zip(samples, score_samples(model, plan, samples), strict=True):
        with apply_plan(model, plan, sample.length):
            expected = score_answers(model, [sample])[0]
        assert [score.loss for score in scores] == pytest.approx([score.loss for score in expected], rel=1e-5)


def test_the_dense_plan_scores_as_the_model_itself(model: PreTrainedModel) -> None:
    sample = random_sample()
    (scores,) = score_samples(model, dense_plan(geometry_of(model)), [sample])
    assert [score.loss for score in scores] == [score.loss for score in score_answers(model, [sample])[0]]
    assert scores[0].loss != score_samples(model, small_plan(model), [sample])[0][0].loss


def test_scores_come_in_the_order_of_the_samples_also_for_one_that_comes_twice(model: PreTrainedModel) -> None:
    plan = small_plan(model)
    one, other, short = random_sample(), random_sample(seed=1), random_sample(60, ((50, 60),), seed=2)
    alone = {sample.identity: sample_loss(score_samples(model, plan, [sample])[0]) for sample in (one, other, short)}
    mixed = [short, one, other, one]
    found = [sample_loss(scores) for scores in score_samples(model, plan, mixed)]
    assert found == pytest.approx([alone[sample.identity] for sample in mixed])


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss", "gpt_neox"])
def test_plans_scored_together_score_as_each_alone(family: str) -> None:
    model = tiny_model(family, tie_word_embeddings=False)
    # As `load_model` does, because sdpa leaves out what some families do to their logits.
    model.set_attn_implementation("eager")
    # Least spans of 20, 80 and 40 tokens; the last sample is asked before any of them ends.
    plans = [small_plan(model, 0.25), dense_plan(geometry_of(model)), small_plan(model, 0.5)]
    samples = [random_sample(), random_sample(200, seed=1), random_sample(answers=((3, 7), (60, 64)), seed=2)]
    together = score_plans(model, plans, samples)
    for plan, found in zip(plans, together, strict=True):
        for mine, alone in zip(found, score_samples(model, plan, samples), strict=True):
            assert [(score.exact, score.tokens) for score in mine] == [(score.exact, score.tokens) for score in alone]
            assert [score.loss for score in mine] == pytest.approx([score.loss for score in alone], abs=1e-5)
    assert together[0][0][0].loss != pytest.approx(together[2][0][0].loss, abs=1e-3)


def test_tokens_whose_past_two_plans_share_are_run_once(model: PreTrainedModel) -> None:
    sparse, dense = small_plan(model, 0.25), dense_plan(geometry_of(model))
    run: list[int] = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _, given, __: run.append(given[0].shape[1]))
    try:
        score_plans(model, [sparse, dense], [random_sample(80), random_sample(answers=((10, 14),))])
        assert run == [80, 80 - int(sparse.spans(80).min()), 80, 80 - 9]
        del run[:]
        score_plans(model, [sparse], [random_sample(80)])
        assert run == [80]
    finally:
        hook.remove()


def test_stored_scores_are_not_computed_again(model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, plan = ScoreStore(tmp_path, "weights"), small_plan(model)
    samples = [random_sample(seed=seed) for seed in range(3)]
    scored: list[Sample] = []

    def counted(model: PreTrainedModel, batch: list[Sample], past: DynamicCache | None) -> list[list[AnswerScore]]:
        scored.extend(batch)
        return score_answers(model, batch, past)

    monkeypatch.setattr(scoring, "score_answers", counted)
    first = score_samples(model, plan, samples[:2], store=store)
    steps: list[tuple[int, int]] = []
    found = score_samples(model, plan, samples, store=store, progress=lambda *step: steps.append(step))
    assert scored == samples
    assert steps == [(3, 3)]
    assert [[score.loss for score in scores] for scores in found[:2]] == [[score.loss for score in scores] for scores in first]
    score_samples(model, small_plan(model, 0.5), samples[:1], store=store)
    assert len(scored) == 4, "another plan has scores of its own"


def fact(depth: float, wording: str) -> dict[str, Any]:
    return {"depth": depth, "wording": wording, "key": "key", "answer": "1"}


def scores_of(*exact: bool, loss: float = 1.0) -> list[AnswerScore]:
    return [AnswerScore(loss, hit, 3) for hit in exact]


def test_retrieval_counts_every_needle_by_depth_and_by_wording(model: PreTrainedModel) -> None:
    samples = [
        random_sample(80, facts=[fact(0.04, "a"), fact(0.55, "b")]), random_sample(80, facts=[fact(0.06, "b"), fact(1.0, "b")], seed=1),
        random_sample(120, answers=((100, 103),), facts=[fact(0.5, "a")], seed=2),
    ]  # fmt: skip
    plan = small_plan(model)
    short, long = retrieval_rows(plan, samples, [scores_of(True, False), scores_of(False, True), scores_of(True)])
    assert (short.plan, short.metric, short.task, short.length) == ("uniform", "retrieval", "needles", 80)
    assert (short.value, short.n, short.low, short.high) == proportion(2, 4)
    assert short.density == plan.density(80)
    assert short.detail["by_depth"] == {"0.05": {"value": 0.5, "n": 2}, "0.55": {"value": 0.0, "n": 1}, "0.95": {"value": 1.0, "n": 1}}
    assert short.detail["by_wording"] == {"a": {"value": 1.0, "n": 1}, "b": {"value": pytest.approx(1 / 3), "n": 3}}
    assert (long.length, long.value, long.n) == (120, 1.0, 1)


def test_retrieval_leaves_out_questions_that_calibration_left_out(model: PreTrainedModel) -> None:
    facts = [fact(0.1, "a"), fact(0.5, "b"), fact(0.9, "c")]
    (row,) = retrieval_rows(small_plan(model), [random_sample(facts=facts, right=[True, False, True])], [scores_of(True, False)])
    assert row.detail["by_wording"] == {"a": {"value": 1.0, "n": 1}, "c": {"value": 0.0, "n": 1}}


def test_losses_are_means_over_samples_of_nats_per_token(model: PreTrainedModel) -> None:
    assert sample_loss([AnswerScore(1.0, True, 1), AnswerScore(4.0, False, 2)]) == 3.0
    samples = [random_sample(seed=seed) for seed in range(3)]
    (row,) = loss_rows(small_plan(model), samples, [scores_of(True, True, loss=loss) for loss in (1.0, 2.0, 6.0)])
    assert (row.metric, row.task, row.length) == ("cross_entropy", "needles", 80)
    assert (row.value, row.n, row.low, row.high) == mean([1.0, 2.0, 6.0])
    assert row.detail["perplexity"] == pytest.approx(math.exp(3.0))
    assert row.detail["per_sample"] == [1.0, 2.0, 6.0]


@pytest.mark.usefixtures("two_threads")
def test_scores_side_by_side_are_those_of_one_after_the_other(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    samples = [random_sample(n, ((50, 54), (70, 76)), seed) for n in (80, 96) for seed in range(4)]
    threads: set[int] = set()

    def score(model: PreTrainedModel, batch: list[Sample], past: DynamicCache | None) -> list[list[AnswerScore]]:
        threads.add(threading.get_ident())
        return score_answers(model, batch, past)

    monkeypatch.setattr(scoring, "score_answers", score)
    steps: list[tuple[int, int]] = []
    for plan in (dense_plan(geometry_of(model)), small_plan(model)):
        found = score_samples(model, plan, samples, store=ScoreStore(tmp_path, "w"), progress=lambda *step: steps.append(step))
        assert threading.get_ident() not in threads
        with apply_plan(model, plan, 80) if not plan.is_dense else contextlib.nullcontext():
            alone = [score_answers(model, [sample])[0] for sample in samples if sample.length == 80]
        for mine, theirs in zip(found, alone, strict=False):
            assert [score.exact for score in mine] == [score.exact for score in theirs]
            assert [score.loss for score in mine] == pytest.approx([score.loss for score in theirs], abs=1e-5)
        assert all(ScoreStore(tmp_path, "w").get(plan, sample) for sample in samples)
    assert steps == [(done, 8) for done in range(1, 9)] * 2


@pytest.mark.usefixtures("two_threads")
def test_a_failure_side_by_side_leaves_what_is_done_and_says_what_failed(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    samples = [random_sample(seed=seed) for seed in range(6)]

    def score(model: PreTrainedModel, batch: list[Sample], past: DynamicCache | None) -> list[list[AnswerScore]]:
        if batch[0] is samples[3]:
            raise RuntimeError("sample three has no memory left")
        return score_answers(model, batch, past)

    plan, store = small_plan(model), ScoreStore(tmp_path, "w")
    monkeypatch.setattr(scoring, "score_answers", score)
    with pytest.raises(RuntimeError, match="sample three has no memory left"):
        score_samples(model, plan, samples, store=store)
    assert all(store.get(plan, sample) for sample in samples[:3])
    assert store.get(plan, samples[3]) is None
