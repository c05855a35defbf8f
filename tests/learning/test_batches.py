"""A step's batch: one length, drawn by its tokens, and all tasks."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from moa_lab.calibration.samples import Sample, SampleSet
from moa_lab.learning.batches import Batches

TOKENS = 1024


def samples(*shapes: tuple[str, int]) -> SampleSet:
    return SampleSet(tuple(Sample(task, np.full(length, index), ((1, 2),)) for task, length in shapes for index in range(20)))


def test_a_batch_has_one_length_and_all_tasks_half_of_it_questions() -> None:
    batches = Batches(samples(*((task, n) for task in ("questions", "summaries", "text") for n in (64, 128))), TOKENS, seed=0)
    for _ in range(10):
        batch = batches.draw()
        (length,) = {sample.length for sample in batch}
        assert Counter(sample.task for sample in batch) == {
            "questions": TOKENS // length // 2, "summaries": TOKENS // length // 4, "text": TOKENS // length // 4,
        }  # fmt: skip


def test_a_length_comes_in_proportion_to_its_tokens() -> None:
    batches = Batches(samples(("text", 64), ("text", 128), ("text", 448)), TOKENS, seed=1)
    drawn = Counter(batches.draw()[0].length for _ in range(2000))
    assert [drawn[n] / 2000 for n in (64, 128, 448)] == pytest.approx([0.1, 0.2, 0.7], abs=0.03)


def test_a_length_that_fills_more_than_a_batch_has_a_sample_of_each_task() -> None:
    batch = Batches(samples(("questions", 2048), ("text", 2048)), TOKENS, seed=0).draw()
    assert sorted(sample.task for sample in batch) == ["questions", "text"]


def test_a_task_that_lacks_a_length_is_refused() -> None:
    with pytest.raises(ValueError, match="no samples of text at 128"):
        Batches(samples(("questions", 64), ("text", 64), ("questions", 128)), TOKENS, seed=0)
