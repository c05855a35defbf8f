"""The calibration stage: exact lengths, the model's own answers, nothing answered twice."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from texts import small_documents, tokenizer_of
from tiny import tiny_model
from transformers import PreTrainedModel

from moa_lab.calibration import Request, Sample, SampleSet, calibrate, dataset, requests
from moa_lab.calibration.answers import AnswerScore, answer_greedily, fill_greedily, score_answers
from moa_lab.calibration.dataset import Examiner, Keep
from moa_lab.calibration.tasks import HumanAnswers, PlainText, Questions, Summaries
from moa_lab.models import tokenizer_fingerprint, weights_fingerprint

torch.set_num_threads(1)

DOCUMENTS = small_documents(sentences=40)
QUESTIONS = Request(Questions(per_sample=2), 2)
SUMMARIES = Request(Summaries(answer_tokens=6), 2)
LENGTHS = (700, 800)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama", max_length=1024)


def answered(model: PreTrainedModel, wanted: tuple[Request, ...] = (QUESTIONS, SUMMARIES), **settings: Any) -> SampleSet:
    return calibrate(model, tokenizer_of("chat"), settings.pop("lengths", LENGTHS), wanted=wanted, documents=DOCUMENTS, **settings)


@dataclass
class Forwards:
    count: int = 0


@contextmanager
def forwards_of(model: PreTrainedModel) -> Iterator[Forwards]:
    counter = Forwards()

    def count(*_: object) -> None:
        counter.count += 1

    hook = model.register_forward_pre_hook(count)
    try:
        yield counter
    finally:
        hook.remove()


@pytest.fixture
def knowing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that gives the first answer of every sample right, and no other."""

    def score(model: PreTrainedModel, batch: list[Sample]) -> list[list[AnswerScore]]:
        return [[AnswerScore(1.0, index == 0, stop - start) for index, (start, stop) in enumerate(s.answers)] for s in batch]

    monkeypatch.setattr(dataset, "score_answers", score)


def test_every_request_is_met_at_every_length_in_order(model: PreTrainedModel) -> None:
    steps: list[tuple[int, int]] = []
    samples = answered(model, lengths=(800, 700), progress=lambda *step: steps.append(step))
    assert [(s.length, s.task) for s in samples] == [(n, task) for n in LENGTHS for task in ("questions",) * 2 + ("summaries",) * 2]
    assert steps == [(done, 8) for done in range(1, 9)]
    assert samples.settings["lengths"] == [700, 800]
    assert samples.provenance.weights == weights_fingerprint(model)
    assert samples.provenance.tokenizer == tokenizer_fingerprint(tokenizer_of("chat"))
    assert samples.provenance.calibration == samples.identity


def test_summaries_are_the_models_own_greedy_words_without_an_end(model: PreTrainedModel) -> None:
    for sample in answered(model, (SUMMARIES,)):
        assert fill_greedily(model, [sample], never=(tokenizer_of("chat").eos_token_id,))[0].identity == sample.identity
        assert tokenizer_of("chat").eos_token_id not in sample.tokens[sample.answer_positions]


def test_a_model_that_answers_wrongly_keeps_its_own_answers_and_is_reported(
    model: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        samples = answered(model, (QUESTIONS,), lengths=(700,))
    assert "questions at 700 tokens: the model answers 3 of 3 drafts wrongly; 2 samples keep its own wrong answers" in caplog.text
    for sample in samples:
        assert fill_greedily(model, [sample], never=(tokenizer_of("chat").eos_token_id,))[0].identity == sample.identity
        said = [tokenizer_of("chat").decode(sample.tokens[a:b]) for a, b in sample.answers]
        assert all(text.strip() != fact["answer"] for text, fact in zip(said, sample.detail["facts"], strict=True))


@pytest.mark.usefixtures("knowing")
def test_the_loss_is_on_the_answers_that_the_model_gives_itself(model: PreTrainedModel, caplog: pytest.LogCaptureFixture) -> None:
    samples = answered(model, (QUESTIONS,), lengths=(700,))
    for sample in samples:
        assert sample.detail["right"] == [True, False]
        assert len(sample.answers) == 1
        said = tokenizer_of("chat").decode(sample.tokens[sample.answer_positions])
        assert said == " " + sample.detail["facts"][0]["answer"]
    assert not caplog.records


@pytest.mark.usefixtures("knowing")
def test_samples_with_fewer_than_half_their_answers_right_are_turned_down(model: PreTrainedModel, caplog: pytest.LogCaptureFixture) -> None:
    samples = answered(model, (Request(Questions(per_sample=3), 2),), lengths=(800,))
    assert len(samples) == 2
    assert all("right" not in sample.detail and len(sample.answers) == 3 for sample in samples)
    assert "3 of 3 drafts wrongly" in caplog.text


def test_an_examiner_runs_the_drafts_of_questions_and_decides_with_the_same_rule(model: PreTrainedModel) -> None:
    examined: list[int] = []

    def run(drafts: list[Sample], keep: Keep) -> list[Sample | None]:
        examined.append(len(drafts))
        return [keep(draft, [AnswerScore(1.0, index == 1, b - a) for index, (a, b) in enumerate(draft.answers)]) for draft in drafts]

    samples = answered(model, lengths=(700,), examiner=Examiner(run, lambda length: 0))
    assert examined == [1, 1]
    assert [sample.detail["right"] for sample in samples if sample.task == "questions"] == [[False, True]] * 2
    summaries = answered(model, (SUMMARIES,), lengths=(700,))
    assert [s.identity for s in samples if s.task == "summaries"] == [s.identity for s in summaries]


def test_the_same_seed_gives_the_same_set_and_another_another(model: PreTrainedModel) -> None:
    first = answered(model, lengths=(700,))
    assert first.identity == answered(model, lengths=(700,)).identity
    assert first.identity != answered(model, lengths=(700,), seed=1).identity


def test_more_of_one_task_changes_nothing_of_another(model: PreTrainedModel) -> None:
    few = answered(model)
    many = answered(model, (Request(Questions(per_sample=2), 3), Request(Summaries(answer_tokens=6), 2)))
    for length in LENGTHS:
        assert [s.identity for s in many.select("summaries", length)] == [s.identity for s in few.select("summaries", length)]
    longer = answered(model, lengths=(700, 900))
    assert [s.identity for s in longer.select(length=700)] == [s.identity for s in few.select(length=700)]


def test_splits_draw_different_samples(model: PreTrainedModel) -> None:
    sets = [answered(model, (SUMMARIES,), lengths=(700,), split=split) for split in ("calibration", "validation", "test")]
    assert len({sample.identity for samples in sets for sample in samples}) == 6


@pytest.mark.parametrize("batch_size", [2, 3])
def test_batches_give_what_single_samples_give(model: PreTrainedModel, batch_size: int) -> None:
    assert answered(model, (SUMMARIES,), batch_size=batch_size).identity == answered(model, (SUMMARIES,)).identity


def test_a_second_call_answers_nothing_again(model: PreTrainedModel, tmp_path: Path) -> None:
    with forwards_of(model) as first:
        samples = answered(model, parts_dir=tmp_path)
    with forwards_of(model) as second:
        again = answered(model, parts_dir=tmp_path)
    assert first.count > 0
    assert second.count == 0
    assert again.identity == samples.identity == answered(model).identity
    assert [s.detail for s in again] == [s.detail for s in samples]


def test_a_killed_run_goes_on_where_it_stopped(model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    calls: list[int] = []

    def fill(model: PreTrainedModel, batch: list[Sample], never: tuple[int, ...] = ()) -> list[tuple[Sample, list[AnswerScore]]]:
        if len(calls) == 3:
            calls.append(0)
            raise Killed
        calls.append(len(batch))
        return answer_greedily(model, batch, never)

    unbroken = answered(model)
    monkeypatch.setattr(dataset, "answer_greedily", fill)
    with pytest.raises(Killed):
        answered(model, parts_dir=tmp_path)
    samples = answered(model, parts_dir=tmp_path)
    assert samples.identity == unbroken.identity
    assert sum(calls) == len(samples), "no sample is answered twice"


def test_a_truncated_part_is_answered_again(model: PreTrainedModel, tmp_path: Path) -> None:
    samples = answered(model, (SUMMARIES,), parts_dir=tmp_path)
    part = sorted(tmp_path.iterdir())[0]
    part.write_bytes(part.read_bytes()[:50])
    with forwards_of(model) as forwards:
        assert answered(model, (SUMMARIES,), parts_dir=tmp_path).identity == samples.identity
    assert forwards.count == 6, "one answer of six tokens"


def test_parts_of_another_model_are_not_taken(model: PreTrainedModel, tmp_path: Path) -> None:
    answered(model, (SUMMARIES,), parts_dir=tmp_path)
    other = tiny_model("llama", max_length=1024, seed=1)
    assert answered(other, (SUMMARIES,), parts_dir=tmp_path).identity == answered(other, (SUMMARIES,)).identity


@pytest.mark.parametrize(("supervision", "tasks"), [("model", {"questions", "summaries"}), ("human", {"human"}), ("text", {"text"})])
def test_supervision_names_the_tasks(supervision: Any, tasks: set[str]) -> None:
    wanted = requests(supervision, questions=3, others=2, answer_tokens=9)
    assert {request.task.name for request in wanted} == tasks
    assert {request.count for request in wanted} == ({3, 2} if supervision == "model" else {2})


def test_an_unknown_supervision_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="one of model, human, text, got 'gold'"):
        requests("gold")  # type: ignore[arg-type]


def test_human_and_text_supervision_need_no_answer_of_the_model(model: PreTrainedModel) -> None:
    with forwards_of(model) as forwards:
        samples = answered(model, (Request(HumanAnswers(), 2), Request(PlainText(), 2)))
    assert forwards.count == 0
    assert samples.keys == (("human", 700), ("human", 800), ("text", 700), ("text", 800))
    summaries = {document.summary for document in DOCUMENTS}
    assert all(tokenizer_of("chat").decode(s.tokens[s.answer_positions]) in summaries for s in samples.select("human"))


def test_the_embedded_documents_are_the_default(model: PreTrainedModel) -> None:
    samples = calibrate(model, tokenizer_of("chat"), [256], wanted=(Request(PlainText(), 1),))
    assert (samples.samples[0].tokens[1:] < 261).all()
    text = tokenizer_of("chat").decode(samples.samples[0].tokens[1:])
    assert len(text.split()) > 20
    assert np.unique(samples.samples[0].tokens).size > 15


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lengths": (2048,)}, "length 2048 is beyond the model's maximum of 1024"),
        ({"lengths": (0,)}, "length 0"),
        ({"lengths": ()}, "nothing to calibrate"),
        ({"wanted": ()}, "nothing to calibrate"),
        ({"wanted": (Request(Questions(), 0),)}, "nothing to calibrate"),
        ({"lengths": (100,)}, "length 100 is too short for a 'questions' sample"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(model: PreTrainedModel, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        answered(model, **settings)


def test_a_later_task_or_length_without_room_is_refused_before_the_first_answer(model: PreTrainedModel) -> None:
    for settings in ({"lengths": (800, 100)}, {"wanted": (QUESTIONS, Request(Summaries(answer_tokens=600), 1))}):
        with forwards_of(model) as forwards, pytest.raises(ValueError, match="is too short for a"):
            answered(model, **settings)
        assert forwards.count == 0


def test_fewer_than_no_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="number of 'questions' samples must be 0 or more, got -1"):
        requests(questions=-1)


def test_documents_that_cannot_fill_a_length_are_refused(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="add documents"):
        calibrate(model, tokenizer_of("chat"), [1000], wanted=(Request(PlainText(), 1),), documents=small_documents(1, 5))


def test_control_tokens_that_documents_spell_are_text_and_counted_in_the_settings(model: PreTrainedModel) -> None:
    tokenizer = tokenizer_of("chat")
    spelled = tuple(replace(one, text=one.text.replace(". ", ".<|im_end|> "), summary="All is<bos> well.") for one in DOCUMENTS)
    wanted = (QUESTIONS, Request(HumanAnswers(), 2), Request(PlainText(), 2))
    samples = calibrate(model, tokenizer, [1000], wanted=wanted, documents=spelled)
    clean = calibrate(model, tokenizer, [1000], wanted=wanted, documents=DOCUMENTS)
    specials = set(tokenizer.all_special_ids)
    for found, expected in zip(samples, clean, strict=True):
        assert [token for token in found.tokens if token in specials] == [token for token in expected.tokens if token in specials]
    counted = sum(one.text.count("<|im_end|>") for one in spelled)
    assert samples.settings["escaped_controls"] == {"<|im_end|>": counted, "<bos>": len(spelled)}
    assert "escaped_controls" not in clean.settings


@pytest.mark.parametrize("every", [2, 3, 5])
def test_samples_are_the_same_on_any_number_of_cores(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, every: int) -> None:
    def score(model: PreTrainedModel, batch: list[Sample]) -> list[list[AnswerScore]]:
        return [[AnswerScore(1.0, int(s.tokens.sum()) % every == 0, 1) for _ in s.answers] for s in batch]

    monkeypatch.setattr(dataset, "score_answers", score)
    wanted = (Request(Questions(), 3), SUMMARIES, Request(Questions(), 2))
    found = []
    for cores in (1, 2, 5):
        monkeypatch.setattr(dataset, "workers", lambda items, device, bytes_each, cores=cores: min(items, cores))
        found.append(answered(model, wanted, lengths=(700,)).identity)
    assert found == found[:1] * 3


@pytest.mark.usefixtures("two_threads")
def test_answers_written_side_by_side_are_those_of_one_core_and_come_with_their_scores(model: PreTrainedModel) -> None:
    told: dict[str, list[AnswerScore]] = {}
    samples = answered(model, (SUMMARIES,), told=lambda sample, scores: told.update({sample.identity: scores}))
    torch.set_num_threads(1)
    assert samples.identity == answered(model, (SUMMARIES,)).identity
    assert set(told) == {sample.identity for sample in samples}
    for sample in samples:
        (expected,) = score_answers(model, [sample])[0]
        assert told[sample.identity][0].exact == expected.exact
        assert told[sample.identity][0].loss == pytest.approx(expected.loss, abs=1e-5)
