"""The slope of a rule is what the loss gains when its head moves a little of its weight there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from own_answers import own_answer
from tiny import tiny_model
from transformers import PreTrainedModel

from moa_lab.calibration.answers import answer_logits
from moa_lab.calibration.samples import Sample, SampleSet
from moa_lab.geometry import ModelGeometry
from moa_lab.interface import AttentionCall, Handler, route_attention
from moa_lab.kernels.mixture import BLOCK, mixed_windows
from moa_lab.learning import checkpoint, mean_slopes, slopes
from moa_lab.learning.slopes import SlopeSampler, block_windows
from moa_lab.models import geometry_of
from moa_lab.plan import DENSE, SpanRule
from moa_lab.profiling.estimate import estimate_cost
from moa_lab.records import LossTable, Objective

LENGTH = 320
# Windows of whole blocks and a half, so that nothing is left to chance: 1, 2, 3 blocks of 64 beyond the sink, and all.
RULES = (SpanRule(96.0, 0.0), SpanRule(160.0, 0.0), SpanRule(224.0, 0.0), DENSE)
BLOCKS = (1, 2, 3, 5)


def table_of(model: PreTrainedModel, rules: tuple[SpanRule, ...] = RULES, min_span: int = 96) -> LossTable:
    geometry = geometry_of(model)
    losses = np.zeros((1, geometry.layers, geometry.kv_heads, len(rules)))
    return LossTable(geometry, rules, 64, min_span, (Objective("questions", LENGTH, "sum", (0, 1)),), losses)


def mixed(model: PreTrainedModel, weights: torch.Tensor, batch: list[Sample]) -> torch.Tensor:
    """Divergence from the dense model under `weights` (layers, kv_heads, blocks), in double precision."""

    def handler(layer: int) -> Handler:
        def attend(call: AttentionCall) -> torch.Tensor:
            shares = weights[layer][None].expand(len(call.query), -1, -1)
            return mixed_windows(
                call.query, call.key, call.value, call.positions >= 0, shares, 64, call.scale, call.softcap, call.sink_logits
            )

        return attend

    with torch.no_grad():
        dense = torch.cat(answer_logits(model, batch)).log_softmax(-1)
        with route_attention(model, handler):
            ours = torch.cat(answer_logits(model, batch)).log_softmax(-1)
    return torch.nn.functional.kl_div(ours, dense, reduction="batchmean", log_target=True)


@pytest.fixture(scope="module")
def make() -> Callable[[str], tuple[PreTrainedModel, list[Sample]]]:
    def made(family: str) -> tuple[PreTrainedModel, list[Sample]]:
        model = tiny_model(family)
        return model, [own_answer(model, "questions", LENGTH, seed) for seed in range(2)]

    return made


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_slopes_are_those_of_a_little_weight_moved_to_another_rule(
    family: str, make: Callable[[str], tuple[PreTrainedModel, list[Sample]]]
) -> None:
    model, batch = make(family)
    table = table_of(model)
    rules = np.array([0, 3, 1, 2])
    found = SlopeSampler(model, table, seed=0)(batch, np.eye(len(RULES))[rules])
    windows = block_windows(table, LENGTH)
    drawn = torch.zeros(2, 2, -(-LENGTH // BLOCK))
    for head, rule in enumerate(rules):
        drawn[head // 2, head % 2, int(windows[head // 2, rule]) - 1] = 1.0
    here = mixed(model, drawn, batch)
    assert found.divergence["questions"] == pytest.approx(float(here), rel=1e-4)
    little = 1e-2
    for head in range(4):
        layer, own = head // 2, int(windows[head // 2, rules[head]]) - 1
        for rule in range(len(RULES)):
            moved = []
            for sign in (-1, 1):
                weights = drawn.clone()
                weights[layer, head % 2, own] -= sign * little
                weights[layer, head % 2, int(windows[layer, rule]) - 1] += sign * little
                moved.append(float(mixed(model, weights, batch)))
            slope = found.slope[head, rule] - found.slope[head, rules[head]]
            assert slope == pytest.approx((moved[1] - moved[0]) / (2 * little), rel=0.03, abs=2e-4)


def test_windows_are_whole_blocks_and_half_a_block_is_made_up_for() -> None:
    model = tiny_model("llama")
    assert block_windows(table_of(model), LENGTH).tolist() == [list(map(float, BLOCKS))] * 2
    # A window of 100 tokens holds 1.5625 blocks; n blocks hold half a block less.
    between = table_of(model, (SpanRule(164.0, 0.0), DENSE), min_span=164)
    assert block_windows(between, LENGTH)[0, 0] == pytest.approx(100 / 64 + 0.5)
    assert block_windows(between, 128).tolist() == [[2.0, 2.0]] * 2


def test_texts_that_stand_for_longer_ones_see_the_same_share_but_for_layers_with_windows_of_their_own() -> None:
    geometry = ModelGeometry(2, 2, 2, 16, 8192, (None, 256))
    rules = (SpanRule(1024.0, 0.0), SpanRule(0.0, 0.5), SpanRule(128.0, 0.0), DENSE)
    losses = np.zeros((1, 2, 2, len(rules)))
    table = LossTable(geometry, rules, 64, 128, (Objective("questions", 1024, "sum", (0, 1)),), losses)
    far, near = block_windows(table, 1024, stands_for=4096)
    # 1,024 of 4,096 tokens are 256 of 1,024; half is half; 128 are 32, which is less than the sink.
    assert far.tolist() == [3.5, 7.5, 1.0, 16.0]
    assert near.tolist() == [16.0, 16.0, 1.5, 16.0]
    assert block_windows(table, 1024, stands_for=1024).tolist() == block_windows(table, 1024).tolist()


def test_windows_between_blocks_are_drawn_so_that_the_mean_is_right() -> None:
    model = tiny_model("llama")
    table = table_of(model, (SpanRule(164.0, 0.0), DENSE), min_span=164)
    sampler = SlopeSampler(model, table, seed=1)
    counts = sampler._counts(block_windows(table, LENGTH), sampler._choices(np.tile([0.25, 0.75], (4, 1)), 4000))
    assert counts.shape == (2, 4000, 2)
    assert set(counts.unique().tolist()) == {2, 3, 5}
    expected = 0.25 * (100 / 64 + 0.5) + 0.75 * 5
    assert counts.float().mean().item() == pytest.approx(expected, abs=0.03)


def test_whole_heads_lose_nothing() -> None:
    model = tiny_model("llama")
    batch = [own_answer(model, task, LENGTH, 0) for task in ("questions", "summaries")]
    found = SlopeSampler(model, table_of(model), seed=0)(batch, np.tile([0.0, 0.0, 0.0, 1.0], (4, 1)))
    assert set(found.divergence) == {"questions", "summaries"}
    assert max(found.divergence.values()) < 1e-5


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_batch_in_parts_or_recomputed_has_the_same_slope(checkpoint: bool) -> None:
    model = tiny_model("llama")
    batch = [own_answer(model, task, LENGTH, seed) for task, seed in (("questions", 0), ("questions", 1), ("summaries", 0))]
    chances, table = np.full((4, len(RULES)), 0.25), table_of(model)
    whole = SlopeSampler(model, table, seed=3, tokens_in_flight=3 * LENGTH)(batch, chances)
    parts = SlopeSampler(model, table, seed=3, tokens_in_flight=2 * LENGTH, checkpoint=checkpoint)(batch, chances)
    assert parts.divergence == pytest.approx(whole.divergence, rel=1e-4)
    np.testing.assert_allclose(parts.slope, whole.slope, atol=1e-5 * np.abs(whole.slope).max())
    assert not model.training


def test_a_task_counts_by_its_weight() -> None:
    model = tiny_model("llama")
    batch = [own_answer(model, task, LENGTH, seed) for task, seed in (("questions", 0), ("summaries", 1))]
    chances, table = np.full((4, len(RULES)), 0.25), table_of(model)

    def slope(questions: float, summaries: float) -> np.ndarray:
        return SlopeSampler(model, table, seed=3, weights={"questions": questions, "summaries": summaries})(batch, chances).slope

    np.testing.assert_allclose(slope(1, 3), slope(1, 0) + 3 * slope(0, 1), atol=1e-5)
    np.testing.assert_allclose(slope(1, 1), SlopeSampler(model, table, seed=3)(batch, chances).slope, atol=1e-6)
    assert not np.allclose(slope(1, 0), slope(0, 1), atol=1e-4)


def test_as_much_is_in_flight_as_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    samples = SampleSet((own_answer(model, "questions", LENGTH, 0),))
    sizes = []
    for free in (10**6, 10**9):
        estimate = replace(estimate_cost(model, list(samples)), free_bytes=free, device="cuda", checkpointed_bytes=0)
        monkeypatch.setattr("moa_lab.learning.slopes.estimate_cost", lambda *_, estimate=estimate, **__: estimate)
        monkeypatch.setattr(type(model), "device", property(lambda _: torch.device("cuda")))
        sampler = SlopeSampler.fitting(model, table_of(model), samples, seed=0)
        monkeypatch.undo()
        sizes.append((sampler._tokens, sampler._checkpoint))
    assert sizes[0][0] < LENGTH < sizes[1][0]
    assert [checkpoint for _, checkpoint in sizes] == [True, False]


def test_slopes_at_fixed_chances_are_a_mean_over_batches() -> None:
    model = tiny_model("llama")
    samples = SampleSet(tuple(own_answer(model, "questions", LENGTH, seed) for seed in range(3)))
    chances, table = np.full((4, len(RULES)), 0.25), table_of(model)
    told: list[tuple[int, int]] = []
    found = mean_slopes(model, samples, table, chances, steps=3, progress=lambda done, total: told.append((done, total)))
    assert found.shape == chances.shape
    assert told[-1] == (3, 3)
    again = mean_slopes(model, samples, table, chances, steps=3)
    np.testing.assert_array_equal(found, again)
    # A head that sees less loses more, on the whole.
    assert found[:, 0].sum() > found[:, -1].sum()


def test_a_killed_mean_goes_on_where_it_was_and_of_other_plans_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    def kill_at_two(step: int, steps: int) -> None:
        if step == 2:
            raise Killed

    model = tiny_model("llama")
    samples = SampleSet(tuple(own_answer(model, "questions", LENGTH, seed) for seed in range(3)))
    chances, table = np.full((4, len(RULES)), 0.25), table_of(model)
    told: list[int] = []
    monkeypatch.setattr(checkpoint, "SAVE_S", 0.0)

    def found(chances: np.ndarray = chances, steps: int = 4, **asked: int) -> np.ndarray:
        told.clear()
        return mean_slopes(model, samples, table, chances, steps=steps, parts_dir=tmp_path, progress=lambda at, _: told.append(at), **asked)

    whole = mean_slopes(model, samples, table, chances, steps=4)
    with pytest.raises(Killed):
        mean_slopes(model, samples, table, chances, steps=4, parts_dir=tmp_path, progress=kill_at_two)
    np.testing.assert_array_equal(found(), whole)
    assert told == [2, 3, 4]
    np.testing.assert_array_equal(found(), whole)
    assert told == [4]
    for other in ({"chances": np.roll(chances, 1, axis=1) + np.eye(4)}, {"steps": 2}, {"seed": 1}, {"stands_for": 2 * LENGTH}):
        found(**other)
        assert told[0] == 0, other
    for state in tmp_path.iterdir():
        state.write_bytes(state.read_bytes()[:100])
    np.testing.assert_array_equal(found(), whole)
    assert told[0] == 0


def test_samples_with_long_answers_run_apart_from_the_others() -> None:
    def sample(answer: int) -> Sample:
        return Sample("task", np.zeros(LENGTH, np.int64), ((LENGTH - answer, LENGTH),))

    batch = [sample(answer) for answer in (4, LENGTH // 2, 8, 3, LENGTH // 2, 2)]
    assert list(slopes.passes(batch, 3)) == [[0, 2, 3], [5], [1, 4]]
    assert list(slopes.passes(batch[:1], 1)) == [[0]]
