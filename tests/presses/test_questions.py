"""Questions: the parts are the sample, and nothing of what is asked stands before the question."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from texts import TOKENIZERS, small_documents, tokenizer_of
from tiny import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from moa_lab.calibration.samples import Sample, SampleSet
from moa_lab.evaluate.testsets import needle_samples
from moa_lab.models import weights_fingerprint
from moa_lab.presses.methods import kept_context, split_heads
from moa_lab.presses.preparing import MODEL, QUESTIONS, prepare, question_of
from moa_lab.presses.questions import Question, QuestionSet, identity
from moa_lab.storage import RecordError

DOCUMENTS = small_documents(8, sentences=120)


def question(context: int = 90, asked: int = 6, answer: int = 4, task: str = "needles") -> Question:
    return Question(task, (5,) * context, (6,) * asked, (7,) * answer, "1234567", f"{context}")


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_three_parts_are_the_sample_and_what_is_asked_comes_with_the_question(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    for sample in needle_samples(tokenizer, 1200, 6, documents=DOCUMENTS):
        found = question_of(sample)
        assert [*found.context, *found.question, *found.answer] == sample.tokens.tolist()
        assert found.length == 1200
        context, asked, answer = (tokenizer.decode(list(ids)) for ids in (found.context, found.question, found.answer))
        (fact,) = sample.detail["facts"]
        assert answer.strip() == found.text == fact["answer"]
        # The planted fact names its key and its number; the question names the key alone.
        assert fact["answer"] in context
        assert fact["answer"] not in asked
        assert fact["key"] in asked
        assert asked.lstrip("\n").startswith("What")


def test_a_sample_without_one_planted_fact_is_refused() -> None:
    tokens = np.arange(10)
    with pytest.raises(ValueError, match="one planted fact"):
        question_of(Sample("text", tokens, ((5, 10),)))
    with pytest.raises(ValueError, match="one planted fact"):
        question_of(Sample("needles", tokens, ((5, 6), (8, 10)), {"asked_from": 4}))


def test_rows_name_their_samples_as_the_projects_own_rows_do() -> None:
    samples = needle_samples(tokenizer_of("chat"), 1200, 3, documents=DOCUMENTS)
    assert identity([question_of(sample) for sample in samples]) == SampleSet(tuple(samples)).identity


def test_the_folder_holds_the_model_and_the_questions(tmp_path: Path) -> None:
    model, tokenizer = tiny_model("llama"), tokenizer_of("chat")
    written = prepare(tmp_path / "folder", model, tokenizer, [1200], 2, seed=3)
    read = QuestionSet.load(tmp_path / "folder" / QUESTIONS)
    assert read == written
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "folder" / MODEL)
    assert weights_fingerprint(again) == weights_fingerprint(model) == read.provenance.weights
    same = AutoTokenizer.from_pretrained(tmp_path / "folder" / MODEL)
    assert same.decode(list(read.questions[0].context)) == tokenizer.decode(list(read.questions[0].context))


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "q.json").write_text('{"schema": "moa-lab/plan/1"}')
    with pytest.raises(RecordError, match="moa-lab/questions/1"):
        QuestionSet.load(tmp_path / "q.json")


def test_few_of_many_questions_are_spread_over_all() -> None:
    every = QuestionSet(tuple(question(context) for context in [90] * 8 + [50] * 3))
    assert {key: len(group) for key, group in every.groups().items()} == {("needles", 100): 8, ("needles", 60): 3}
    chosen = QuestionSet(tuple(Question("n", (depth,), (1,), (2,), "", str(depth)) for depth in range(9))).groups(4)
    assert [one.context for one in chosen["n", 3]] == [(0,), (2,), (4,), (6,)]


@pytest.mark.parametrize("keep", [0.15, 0.5, 1.0])
def test_the_share_kept_counts_question_and_answer(keep: float) -> None:
    one = question(context=900, asked=60, answer=40)
    assert kept_context(keep, one) + one.asked_tokens == keep * one.length


def test_a_share_that_question_and_answer_alone_exceed_is_refused() -> None:
    with pytest.raises(ValueError, match="10%"):
        kept_context(0.1, question(context=90, asked=6, answer=4))


@pytest.mark.parametrize(("kept", "context", "floor"), [(384, 1000, 384), (500, 1000, 192), (777, 1001, 192), (1000, 1000, 192)])
@pytest.mark.parametrize("heads", [1, 4, 48])
def test_streaming_heads_and_whole_heads_keep_what_is_asked_for(kept: int, context: int, floor: int, heads: int) -> None:
    streaming, tokens = split_heads(kept, context, heads, floor)
    assert 0 <= streaming <= heads
    assert streaming == 0 or floor <= tokens < context
    # Less than one entry of a streaming head is lost.
    assert 0 <= heads * kept - (streaming * tokens + (heads - streaming) * context) < max(1, streaming)


def test_no_split_keeps_less_than_streaming_heads_alone() -> None:
    with pytest.raises(ValueError, match="cannot keep 383"):
        split_heads(383, 1000, 48, 384)
