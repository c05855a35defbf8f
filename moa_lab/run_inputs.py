"""Inputs of a run: folder and settings, model, lengths, documents, validation and test samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moa_lab import processes
from moa_lab.calibration.dataset import Request, requests
from moa_lab.calibration.documents import SPLITS, Document, Split, split_documents
from moa_lab.calibration.origin import check_folder
from moa_lab.calibration.rehearsal import rehearse
from moa_lab.calibration.sources import named_documents
from moa_lab.calibration.tasks import answered_documents
from moa_lab.calibration.wordings import LESSONS
from moa_lab.engines import EngineLimits, engine_of
from moa_lab.evaluate.store import ScoreStore
from moa_lab.evaluate.suites import Suites
from moa_lab.geometry import ModelGeometry
from moa_lab.models import geometry_of, load_model, weights_fingerprint
from moa_lab.plan import WHOLE_BITS, Bits, read_mixes, share_bought
from moa_lab.presets import PRESETS, QUESTIONS_PER_LESSON, Preset, RunSettings
from moa_lab.prompting.rendering import check_turns
from moa_lab.run_folder import RunFolder
from moa_lab.search.problem import InfeasibleError, check_floor, least_density, limits_of

ANSWER_BATCH = 32
"""Samples that a GPU answers at once: a step takes nearly as long for one."""

Progress = Callable[[str, int, int], None]
"""Called with (stage, steps done, steps in all)."""


@dataclass
class RunInputs:
    """The inputs that the stages of a run share.

    Raises ValueError when the folder holds a run with other `FIXED` settings and, once the model is loaded, one of other weights or
    another tokenizer.
    """

    folder: Path
    settings: RunSettings
    progress: Progress = field(default=lambda stage, done, total: None)
    records: RunFolder = field(init=False)

    def __post_init__(self) -> None:
        self.records = RunFolder(self.folder, self.settings)

    def begin(self) -> None:
        """Check documents, lengths, chat template, model and samples, then write the settings: the folder now belongs to this run."""
        self._check_documents()
        self._check_lengths()
        check_turns(self.tokenizer, self.preset.turns)
        check_folder(self.folder, *self._loaded)
        self._rehearse()
        processes.from_first(self.records.begin)

    @property
    def mixes(self) -> tuple[Bits, ...]:
        """The bits in which K and V may be stored, the most first."""
        return read_mixes(self.settings.bits)

    @property
    def rounding(self) -> bool:
        """Whether heads are profiled by what rounding costs each: of several mixes of bits, each head may have its own."""
        return len(self.mixes) > 1

    @property
    def limits(self) -> dict[int, float]:
        """The density by length at which it limits plans: `use_lengths`, those shorter than the profiled ones where the floor takes
        at most a quarter of the density."""
        density, floor = self.settings.density, self.settings.min_span
        return {
            n: density for n in self.use_lengths
            if n >= min(self.lengths) or least_density(self.geometry, n, floor, self.engine) <= density / 4
        }  # fmt: skip

    @property
    def use_lengths(self) -> tuple[int, ...]:
        """Where the plan will be used: the profiled and the tested lengths, and those that the user names, else twice the longest
        profiled one."""
        asked = self.settings.use_lengths or limits_of(self.lengths, self.geometry.max_length)
        return tuple(sorted({*self.lengths, *self.test_lengths, *asked}))

    def check_density(self, *, tested: bool = True) -> None:
        """Raise InfeasibleError where the floor alone exceeds the density, at a length of `limits` or a tested one that the user named."""
        asked = (*(self.settings.use_lengths or ()), *(self.settings.test_lengths or self.settings.lengths or ())) if tested else ()
        targets = {**self.limits, **dict.fromkeys(asked, self.settings.density)}
        # The last mix, of the fewest bits, buys the most tokens.
        check_floor(self.geometry, targets, self.settings.min_span, self.settings.sink_tokens, self.mixes[-1], self.engine)

    @property
    def engine(self) -> EngineLimits | None:
        """The limits that plans are searched for."""
        return None if self.settings.engine is None else engine_of(self.settings.engine)

    @property
    def mixes_short_of_dense(self) -> tuple[Bits, ...]:
        """The mixes of fewer than 16 bits in which the density does not hold all tokens."""
        density, geometry = self.settings.density, self.geometry
        return tuple(mix for mix in self.mixes if mix != WHOLE_BITS and share_bought(density, mix, geometry) < 1)

    def holds_floor(self, mix: Bits) -> bool:
        """Whether the density, at every length of `limits`, holds all heads at the floor when they are stored in `mix`."""
        try:
            check_floor(self.geometry, self.limits, self.settings.min_span, self.settings.sink_tokens, mix)
        except InfeasibleError:
            return False
        return True

    @cached_property
    def _loaded(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        self.progress("load model", 0, 1)
        # What is fetched or unpacked once is there for the others.
        loaded = processes.first_then_others(lambda: load_model(self.settings.model, plain_prompts=self.settings.plain_prompts))
        self.progress("load model", 1, 1)
        check_folder(self.folder, *loaded)
        return loaded

    @property
    def model(self) -> PreTrainedModel:
        """The dense model."""
        return self._loaded[0]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer."""
        return self._loaded[1]

    @property
    def geometry(self) -> ModelGeometry:
        """Its geometry."""
        return geometry_of(self.model)

    @property
    def preset(self) -> Preset:
        """The sizes of this run."""
        return PRESETS[self.settings.preset]

    @property
    def lengths(self) -> tuple[int, ...]:
        """The profiled lengths: the user's, or those of the preset that the model reaches."""
        return self._chosen_lengths(self.settings.lengths, self.preset.lengths)

    @property
    def test_lengths(self) -> tuple[int, ...]:
        """The tested lengths; the user's profiled lengths where only those were given."""
        asked = self.settings.test_lengths or self.settings.lengths
        return self._chosen_lengths(asked, self.preset.test_lengths)

    @cached_property
    def documents(self) -> dict[Split, Sequence[Document] | None]:
        """Documents per split: None means the embedded ones."""
        loaded = named_documents(self.settings.source, self.settings.columns, self.settings.seed)
        if loaded is None:
            return dict.fromkeys(SPLITS)
        return dict(split_documents(loaded, self.settings.seed))

    @cached_property
    def suites(self) -> Suites:
        """Validation and test samples."""
        seeds: dict[Split, int] = {"validation": self.settings.seed, "test": self.settings.test_seed}
        return Suites(
            self.model, self.tokenizer, self.preset, self.lengths, self.documents, seeds, self._validated_beyond,
            answers_dir=self.parts_dir("answers"), answer_batch=self.answer_batch, progress=self.progress, scores=self.score_store,
        )  # fmt: skip

    @property
    def answer_batch(self) -> int:
        """Samples that the model answers at once."""
        return 1 if self.model.device.type == "cpu" else ANSWER_BATCH

    @property
    def score_store(self) -> ScoreStore:
        """Where finished scores are kept."""
        return ScoreStore(self.parts_dir("scores"), weights_fingerprint(self.model))

    def parts_dir(self, name: str) -> Path:
        """Folder for the finished parts of `name`, from which a killed run resumes."""
        return self.folder / "parts" / name

    @property
    def wanted(self) -> tuple[Request, ...]:
        """The samples that heads are profiled on. Raises ValueError for an unknown supervision."""
        preset = self.preset
        return requests(
            self.settings.supervision, questions=preset.questions, per_sample=preset.questions_per_sample, others=preset.summaries,
            texts=preset.texts, answer_tokens=preset.answer_tokens,
        )  # fmt: skip

    @property
    def wanted_lessons(self) -> tuple[Request, ...]:
        """The samples that spans are learned from, of `lesson_lengths`."""
        preset = self.preset
        return requests(
            questions=preset.learning_questions, per_sample=min(QUESTIONS_PER_LESSON, preset.learning_questions),
            others=preset.learning_others, texts=preset.learning_others, answer_tokens=preset.answer_tokens, wordings=LESSONS,
        )  # fmt: skip

    @property
    def lesson_lengths(self) -> list[int]:
        """The profiled lengths, and the tested ones below the longest."""
        return sorted({*self.lengths, *(n for n in self.test_lengths if n < max(self.lengths))})

    @property
    def _validated_beyond(self) -> tuple[int, ...]:
        """Lengths, of which the longest beyond the profiled ones is validated: the user's use lengths, else the tested ones."""
        return self.settings.use_lengths or self.test_lengths

    def _rehearse(self) -> None:
        """Draft one sample of all that this run will need, at every length; raises ValueError where there is no room for it."""
        wanted = [(request.task, n) for request in self.wanted for n in self.lengths if request.count]
        if self.preset.learning_steps:
            wanted += [(request.task, n) for request in self.wanted_lessons for n in self.lesson_lengths if request.count]
        rehearse(self.tokenizer, self.documents["calibration"], "calibration", wanted)
        self.suites.rehearse(self.test_lengths)

    def _steps(self, stage: str) -> Callable[[int, int], None]:
        return lambda done, total: self.progress(stage, done, total)

    def _chosen_lengths(self, asked: tuple[int, ...] | None, usual: tuple[int, ...]) -> tuple[int, ...]:
        if asked:
            return tuple(sorted(set(asked)))
        reached = tuple(n for n in usual if n <= self.geometry.max_length)
        if not reached:
            raise ValueError(f"the model's maximum length is {self.geometry.max_length}; name shorter lengths than the preset's {usual}")
        return reached

    def _check_documents(self) -> None:
        # Checked before the model is loaded, which takes longer.
        documents = self.documents["calibration"]
        if self.settings.supervision == "human":
            answered_documents(documents or ())

    def _check_lengths(self) -> None:
        for n in (*self.lengths, *self.test_lengths, *(self.settings.use_lengths or ())):
            self.geometry.check_length(n)
