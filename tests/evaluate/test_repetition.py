"""Repetition adds no evidence: whatever is named, drawn or stored twice counts once."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from texts import bpe_tokenizer
from tiny import VOCABULARY, tiny_model
from transformers import PreTrainedModel

from moa_lab.calibration import Request, Sample, SampleSet, calibrate
from moa_lab.calibration.tasks import PlainText
from moa_lab.commands.terminal import lengths_of
from moa_lab.evaluate import perplexity, retrieval
from moa_lab.evaluate.agreement import agreement_rows
from moa_lab.evaluate.compare import difference, ratio
from moa_lab.evaluate.scoring import loss_rows, score_samples
from moa_lab.evaluate.summary import summarise, table
from moa_lab.figures import score_bars
from moa_lab.figures.measurements import pooled
from moa_lab.models import geometry_of
from moa_lab.plan import dense_plan, uniform_plan
from moa_lab.profiling import profile
from moa_lab.records import Measurement, Measurements
from moa_lab.storage import read_json
from moa_lab.studies.gains import gain

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama", max_length=1024)


def random_sample(seed: int, n_tokens: int = 80, task: str = "text") -> Sample:
    return Sample(task, np.random.default_rng(seed).integers(5, VOCABULARY, n_tokens), ((50, 60),))


def row(values: list[float], plan: str = "moa", metric: str = "cross_entropy", task: str = "text", **changes: Any) -> Measurement:
    found = Measurement(plan, metric, task, 512, float(np.mean(values)), len(values), 0.0, 9.0, 0.5, {"per_sample": values})
    return replace(found, **changes)


@pytest.mark.parametrize("measure", [retrieval, perplexity])
def test_a_length_that_is_named_twice_is_measured_once(model: PreTrainedModel, measure: Any, caplog: pytest.LogCaptureFixture) -> None:
    once = measure(model, bpe_tokenizer(), lengths=[448], n=2)
    twice = measure(model, bpe_tokenizer(), lengths=[448, 448], n=2)
    assert twice.rows == once.rows
    assert "lengths: 448 named more than once, taken once" in caplog.text


def test_numbers_of_an_option_are_taken_once() -> None:
    assert lengths_of("512,256,512") == (512, 256)


def test_calibration_draws_no_sample_twice(model: PreTrainedModel) -> None:
    wanted = Request(PlainText(), 2)
    once = calibrate(model, bpe_tokenizer(), [256], wanted=[wanted])
    assert calibrate(model, bpe_tokenizer(), [256, 256], wanted=[wanted]).identity == once.identity
    # A second request of the same task goes on where the first one stopped.
    both = calibrate(model, bpe_tokenizer(), [256], wanted=[wanted, wanted])
    assert len(both) == len({sample.identity for sample in both}) == 4


def test_a_sample_that_is_in_a_set_twice_counts_once(model: PreTrainedModel, caplog: pytest.LogCaptureFixture) -> None:
    samples = [random_sample(0), random_sample(1)]
    twice = SampleSet((*samples, *samples))
    assert [sample.identity for sample in twice] == [sample.identity for sample in samples]
    assert "2 of 4 samples were there twice, counted once" in caplog.text
    assert len(profile(model, twice).distances["text", 80]) == 2


def test_scores_of_a_repeated_sample_make_no_narrower_interval(model: PreTrainedModel) -> None:
    plan, samples = uniform_plan(geometry_of(model), 0.5, sink_tokens=4, min_span=5), [random_sample(0), random_sample(1)]
    told: list[tuple[int, int]] = []
    repeated = [*samples, *samples]
    scores = score_samples(model, plan, repeated, progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 2), (2, 2)]
    assert len(scores) == 4
    assert loss_rows(plan, repeated, scores) == loss_rows(plan, samples, scores[:2])
    assert [found.n for found in agreement_rows(model, [plan], repeated)] == [2, 2]


def test_rows_that_are_added_twice_are_there_once(tmp_path: Path) -> None:
    rows = (row([1.0, 2.0]), row([0.5, 1.5], task="other"))
    found = Measurements(rows)
    assert found.plus(found).rows == found.plus(list(rows)).rows == found.rows
    # A log may hold a row twice: it counts once.
    twice = pooled(Measurements((*rows, *rows)), "moa", "cross_entropy", 512, "text")
    assert twice == pooled(found, "moa", "cross_entropy", 512, "text")
    score = pooled(found.plus([row([1.0, 2.0, 3.0])]), "moa", "cross_entropy", 512, "text")
    # They may share samples: of two rows about the same, the one with more observations counts.
    assert score is not None
    assert (score.value, score.n) == (2.0, 3)


def test_a_group_of_tasks_adds_nothing_to_its_members() -> None:
    members = [row([1.0, 0.0], metric="acc", task=name) for name in "ab"]
    group = row([1.0, 0.0, 1.0, 0.0], metric="acc", task="group", detail={"members": ["a", "b"]})
    score = pooled(Measurements((group, *members)), "moa", "acc", 512)
    assert score is not None
    assert score.n == 4


def test_a_gain_over_a_length_that_is_named_twice_counts_it_once() -> None:
    rows = [row([1.0, 2.0, 3.0]), row([1.5, 2.0, 3.25], plan="uniform")]
    assert gain(rows, "moa", "uniform", "text", [512, 512]) == gain(rows, "moa", "uniform", "text", [512])


def test_rows_of_different_samples_are_no_pairs() -> None:
    ours, theirs = (row([1.0, 2.0], detail={"per_sample": [1.0, 2.0], "samples": name}) for name in ("a", "b"))
    with pytest.raises(ValueError, match="not measured on the same samples"):
        difference(ours, theirs)


def test_one_sample_has_no_interval_wherever_it_is_shown(tmp_path: Path, model: PreTrainedModel) -> None:
    found = perplexity(model, bpe_tokenizer(), lengths=[256], n=1)
    (single,) = found
    assert (single.n, single.low, single.high) == (1, -math.inf, math.inf)
    path = found.save(tmp_path / "found.json")
    assert [read_json(path, "moa-lab/measurements/1")["rows"][0][end] for end in ("low", "high")] == [None, None]
    assert Measurements.load(path).rows == found.rows
    summary = json.loads(json.dumps(summarise([dense_plan(geometry_of(model))], found, 256), allow_nan=False))
    assert summary["plans"]["dense"]["document_cross_entropy"]["256"]["low"] is None
    assert f"{single.value:.3f} [no interval]" in table(summary)
    (bars,) = score_bars(found, "cross_entropy").data
    assert (bars.error_y.array, bars.customdata[0][0]) == ((None,), "no interval")


def test_an_old_record_of_one_sample_is_read_without_an_interval() -> None:
    assert row([6.99], low=6.99, high=6.99).low == -math.inf
    exact = row([1.0], metric="kv_bytes_allocated", low=1.0, high=1.0)
    assert (exact.low, exact.high) == (1.0, 1.0)


def test_a_pair_alone_decides_nothing() -> None:
    ours, theirs = row([1.0]), row([2.0], plan="uniform")
    for found in (difference(ours, theirs), ratio(ours, theirs)):
        assert (found.low, found.high) == (-math.inf, math.inf)
    # Hits: what two equal pairs leave open is told.
    ours, theirs = (row([1.0, 1.0], metric="retrieval", plan=plan) for plan in ("moa", "uniform"))
    assert difference(ours, theirs).low < -0.5
    assert gain([ours, theirs], "moa", "uniform", "text", [512]).verdict == "not decided"


def test_telling_of_a_repetition_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        Measurements((row([1.0, 2.0]),)).plus([row([1.0, 2.0]), row([1.0, 3.0])])
    assert "1 of 2 rows of scores were there already, counted once" in caplog.text
