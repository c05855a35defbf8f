from __future__ import annotations

import numpy as np
import pytest

from moa_lab.evaluate.intervals import Interval
from moa_lab.records import Measurement
from moa_lab.studies.gains import Gain, counted, gain, gains, listed, unequal


def scored(plan: str, task: str, length: int, values: list[float], density: float = 0.5) -> Measurement:
    metric = "retrieval" if task == "needles" else "cross_entropy"
    return Measurement(plan, metric, task, length, float(np.mean(values)), len(values), 0.0, 1.0, density, {"per_sample": values})


def test_more_needles_and_fewer_nats_are_both_gains() -> None:
    rows = [
        scored("old", "needles", 512, [0, 0, 1, 0]), scored("new", "needles", 512, [1, 1, 1, 0]),
        scored("old", "documents", 512, [2.0, 3.0, 4.0]), scored("new", "documents", 512, [1.5, 2.4, 3.5]),
    ]  # fmt: skip
    needles, documents = (gain(rows, "new", "old", task, [512]) for task in ("needles", "documents"))
    assert needles.found.value == 0.5
    assert documents.found.value == pytest.approx(1.6 / 3)
    assert documents.verdict == "better"
    assert gain(rows, "old", "new", "documents", [512]).verdict == "worse"
    assert needles.verdict == "not decided"
    # Four needles that come out alike may be luck; as many as in a study are not.
    assert gain(rows, "old", "old", "needles", [512]).verdict == "not decided"
    many = [scored("old", "needles", 512, [0, 1] * 256)]
    assert gain(many, "old", "old", "needles", [512]).verdict == "no difference"


def test_lengths_are_pooled_sample_by_sample_and_paired() -> None:
    rows = [
        scored("old", "needles", 512, [0, 0]), scored("new", "needles", 512, [1, 0], density=0.4),
        scored("old", "needles", 1024, [1, 1]), scored("new", "needles", 1024, [1, 0], density=0.2),
    ]  # fmt: skip
    short, long, both = gains(rows, [("new", "old")], (512, 1024))
    assert (short.found.value, long.found.value, both.found.value) == (0.5, -0.5, 0.0)
    assert both.found.n == 4
    assert both.row().length == 0
    assert long.row().length == 1024
    assert both.density == pytest.approx(0.3)
    assert both.against_density == pytest.approx(0.5)


def test_a_single_pair_decides_nothing_and_shows_no_interval() -> None:
    rows = [scored("old", "documents", 512, [2.0]), scored("new", "documents", 512, [1.5])]
    one = gain(rows, "new", "old", "documents", [512])
    assert one.verdict == "not decided"
    assert one.numbers == "+0.500 [one sample] nats saved"
    assert gain(rows, "old", "old", "documents", [512]).verdict == "not decided"
    assert [counted(n, "comparison") for n in (0, 1, 2)] == ["0 comparisons", "1 comparison", "2 comparisons"]


def test_what_was_not_measured_is_refused() -> None:
    with pytest.raises(KeyError):
        gain([scored("old", "needles", 512, [0, 0])], "new", "old", "needles", [512])


def test_unequal_bytes_are_named_and_equal_ones_are_not() -> None:
    one = Gain("new", "old", "needles_gained", "needles", (2048,), Interval(0.0, 4, -0.1, 0.1), 0.2, 0.25)
    assert unequal([one]) == "Not all keep the same: new 20.0% and old 25.0% at 2,048 tokens."
    assert not unequal([Gain(*list(vars(one).values())[:6], density=0.25, against_density=0.251)])
    assert listed([1024]) == "1,024 tokens"
    assert listed([1024, 2048, 4096]) == "1,024, 2,048 and 4,096 tokens"
