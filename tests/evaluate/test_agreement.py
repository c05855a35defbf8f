"""Agreement with the dense model: what a loop over tokens and vocabulary gives, zero where nothing differs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import VOCABULARY, tiny_model
from transformers import PreTrainedModel

from moa_lab.calibration.answers import answer_logits, fill_greedily
from moa_lab.calibration.samples import Sample
from moa_lab.evaluate import agreement
from moa_lab.evaluate.agreement import agreement_rows, divergence
from moa_lab.evaluate.intervals import mean
from moa_lab.models import geometry_of
from moa_lab.plan import Plan, dense_plan, uniform_plan
from moa_lab.records import Measurement
from moa_lab.runtime import apply_plan

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama", tie_word_embeddings=False)


def small_plan(model: PreTrainedModel, density: float) -> Plan:
    return uniform_plan(geometry_of(model), density, sink_tokens=4, min_span=5).renamed(f"uniform-{100 * density:g}")


def sample(n_tokens: int = 80, answers: tuple[tuple[int, int], ...] = ((50, 54), (70, 76)), seed: int = 0) -> Sample:
    return Sample("summaries", np.random.default_rng(seed).integers(5, VOCABULARY, n_tokens), answers)


def value(rows: list[Measurement], plan: str, metric: str, length: int = 80) -> Measurement:
    (row,) = [row for row in rows if (row.plan, row.metric, row.length) == (plan, metric, length)]
    return row


def test_divergence_is_that_of_its_definition() -> None:
    dense, other = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.25, 0.5])
    assert float(divergence(dense.log(), other.log())) == pytest.approx(0.5 * np.log(2) - 0.25 * np.log(2))
    assert float(divergence(dense.log(), dense.log())) == 0


def test_rows_are_those_of_a_loop_over_samples_and_tokens(model: PreTrainedModel) -> None:
    samples, plan = [sample(seed=seed) for seed in range(3)], small_plan(model, 0.25)
    rows = agreement_rows(model, [plan], samples)
    nats, matches = [], []
    for one in samples:
        with torch.no_grad():
            (dense,) = answer_logits(model, [one])
            with apply_plan(model, plan, 80):
                (sparse,) = answer_logits(model, [one])
        p, q = (logits.double().softmax(-1).numpy() for logits in (dense, sparse))
        nats.append(float(np.mean([sum(a * np.log(a / b) for a, b in zip(*pair, strict=True)) for pair in zip(p, q, strict=True)])))
        matches.append(float(np.mean([a.argmax() == b.argmax() for a, b in zip(p, q, strict=True)])))
    assert len(rows) == 2
    for metric, expected in (("kl", nats), ("token_match", matches)):
        row = value(rows, plan.name, metric)
        assert row.detail["per_sample"] == pytest.approx(expected, rel=1e-4)
        assert (row.value, row.n, row.low, row.high) == pytest.approx(mean(expected), rel=1e-4)
        assert (row.task, row.density) == ("summaries", plan.density(80))
    assert 0 < value(rows, plan.name, "token_match").value < 1


def test_a_plan_that_keeps_everything_agrees_in_every_token_and_a_smaller_one_less(model: PreTrainedModel) -> None:
    samples = fill_greedily(model, [sample(answers=((60, 80),), seed=seed) for seed in range(2)])
    whole = Plan(geometry_of(model), small_plan(model, 1.0).rules, sink_tokens=4, min_span=80, name="whole")
    constant = uniform_plan(geometry_of(model), 0.999999, sink_tokens=4, min_span=80).renamed("constant")
    rows = agreement_rows(model, [dense_plan(geometry_of(model)), whole, constant, small_plan(model, 0.6), small_plan(model, 0.1)], samples)
    for name in ("dense", "whole", "constant"):
        assert value(rows, name, "kl").value == pytest.approx(0, abs=1e-6)
        assert value(rows, name, "token_match").value == 1
    assert 0 < value(rows, "uniform-60", "kl").value < value(rows, "uniform-10", "kl").value
    assert value(rows, "uniform-60", "token_match").value > value(rows, "uniform-10", "token_match").value


def test_the_dense_model_runs_once_a_batch_for_all_plans_and_lengths_have_rows_of_their_own(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def counted(model: PreTrainedModel, batch: list[Sample]) -> list[torch.Tensor]:
        calls.append(len(batch))
        return answer_logits(model, batch)

    samples, plans = [sample(), sample(60, ((40, 60),), seed=1), sample(seed=2)], [small_plan(model, d) for d in (0.2, 0.4, 0.6)]
    alone = agreement_rows(model, plans, samples)
    monkeypatch.setattr(agreement, "answer_logits", counted)
    monkeypatch.setattr(agreement, "_batch", lambda *_: 2)
    steps: list[tuple[int, int]] = []
    rows = agreement_rows(model, plans, samples, lambda *step: steps.append(step))
    assert calls == [2] * 4 + [1] * 4
    assert steps == [(2, 3), (3, 3)]
    assert {(row.plan, row.length, row.n) for row in rows} == {(plan.name, *shape) for plan in plans for shape in ((80, 2), (60, 1))}
    for found, expected in zip(rows, alone, strict=True):
        assert found.detail["per_sample"] == pytest.approx(expected.detail["per_sample"], rel=1e-3)


def test_a_batch_on_a_gpu_keeps_the_dense_logits_within_bounds(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    assert agreement._batch(model, [sample()]) == agreement.GPU_BATCH_TOKENS // 80
    monkeypatch.setattr(agreement, "KEPT_LOGITS", 10 * VOCABULARY * 3 + 1)
    assert agreement._batch(model, [sample()]) == 3
    monkeypatch.setattr(agreement, "KEPT_LOGITS", 1)
    assert agreement._batch(model, [sample()]) == 1
