"""The profiling loop: nothing is computed twice, and a killed run ends where an unbroken one does."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import VOCABULARY, tiny_model
from transformers import PreTrainedModel

from moa_lab.calibration.answers import AnswerScore, score_answers
from moa_lab.calibration.samples import Sample, SampleSet
from moa_lab.models import geometry_of, weights_fingerprint
from moa_lab.plan import full_or_floor_plan
from moa_lab.profiling import estimate, profile, profiler, profiling_examiner
from moa_lab.profiling.estimate import Estimate
from moa_lab.records import InfluenceProfile

torch.set_num_threads(1)


def random_sample(task: str, n_tokens: int, seed: int) -> Sample:
    return Sample(task, np.random.default_rng(seed).integers(5, VOCABULARY, n_tokens), ((n_tokens - 20, n_tokens),))


SAMPLES = SampleSet(
    (
        random_sample("questions", 128, 0), random_sample("summaries", 128, 1), random_sample("questions", 200, 2),
        random_sample("questions", 128, 3), random_sample("questions", 200, 4),
    )
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def unbroken(model: PreTrainedModel) -> InfluenceProfile:
    return profile(model, SAMPLES)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the batches that go through a backward pass."""
    sizes: list[int] = []
    original = profiler.backward_pass

    def counted(model: PreTrainedModel, batch: list[Sample], *rest: Any, **settings: Any) -> list[Sample | None]:
        sizes.append(len(batch))
        return original(model, batch, *rest, **settings)

    monkeypatch.setattr(profiler, "backward_pass", counted)
    return sizes


def assert_same(found: InfluenceProfile, expected: InfluenceProfile, rtol: float = 0.0, atol: float = 0.0) -> None:
    assert found.keys == expected.keys
    for name in ("blocks", "distances", "span_effects"):
        for key in expected.keys:
            np.testing.assert_allclose(getattr(found, name)[key], getattr(expected, name)[key], rtol=rtol, atol=atol)


def test_a_profile_has_every_task_and_length_with_the_shapes_of_the_record(model: PreTrainedModel, unbroken: InfluenceProfile) -> None:
    assert unbroken.keys == (("questions", 128), ("questions", 200), ("summaries", 128))
    assert unbroken.geometry == geometry_of(model)
    assert unbroken.blocks["questions", 200].shape == (2, 4, 4, 4)
    assert unbroken.distances["questions", 200].shape == (2, 2, 4, 4)
    assert unbroken.span_effects["summaries", 128].shape == (1, 2, 4, 2)
    assert unbroken.provenance.weights == weights_fingerprint(model)
    assert unbroken.provenance.calibration == SAMPLES.identity
    assert all(np.isfinite(grid).all() and (grid > 0).any() for grid in unbroken.distances.values())


def test_blocks_are_averaged_over_samples_and_histograms_kept_apart(model: PreTrainedModel, unbroken: InfluenceProfile) -> None:
    pair = SAMPLES.select("questions", 200)
    alone = [profile(model, SampleSet((sample,))) for sample in pair]
    key = ("questions", 200)
    np.testing.assert_allclose(unbroken.blocks[key], np.mean([one.blocks[key] for one in alone], axis=0), rtol=1e-6)
    for index, one in enumerate(alone):
        np.testing.assert_array_equal(unbroken.distances[key][index], one.distances[key][0])
        np.testing.assert_array_equal(unbroken.span_effects[key][index], one.span_effects[key][0])


def test_a_second_call_computes_nothing_again(
    model: PreTrainedModel, unbroken: InfluenceProfile, passes: list[int], tmp_path: Path
) -> None:
    first = profile(model, SAMPLES, parts_dir=tmp_path)
    assert sum(passes) == len(SAMPLES)
    passes.clear()
    done: list[tuple[int, int]] = []
    second = profile(model, SAMPLES, parts_dir=tmp_path, progress=lambda *step: done.append(step))
    assert passes == []
    assert done == [(5, 5)]
    assert_same(first, unbroken)
    assert_same(second, unbroken)


def test_a_killed_run_goes_on_where_it_stopped(
    model: PreTrainedModel, unbroken: InfluenceProfile, passes: list[int], tmp_path: Path
) -> None:
    class Killed(BaseException):
        pass

    def kill_after_two(done: int, total: int) -> None:
        if done == 2:
            raise Killed

    with pytest.raises(Killed):
        profile(model, SAMPLES, parts_dir=tmp_path, progress=kill_after_two)
    found = profile(model, SAMPLES, parts_dir=tmp_path)
    assert sum(passes) == len(SAMPLES), "no sample twice"
    assert_same(found, unbroken)


def test_drafts_are_profiled_as_they_are_answered_and_not_again(model: PreTrainedModel, passes: list[int], tmp_path: Path) -> None:
    drafts = [Sample("questions", sample.tokens, ((60, 70), (110, 128))) for sample in SAMPLES if sample.length == 128]
    told: list[list[AnswerScore]] = []

    def keep(draft: Sample, scores: list[AnswerScore]) -> Sample | None:
        """Everything of the first draft, one answer of the second, nothing of the third."""
        told.append(scores)
        return [draft, replace(draft, answers=draft.answers[1:]), None][len(told) - 1]

    examiner = profiling_examiner(model, [128], tmp_path)
    assert examiner is not None
    kept = [sample for sample in examiner.run(drafts, keep) if sample is not None]
    assert [sample.answers for sample in kept] == [((60, 70), (110, 128)), ((110, 128),)]
    for found, expected in zip(told, [score_answers(model, [draft])[0] for draft in drafts], strict=True):
        assert [(score.exact, score.tokens) for score in found] == [(score.exact, score.tokens) for score in expected]
        np.testing.assert_allclose([score.loss for score in found], [score.loss for score in expected], rtol=1e-5)
    passes.clear()
    samples = SampleSet(tuple(kept))
    assert_same(profile(model, samples, parts_dir=tmp_path), profile(model, samples), rtol=1e-3, atol=1e-7)
    assert passes == [1, 1], "those of the second profile alone"


def test_drafts_are_not_profiled_where_their_activations_do_not_fit(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert profiling_examiner(model, [200, 128], tmp_path) is not None
    monkeypatch.setattr(estimate, "free_bytes", lambda device: 1)
    assert profiling_examiner(model, [200, 128], tmp_path) is None


def test_a_truncated_part_is_computed_again(model: PreTrainedModel, unbroken: InfluenceProfile, passes: list[int], tmp_path: Path) -> None:
    profile(model, SAMPLES, parts_dir=tmp_path)
    passes.clear()
    part = sorted(tmp_path.iterdir())[1]
    part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])
    assert_same(profile(model, SAMPLES, parts_dir=tmp_path), unbroken)
    assert passes == [1]


def test_parts_of_other_weights_or_another_sink_are_not_taken(model: PreTrainedModel, passes: list[int], tmp_path: Path) -> None:
    few = SampleSet(SAMPLES.samples[:1])
    profile(model, few, parts_dir=tmp_path)
    passes.clear()
    other = profile(tiny_model("llama", seed=1), few, parts_dir=tmp_path)
    profile(model, few, parts_dir=tmp_path, sink_tokens=16)
    assert passes == [1, 1]
    assert_same(other, profile(tiny_model("llama", seed=1), few))


def test_batches_equal_single_samples(model: PreTrainedModel, unbroken: InfluenceProfile, passes: list[int]) -> None:
    found = profile(model, SAMPLES, batch_size=2)
    assert sorted(passes) == [1, 2, 2]
    assert_same(found, unbroken, rtol=2e-3, atol=1e-6)


def test_recomputing_activations_changes_nothing(
    model: PreTrainedModel, unbroken: InfluenceProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Estimate, "checkpoint", property(lambda self: True))
    assert_same(profile(model, SAMPLES), unbroken, rtol=1e-4, atol=1e-7)
    assert not model.is_gradient_checkpointing


def test_parameters_get_no_gradient(unbroken: InfluenceProfile) -> None:
    trainable = tiny_model("llama").requires_grad_(True)
    found = profile(trainable, SAMPLES)
    assert all(parameter.grad is None for parameter in trainable.parameters())
    assert_same(found, unbroken, rtol=1e-4, atol=1e-7)


def test_a_profile_survives_saving(unbroken: InfluenceProfile, tmp_path: Path) -> None:
    assert_same(InfluenceProfile.load(unbroken.save(tmp_path / "profile.safetensors")), unbroken)


def test_under_a_plan_hidden_values_have_no_influence_and_parts_are_kept_apart(
    model: PreTrainedModel, unbroken: InfluenceProfile, passes: list[int], tmp_path: Path
) -> None:
    profile(model, SAMPLES, parts_dir=tmp_path)
    passes.clear()
    plan = full_or_floor_plan(geometry_of(model), whole=[(0, 1), (1, 0)], floor_tokens=128)
    found = profile(model, SAMPLES, plan=plan, parts_dir=tmp_path)
    assert len(passes) == len(SAMPLES)
    beyond = found.distances["questions", 200][..., 1:].sum(axis=(0, 3))
    # Window 64: bin 0 is all that is left of a floored KV head, which two query heads share.
    np.testing.assert_array_equal(beyond > 0, [[False, False, True, True], [True, True, False, False]])
    assert (unbroken.distances["questions", 200][..., 1:].sum(axis=(0, 3)) > 0).all()
    assert (found.span_effects["questions", 200][..., 1] != 0).all(), "what a span is worth is told for floored heads too"


@pytest.mark.parametrize("family", ["gemma2", "gpt_neox", "phi3"])
def test_other_designs_can_be_profiled(family: str) -> None:
    found = profile(tiny_model(family), SampleSet(SAMPLES.samples[:1]), sink_tokens=8)
    assert found.blocks["questions", 128].shape == (2, 4, 2, 2)
    own = found.geometry.layer_windows
    for layer, window in enumerate(own):
        # Nothing lies beyond a layer's own window of 48.
        assert (found.distances["questions", 128][0, layer, :, 1:].sum() == 0) == (window is not None)


def test_a_plan_with_stored_bits_is_refused(model: PreTrainedModel) -> None:
    plan = full_or_floor_plan(geometry_of(model), whole=[(0, 1)], floor_tokens=128)
    with pytest.raises(ValueError, match="a profile knows no stored bits"):
        profile(model, SAMPLES, plan=plan.with_bits(8))


def test_a_length_beyond_the_model_is_refused_with_both_numbers(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="600 tokens, beyond the model's maximum of 512"):
        profile(model, SampleSet((random_sample("questions", 600, 0),)))


def test_no_samples_are_refused(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="no calibration samples"):
        profile(model, SampleSet(()))


def test_what_does_not_fit_is_refused_before_any_sample(
    model: PreTrainedModel, passes: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(estimate, "free_bytes", lambda device: 2**20)
    with pytest.raises(ValueError, match=r"200 tokens needs about \d+\.\d GiB"):
        profile(model, SAMPLES, parts_dir=tmp_path)
    assert passes == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("two_threads")
def test_samples_profiled_side_by_side_give_the_same_profile(
    model: PreTrainedModel, unbroken: InfluenceProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []
    original = profiler.backward_pass

    def watched(*given: Any, **settings: Any) -> None:
        threads.append(threading.get_ident())
        original(*given, **settings)

    monkeypatch.setattr(profiler, "backward_pass", watched)
    steps: list[tuple[int, int]] = []
    assert_same(profile(model, SAMPLES, progress=lambda *step: steps.append(step)), unbroken, rtol=1e-5, atol=1e-7)
    assert len(threads) == 5
    assert threading.get_ident() not in threads
    assert steps == [(done, 5) for done in range(6)]
