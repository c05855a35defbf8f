"""Eviction: what is kept is what a loop written by hand keeps, nothing else is looked at, and no answer comes from the dense pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import VOCABULARY, tiny_model
from transformers import PreTrainedModel

from moa_lab.calibration.answers import AnswerScore, answer_logits, fill_greedily, score_answers
from moa_lab.calibration.samples import Sample
from moa_lab.interface import AttentionCall
from moa_lab.masks import KeyMask
from moa_lab.models import geometry_of
from moa_lab.pipeline import Run
from moa_lab.presets import RunSettings
from moa_lab.studies.densities import eviction as studied
from moa_lab.studies.densities.eviction import (
    KERNEL,
    METHODS,
    OBSERVED,
    Eviction,
    Method,
    Prefix,
    attention_sums,
    eviction_rows,
    kept_positions,
    scores_after,
    tail_attention,
)  # fmt: skip

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama", tie_word_embeddings=False)


def sample(n_tokens: int = 90, start: int = 82, seed: int = 0, task: str = "needles") -> Sample:
    tokens = np.random.default_rng(seed).integers(5, VOCABULARY, n_tokens)
    return Sample(task, tokens, ((start, n_tokens),))


def evicted_scores(model: PreTrainedModel, samples: Sequence[Sample], density: float, method: Method) -> list[list[AnswerScore]]:
    eviction = Eviction(method, density)
    return scores_after(model, samples, [eviction])[eviction]


def heads(count: int, tokens: int, seed: int, width: int = 8) -> torch.Tensor:
    return torch.randn(2, count, tokens, width, generator=torch.Generator().manual_seed(seed))


def sums_by_hand(query: torch.Tensor, key: torch.Tensor, first: int, softcap: float | None = None) -> np.ndarray:
    """Query by query, key by key."""
    batch, query_heads, tokens, _ = query.shape
    group = query_heads // key.shape[1]
    sums = np.zeros((batch, key.shape[1], tokens))
    for b in range(batch):
        for head in range(query_heads):
            for i in range(first, tokens):
                scores = [0.5 * float(query[b, head, i].double() @ key[b, head // group, j].double()) for j in range(i + 1)]
                if softcap is not None:
                    scores = [softcap * math.tanh(score / softcap) for score in scores]
                weights = np.exp(scores) / np.exp(scores).sum()
                sums[b, head // group, : i + 1] += weights / group
    return sums


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("first", [0, 11])
def test_attention_is_summed_over_queries_and_averaged_over_a_groups_heads(
    first: int, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, key = heads(4, 19, 0), heads(2, 19, 1)
    expected = sums_by_hand(query, key, first, softcap)
    for rows in (1, 4, 19):
        monkeypatch.setattr(studied, "BLOCK_WEIGHTS", rows * 2 * 4 * 19)
        found = attention_sums(query, key, 0.5, softcap, first)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-5)


def kept_by_hand(method: Method, sums: list[float], kept: int) -> list[int]:
    tokens = len(sums)
    newest = kept // 2 if method == "h2o" else min(OBSERVED, kept)
    before = sums[: tokens - newest]
    if method == "snapkv":
        half = KERNEL // 2
        before = [sum(before[max(0, j - half) : j + half + 1]) / KERNEL for j in range(len(before))]
    old = sorted(range(len(before)), key=lambda j: -before[j])[: kept - newest]
    return sorted(old + list(range(tokens - newest, tokens)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kept", [0, 1, 17, 40, 63, 70])
def test_every_head_keeps_exactly_so_many_keys_and_those_of_the_loop(method: Method, kept: int) -> None:
    sums = torch.rand(2, 3, 70, generator=torch.Generator().manual_seed(kept)) + 0.1
    found = kept_positions(method, sums, kept)
    assert found.shape == (2, 3, kept)
    for b in range(2):
        for head in range(3):
            assert found[b, head].tolist() == kept_by_hand(method, sums[b, head].tolist(), kept)


@pytest.mark.parametrize(("kernel", "whole"), [(KERNEL, True), (5, False)])
def test_a_wide_kernel_keeps_seven_neighbours_of_one_key_that_is_looked_at(
    kernel: int, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(studied, "KERNEL", kernel)
    sums = torch.linspace(0.1, 0.01, 200).expand(1, 1, 200).clone()
    sums[..., 100] = 5.0
    kept = kept_positions("snapkv", sums, OBSERVED + KERNEL).flatten().tolist()
    assert (set(range(97, 104)) <= set(kept)) == whole


def test_dropped_keys_and_values_are_not_read() -> None:
    key, value = heads(2, 20, 0), heads(2, 20, 1)
    kept = torch.stack([torch.stack([torch.randperm(20)[:6].sort().values for _ in range(2)]) for _ in range(2)])
    dropped = torch.ones(2, 2, 20, dtype=torch.bool).scatter(2, kept, False)
    call = AttentionCall(heads(4, 3, 2), heads(2, 3, 3), heads(2, 3, 4), KeyMask(2, 3, 3, torch.device("cpu")), 0.5, None)
    expected = tail_attention(call, Prefix(key, value, {}), kept)
    key[dropped] = value[dropped] = float("nan")
    assert torch.equal(tail_attention(call, Prefix(key, value, {}), kept), expected)
    for b, head, i in np.ndindex(2, 4, 3):
        known = torch.cat([key[b, head // 2][kept[b, head // 2]], call.key[b, head // 2, : i + 1]])
        values = torch.cat([value[b, head // 2][kept[b, head // 2]], call.value[b, head // 2, : i + 1]])
        by_hand = (known @ call.query[b, head, i] * 0.5).softmax(0) @ values
        torch.testing.assert_close(expected[b, head, i], by_hand)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "gpt_neox", "phi3"])
def test_all_keys_kept_is_the_dense_model(family: str) -> None:
    model = tiny_model(family)
    if family == "gemma2":
        model.set_attn_implementation("eager")
    (draft,) = fill_greedily(model, [sample()])
    samples = [draft, sample(seed=1), sample(100, 60, seed=2)]
    for method in METHODS:
        for found, asked in zip(evicted_scores(model, samples, 1.0, method), samples, strict=True):
            (expected,) = score_answers(model, [asked])[0]
            assert found[0].loss == pytest.approx(expected.loss, rel=1e-4)
            assert (found[0].exact, found[0].tokens) == (expected.exact, expected.tokens)
    assert evicted_scores(model, [draft], 1.0, "h2o")[0][0].exact


@pytest.mark.parametrize("method", METHODS)
def test_scores_are_those_of_a_masked_pass_over_the_keys_that_a_loop_keeps(model: PreTrainedModel, method: Method) -> None:
    """The whole path again with masks over one full pass, and sums and choice by hand."""
    asked, density = sample(110, 100), 0.5
    kept = Eviction(method, density).kept_tokens(100) - 1
    before = 99

    def handler(layer: int) -> studied.Handler:
        def attend(call: AttentionCall) -> torch.Tensor:
            first = 0 if method == "h2o" else before - OBSERVED
            sums = attention_sums(call.query[:, :, :before], call.key[:, :, :before], call.scale, None, first)
            shown = torch.ones(110, 110, dtype=torch.bool).tril().repeat(1, 4, 1, 1)
            for head in range(4):
                stay = kept_by_hand(method, sums[0, head // 2].tolist(), kept)
                shown[0, head, before:, sorted(set(range(before)) - set(stay))] = False
            return studied.masked_attention(call.query, call.key, call.value, shown, call.scale)

        return attend

    with studied.route_attention(model, handler):
        (expected,) = score_answers(model, [asked])[0]
    ((found,),) = evicted_scores(model, [asked], density, method)
    assert found.loss == pytest.approx(expected.loss, rel=1e-4)
    assert found.loss != pytest.approx(score_answers(model, [asked])[0][0].loss, rel=1e-3)


def test_the_first_answer_token_does_not_come_from_the_dense_pass(model: PreTrainedModel) -> None:
    asked = sample(83, 82)
    dense = torch.nn.functional.cross_entropy(answer_logits(model, [asked])[0], torch.from_numpy(asked.tokens[82:]))
    assert evicted_scores(model, [asked], 0.2, "h2o")[0][0].loss != pytest.approx(float(dense), rel=1e-3)


def test_many_evictions_at_once_give_what_each_gives_alone_in_the_order_of_the_samples(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = [sample(seed=0), sample(100, 60, seed=1), sample(seed=2)]
    evictions = [Eviction(method, density) for method in METHODS for density in (0.2, 0.6)]
    steps: list[tuple[int, int]] = []
    together = scores_after(model, samples, evictions, lambda *step: steps.append(step))
    assert steps[-1] == (3, 3)
    for eviction in evictions:
        alone = [evicted_scores(model, [one], eviction.density, eviction.method)[0][0].loss for one in samples]
        assert [found.loss for (found,) in together[eviction]] == pytest.approx(alone, rel=1e-5)
        assert len(set(alone)) == 3


def test_the_share_counts_what_is_left_of_the_prompt_and_the_answer() -> None:
    geometry = geometry_of(tiny_model("llama"))
    assert Eviction("h2o", 0.25).share(geometry, sample(100, 80)) == (20 + 20) / 100
    assert Eviction("h2o", 1.0).share(geometry, sample(100, 80)) == 1
    windowed = geometry_of(tiny_model("gemma2"))
    assert Eviction("h2o", 0.25).share(windowed, sample(100, 80)) == (48 + 40) / 148
    assert Eviction("snapkv", 0.125).name == "snapkv-12.5"


def test_samples_that_it_is_not_defined_for_are_refused(model: PreTrainedModel) -> None:
    several = Sample("needles", sample().tokens, ((50, 54), (70, 76)))
    with pytest.raises(ValueError, match="one answer"):
        evicted_scores(model, [several], 0.5, "h2o")
    with pytest.raises(ValueError, match="at least 2 tokens"):
        evicted_scores(model, [Sample("needles", sample().tokens, ((1, 5),))], 0.5, "h2o")
    with pytest.raises(ValueError, match="method must be one of h2o, snapkv"):
        evicted_scores(model, [sample()], 0.5, "newest")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="density"):
        Eviction("h2o", 0.0)


def test_rows_of_a_run_have_the_names_tasks_and_samples_of_its_plans(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    settings = RunSettings(model=str(inputs[0]), preset="sketch", source=str(inputs[1]), columns="text=text,summary=summary")
    run = Run(tmp_path, settings)
    rows = eviction_rows(run, (0.25, 1.0))
    dense = run.measure([studied.dense_plan(run.geometry)], tasks=("needles", "lines", "summaries"))
    assert {row.plan for row in rows} == {"h2o-25", "snapkv-25", "h2o-100", "snapkv-100"}
    assert len(rows) == 4 * len(dense)
    for expected in dense:
        for row in rows:
            if (row.task, row.length) != (expected.task, expected.length):
                continue
            assert (row.metric, row.n) == (expected.metric, expected.n)
            if row.plan.endswith("100"):
                assert row.density == 1
                assert row.detail["per_sample"] == pytest.approx(expected.detail["per_sample"], rel=1e-4)
            else:
                assert 0.25 < row.density < 0.35
