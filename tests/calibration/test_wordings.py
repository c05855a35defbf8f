"""Facts of the three splits share nothing that a model could carry from one to another."""

import itertools
import string
from random import Random

import pytest

from moa_lab.calibration.documents import SPLITS, Split
from moa_lab.calibration.wordings import LESSONS, WORDINGS, Wording

PAIRS = list(itertools.combinations(SPLITS, 2))
# What spans are learned from holds the wordings of calibration, and must be as strange to the other splits.
KINDS = {**WORDINGS, "calibration": LESSONS}


def texts(wording: Wording) -> set[str]:
    return {wording.sentence, wording.question, wording.lead}


def stripped(template: str) -> str:
    """A template as it would be told apart by a reader: no placeholders, punctuation or capitals."""
    return "".join(c for c in template.replace("{key}", "").replace("{value}", "").lower() if c in string.ascii_lowercase)


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_splits_share_no_wording_template_or_name_of_one(one: Split, other: Split) -> None:
    for first, second in itertools.product(KINDS[one], KINDS[other]):
        assert first.name != second.name
        assert not {stripped(text) for text in texts(first)} & {stripped(text) for text in texts(second)}


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_splits_share_no_list_of_keys_and_no_word_of_one(one: Split, other: Split) -> None:
    words = [{word for wording in KINDS[split] for names in wording.keys for word in names} for split in (one, other)]
    assert words[0]
    assert not words[0] & words[1]


def test_spans_are_learned_from_many_kinds_of_sentences() -> None:
    assert set(WORDINGS["calibration"]) < set(LESSONS)
    assert len({wording.name for wording in LESSONS}) == len(LESSONS) >= 20


@pytest.mark.parametrize("split", SPLITS)
def test_a_fact_says_its_key_and_value_and_its_question_does_not_give_the_answer_away(split: Split) -> None:
    assert len(KINDS[split]) >= 3
    for wording in KINDS[split]:
        fact = wording.draw(Random(0), set())
        assert fact.wording == wording.name
        assert fact.key in fact.sentence
        assert fact.answer in fact.sentence
        assert fact.key in fact.question
        assert fact.key in fact.lead
        assert fact.answer not in fact.question + fact.lead
        assert "{" not in fact.sentence + fact.question + fact.lead


def test_no_two_facts_of_a_text_have_the_same_key() -> None:
    taken: set[str] = set()
    random = Random(1)
    keys = [WORDINGS["test"][0].draw(random, taken).key for _ in range(200)]
    assert len(set(keys)) == 200
    assert taken == set(keys)


@pytest.mark.parametrize("wording", WORDINGS["test"], ids=lambda wording: wording.name)
def test_test_answers_are_seven_random_digits(wording: Wording) -> None:
    random = Random(2)
    answers = [wording.draw(random, set()).answer for _ in range(100)]
    assert all(answer.isdigit() and len(answer) == 7 for answer in answers)
    assert len(set(answers)) > 95


def test_the_same_seed_draws_the_same_facts() -> None:
    for wording in itertools.chain.from_iterable(KINDS.values()):
        assert wording.draw(Random(3), set()) == wording.draw(Random(3), set())
