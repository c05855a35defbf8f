"""What the other environment needs: the model as a folder that any transformers reads, and the questions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moa_lab.calibration.samples import Sample
from moa_lab.evaluate.testsets import needle_samples
from moa_lab.models import model_name, tokenizer_fingerprint, weights_fingerprint
from moa_lab.presses.questions import Question, QuestionSet
from moa_lab.provenance import provenance

MODEL, QUESTIONS = "model", "questions.json"
"""Names in the folder."""


def prepare(
    folder: str | Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, lengths: Sequence[int], n: int, seed: int = 0
) -> QuestionSet:
    """Write model, tokenizer and `n` needles a length (test split) to `folder`, and return the questions."""
    place = Path(folder)
    samples = [sample for length in lengths for sample in needle_samples(tokenizer, length, n, seed=seed)]
    origin = provenance(
        model_name(model), weights_fingerprint(model), tokenizer_fingerprint(tokenizer), seed=seed, device=str(model.device)
    )
    questions = QuestionSet(tuple(map(question_of, samples)), origin)
    model.save_pretrained(place / MODEL)
    tokenizer.save_pretrained(place / MODEL)
    # Last: where it is, the rest is.
    questions.save(place / QUESTIONS)
    return questions


def question_of(sample: Sample) -> Question:
    """The sample in three parts. Raises ValueError for one of several questions, or of none."""
    if len(sample.answers) != 1 or "asked_from" not in sample.detail:
        raise ValueError(f"a sample with one planted fact is needed, got one of {sample.task!r} with {len(sample.answers)} answers")
    ((start, stop),) = sample.answers
    asked_from = sample.detail["asked_from"]
    ids = sample.tokens.tolist()
    return Question(
        sample.task, tuple(ids[:asked_from]), tuple(ids[asked_from:start]), tuple(ids[start:stop]),
        sample.detail["facts"][0]["answer"], sample.identity,
    )  # fmt: skip
