"""Span effects under a plan: the numbers of a profile under that plan, without the rest, and kept on disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import VOCABULARY, tiny_model
from transformers import PreTrainedModel

from moa_lab.calibration.samples import Sample, SampleSet
from moa_lab.models import geometry_of
from moa_lab.plan import full_or_floor_plan
from moa_lab.profiling import estimate, profile, spans
from moa_lab.profiling.spans import span_effects

torch.set_num_threads(1)

SAMPLES = SampleSet(
    tuple(Sample("questions", np.random.default_rng(seed).integers(5, VOCABULARY, 200), ((170, 200),)) for seed in range(3))
)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("free_bytes", [2**33, 2**24], ids=["roomy", "tight"])
def test_they_are_those_of_a_profile_under_the_plan(family: str, free_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(family)
    plan = full_or_floor_plan(geometry_of(model), whole=[(0, 1)], floor_tokens=128)
    mixed = SampleSet((*SAMPLES.samples, replace(SAMPLES.samples[0], task="summaries")))
    expected = profile(model, mixed, plan=plan).span_effects
    monkeypatch.setattr(estimate, "_free_bytes", lambda device: free_bytes)
    found = span_effects(model, mixed, plan)
    assert found.keys() == expected.keys() == {("questions", 200), ("summaries", 200)}
    assert found["questions", 200].shape == (3, 2, 4, 4)
    for key, effects in found.items():
        np.testing.assert_allclose(effects, expected[key], rtol=1e-4, atol=1e-7)
        assert np.abs(effects).max() > 0


def test_finished_samples_are_read_and_another_plan_has_its_own(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    passes: list[int] = []
    original = spans.backward_pass

    def counted(model: PreTrainedModel, batch: list[Sample], *rest: object, **more: object) -> None:
        passes.append(len(batch))
        original(model, batch, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(spans, "backward_pass", counted)
    geometry = geometry_of(model)
    plan = full_or_floor_plan(geometry, whole=[(0, 1)], floor_tokens=128)
    told: list[tuple[int, int]] = []
    span_effects(model, SampleSet(SAMPLES.samples[:1]), plan, parts_dir=tmp_path)
    all_three = span_effects(model, SAMPLES, plan, parts_dir=tmp_path, progress=lambda *step: told.append(step))
    assert sum(passes) == 3
    assert told == [(2, 3), (3, 3)]
    again = span_effects(model, SAMPLES, plan, parts_dir=tmp_path)
    assert sum(passes) == 3
    np.testing.assert_array_equal(again["questions", 200], all_three["questions", 200])
    other = span_effects(model, SAMPLES, full_or_floor_plan(geometry, whole=[(1, 0)], floor_tokens=128), parts_dir=tmp_path)
    assert sum(passes) == 6
    assert not np.array_equal(other["questions", 200], again["questions", 200])


def test_a_broken_part_is_computed_again(model: PreTrainedModel, tmp_path: Path) -> None:
    plan = full_or_floor_plan(geometry_of(model), whole=[(0, 1)], floor_tokens=128)
    expected = span_effects(model, SAMPLES, plan, parts_dir=tmp_path)
    part = next(tmp_path.iterdir())
    part.write_bytes(part.read_bytes()[:40])
    np.testing.assert_array_equal(span_effects(model, SAMPLES, plan, parts_dir=tmp_path)["questions", 200], expected["questions", 200])


def test_a_plan_of_another_geometry_is_refused(model: PreTrainedModel) -> None:
    plan = full_or_floor_plan(geometry_of(tiny_model("mqa")), whole=[(0, 0)], floor_tokens=128)
    with pytest.raises(ValueError, match="another geometry"):
        span_effects(model, SAMPLES, plan)
