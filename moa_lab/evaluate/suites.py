"""The samples that a preset validates and tests plans on, drawn once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moa_lab import processes
from moa_lab.calibration.answers import AnswerScore
from moa_lab.calibration.documents import Document, Split
from moa_lab.calibration.rehearsal import rehearse
from moa_lab.calibration.samples import Sample
from moa_lab.calibration.tasks import Lines, PlainText, Questions, Summaries, Task
from moa_lab.evaluate.store import ScoreStore
from moa_lab.evaluate.testsets import document_samples, line_samples, needle_samples, own_answer_samples
from moa_lab.evaluate.validate import validation_length
from moa_lab.models import geometry_of
from moa_lab.plan import dense_plan
from moa_lab.presets import Preset

Progress = Callable[[str, int, int], None]
"""Called with (stage, samples answered, samples in all)."""


@dataclass
class Suites:
    """Samples of the validation and test splits, in the numbers of `preset`.

    lengths: the profiled ones; used: where plans will be used (see `validation_length`). documents, seeds: per split; None for the
    embedded documents. answers_dir: where the dense model's own answers are kept; answer_batch: how many it writes at once. scores:
    where its scores of them go.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    preset: Preset
    lengths: Sequence[int]
    documents: Mapping[Split, Sequence[Document] | None]
    seeds: Mapping[Split, int]
    used: Sequence[int]
    answers_dir: Path
    answer_batch: int
    progress: Progress
    scores: ScoreStore
    _tested: dict[tuple[str, int], list[Sample]] = field(default_factory=dict)

    @cached_property
    def validation(self) -> list[Sample]:
        """Samples for choosing a plan: needles, the dense model's own answers and plain texts, at a length beyond the profiled ones, and
        at these if the preset says so."""
        preset = self.preset
        shared: dict[str, Any] = {"split": "validation", "seed": self.seeds["validation"], "documents": self.documents["validation"]}
        samples = []
        for length in self._validated:
            per_sample = min(preset.needles_per_text, preset.validation_questions)
            samples += needle_samples(self.tokenizer, length, preset.validation_questions, per_sample=per_sample, **shared)
            samples += self._own_answers(length, preset.validation_summaries, "validation", "validate")
            if preset.validation_texts:
                samples += document_samples(self.tokenizer, length, preset.validation_texts, **shared)
        return samples

    def rehearse(self, test_lengths: Sequence[int]) -> None:
        """Draft one sample of every task and length, without the model; raises ValueError for a length that leaves no room."""
        preset = self.preset
        asked, words = Questions(min(preset.needles_per_text, preset.validation_questions)), Summaries(answer_tokens=preset.answer_tokens)
        chosen: dict[Task, int] = {
            asked: preset.validation_questions,
            words: preset.validation_summaries,
            PlainText(): preset.validation_texts,
        }
        tested: dict[Task, int] = {Questions(preset.needles_per_text): preset.needles, Lines(): preset.lines, words: preset.own_answers}
        tested[PlainText()] = preset.documents
        plans: tuple[tuple[Split, dict[Task, int], Sequence[int]], ...] = (
            ("validation", chosen, self._validated), ("test", tested, test_lengths),
        )  # fmt: skip
        for split, counts, lengths in plans:
            wanted = [(task, length) for length in lengths for task, count in counts.items() if count]
            rehearse(self.tokenizer, self.documents[split], split, wanted)

    def validated_counts(self) -> dict[int, tuple[int, int]]:
        """By validated length: all samples, and those that the dense model writes."""
        preset = self.preset
        every = preset.validation_questions // max(1, min(preset.needles_per_text, preset.validation_questions))
        every += preset.validation_summaries + preset.validation_texts
        return dict.fromkeys(self._validated, (every, preset.validation_summaries))

    def tested_counts(self, lengths: Sequence[int]) -> dict[int, tuple[int, int]]:
        """By tested length: all samples, and those that the dense model writes."""
        preset = self.preset
        every = preset.needles // preset.needles_per_text + preset.lines + preset.documents + preset.own_answers
        return dict.fromkeys(lengths, (every, preset.own_answers))

    @property
    def _validated(self) -> list[int]:
        beyond = validation_length(self.lengths, geometry_of(self.model).max_length, self.used)
        return sorted({beyond, *(self.lengths if self.preset.validate_profiled else ())})

    def test(self, length: int, tasks: Sequence[str] | None = None) -> list[list[Sample]]:
        """Test samples of one length, a list for each task that the preset asks for: needles, lines, documents, and summaries, which
        are the dense model's own answers. tasks: some of these."""
        makers = self._makers(length)
        for task in makers:
            if (task, length) not in self._tested and (tasks is None or task in tasks):
                self._tested[task, length] = makers[task]()
        return [self._tested[task, length] for task in makers if tasks is None or task in tasks]

    def _makers(self, length: int) -> dict[str, Callable[[], list[Sample]]]:
        preset, seed = self.preset, self.seeds["test"]
        shared: dict[str, Any] = {"seed": seed, "documents": self.documents["test"]}
        makers: dict[str, tuple[int, Callable[[], list[Sample]]]] = {
            "needles": (preset.needles, lambda: needle_samples(
                self.tokenizer, length, preset.needles, per_sample=preset.needles_per_text, **shared
            )),
            "lines": (preset.lines, lambda: line_samples(self.tokenizer, length, preset.lines, seed=seed)),
            "documents": (preset.documents, lambda: document_samples(self.tokenizer, length, preset.documents, **shared)),
            "summaries": (preset.own_answers, lambda: self._own_answers(length, preset.own_answers, "test", "evaluate")),
        }  # fmt: skip
        return {task: make for task, (count, make) in makers.items() if count}

    def _own_answers(self, length: int, count: int, split: Split, stage: str) -> list[Sample]:
        return own_answer_samples(
            self.model, self.tokenizer, length, count, split=split, seed=self.seeds[split], answer_tokens=self.preset.answer_tokens,
            documents=self.documents[split], batch_size=self.answer_batch, parts_dir=self.answers_dir, told=self._told,
            progress=lambda done, total: self.progress(f"{stage}: own answers", done, total),
        )  # fmt: skip

    def _told(self, sample: Sample, scores: list[AnswerScore]) -> None:
        # Written by the dense model, so that it need not score them once more.
        if processes.is_first():
            self.scores.put(dense_plan(geometry_of(self.model)), sample, scores)
