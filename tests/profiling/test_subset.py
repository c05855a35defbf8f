from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import random_tokens, tiny_model

from moa_lab.calibration import Sample, SampleSet
from moa_lab.profiling import profile
from moa_lab.profiling.subset import profile_part
from moa_lab.records import InfluenceProfile
from moa_lab.search import loss_table


def samples() -> SampleSet:
    return SampleSet(
        tuple(
            Sample(task, random_tokens(1, length, seed=index)[0].numpy(), ((length - 16, length),))
            for task in ("questions", "text")
            for length in (256, 320)
            for index in range(3)
        )
    )


@pytest.fixture(scope="module")
def whole() -> InfluenceProfile:
    torch.manual_seed(0)
    return profile(tiny_model("llama"), samples())


def test_a_part_gives_the_loss_table_of_a_profile_of_its_samples_alone(whole: InfluenceProfile) -> None:
    kept = SampleSet((*samples().select("questions", 256)[:2],))
    alone = loss_table(profile(tiny_model("llama"), kept))
    part = loss_table(profile_part(whole, tasks=["questions"], lengths=[256], samples=slice(2)))
    assert part.objectives == alone.objectives
    np.testing.assert_allclose(part.losses, alone.losses, rtol=1e-5)
    assert not np.allclose(part.losses, loss_table(profile_part(whole, tasks=["questions"], lengths=[256])).losses)


def test_a_part_of_whole_pairs_keeps_its_blocks_and_can_be_saved(whole: InfluenceProfile, tmp_path: Path) -> None:
    part = profile_part(whole, lengths=[320])
    assert part.keys == (("questions", 320), ("text", 320))
    assert InfluenceProfile.load(part.save(tmp_path / "part.safetensors")).keys == part.keys


def test_a_part_of_some_samples_has_no_blocks_of_them(whole: InfluenceProfile) -> None:
    part = profile_part(whole, tasks=["text"], samples={("text", 256): slice(0, None, 2), ("text", 320): slice(3)})
    assert set(part.blocks) == {("text", 320)}
    np.testing.assert_array_equal(part.distances["text", 256], whole.distances["text", 256][[0, 2]])
    np.testing.assert_array_equal(part.span_effects["text", 256], whole.span_effects["text", 256][[0, 2]])


def test_a_part_without_anything_is_refused(whole: InfluenceProfile) -> None:
    with pytest.raises(ValueError, match="questions@256"):
        profile_part(whole, tasks=["poems"])
    with pytest.raises(ValueError, match="none is left of questions@256"):
        profile_part(whole, samples=slice(5, None))
