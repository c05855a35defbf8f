"""What a plan is chosen by: needles, words or both."""

from __future__ import annotations

import numpy as np
import pytest

from moa_lab.calibration.answers import AnswerScore
from moa_lab.calibration.samples import Sample
from moa_lab.evaluate.prefer import Losses, losses_of, preference_scores
from moa_lab.presets import Preference, RunSettings

LOSSES = {
    "uniform": Losses({"needles": 2.0, "words": 0.06}, 0.7),
    "finds": Losses({"needles": 0.0, "words": 0.09}, 0.0),
    "reads": Losses({"needles": 1.0, "words": 0.02}, 0.4),
    "balanced": Losses({"needles": 0.05, "words": 0.04}, 0.07),
}


@pytest.mark.parametrize(
    ("prefer", "best"),
    [("needles", "finds"), ("words", "reads"), ("both", "balanced"), ("needles=1,words=0.01", "finds"), ("words=9,needles=1", "reads")],
)
def test_the_preference_decides_between_what_is_lost(prefer: str, best: str) -> None:
    scores = preference_scores(LOSSES, "uniform", Preference.parse(prefer))
    assert min(scores, key=lambda name: scores[name]) == best
    assert scores["uniform"] == pytest.approx(1.0)


def test_of_equal_losses_of_what_is_preferred_the_other_kind_decides() -> None:
    losses = {"a": Losses({"needles": 0.1, "words": 0.5}, 0.0), "b": Losses({"needles": 0.1, "words": 0.4}, 0.0)}
    scores = preference_scores(losses, None, Preference.parse("needles"))
    assert scores["b"] < scores["a"]


def test_one_kind_alone_is_all_that_counts_where_the_other_was_not_measured() -> None:
    losses = {"a": Losses({"words": 0.1}, 0.0), "b": Losses({"words": 0.3}, 0.0)}
    scores = preference_scores(losses, None, Preference.parse("needles"))
    assert scores["a"] < scores["b"]


@pytest.mark.parametrize(
    "text",
    ["", "neither", "needles=", "needles=-1", "needles=0,words=0", "words=nan", "poems=1", "needles=inf", "needles=1e308,words=1e308"],
)
def test_a_preference_that_says_nothing_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="prefer must be needles, words, both or weights such as"):
        RunSettings(prefer=text)


def test_a_kind_that_is_named_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="'needles' is named twice in 'needles=1,needles=2'"):
        Preference.parse("needles=1,needles=2")


@pytest.mark.parametrize("weight", ["1e-9", "1e308"])
def test_weights_count_by_their_ratio(weight: str) -> None:
    found = [preference_scores(LOSSES, "uniform", Preference.parse(prefer)) for prefer in ("needles", f"needles={weight}")]
    assert found[1] == pytest.approx(found[0])


def _sample(task: str, seed: int, facts: bool) -> Sample:
    tokens = np.random.default_rng(seed).integers(0, 50, 64)
    return Sample(task, tokens, ((60, 64),), {"facts": [{}]} if facts else {})


def test_losses_are_means_over_tasks_against_the_dense_model_and_facts_count_where_they_were_asked() -> None:
    samples = [_sample("needles", 0, True), _sample("needles", 1, True), _sample("documents", 2, False)]
    dense = [[AnswerScore(0.1, True, 4)], [AnswerScore(0.3, False, 4)], [AnswerScore(3.0, False, 4)]]
    plan = [[AnswerScore(0.5, False, 4)], [AnswerScore(0.3, False, 4)], [AnswerScore(3.2, False, 4)]]
    found = losses_of(samples, plan, dense)
    assert found.nats == pytest.approx({"needles": 0.2, "words": 0.2})
    assert found.facts == pytest.approx(0.5)
