"""All stages in order, one folder per run: every stage leaves a record, and a run that was killed goes on where it was."""

from __future__ import annotations

import logging
import platform
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moa_lab.calibration import SampleSet, calibrate, requests
from moa_lab.calibration.documents import SPLITS, Document, Split, split_documents
from moa_lab.calibration.sources import ColumnMap, load_documents
from moa_lab.calibration.wordings import LESSONS
from moa_lab.evaluate.memory import memory_row
from moa_lab.evaluate.scoring import score_rows, score_samples
from moa_lab.evaluate.store import ScoreStore
from moa_lab.evaluate.suites import Suites
from moa_lab.evaluate.summary import summarise
from moa_lab.evaluate.validate import Validation, choose
from moa_lab.geometry import ModelGeometry
from moa_lab.learning import learn_spans
from moa_lab.models import geometry_of, load_model, model_name, tokenizer_fingerprint, weights_fingerprint
from moa_lab.plan import MIN_SPAN, Plan, dense_plan, uniform_plan
from moa_lab.presets import PRESETS, SETTINGS_SCHEMA, Preset, RunSettings
from moa_lab.profiling import profile
from moa_lab.provenance import Provenance, provenance
from moa_lab.records import Front, InfluenceProfile, LossTable, Measurement, Measurements
from moa_lab.refinement import refine
from moa_lab.report import save_report
from moa_lab.search import baseline_plan, limit_lengths, loss_table, search
from moa_lab.storage import RecordError, parse, read_json, to_json, write_json

Record = TypeVar("Record", SampleSet, InfluenceProfile, LossTable, Front, Plan, Measurements)

logger = logging.getLogger(__name__)

ANSWER_BATCH = 32
"""Samples that a GPU answers at once: a step costs nearly the same for one."""
SCREEN_TOKENS = 131_072
"""Calibration tokens that many plans are measured on."""
QUESTIONS_PER_LESSON = 2
"""Facts asked in one text that is learned from: more slopes for the same tokens, but only the first question is asked as in a test."""

Progress = Callable[[str, int, int], None]
"""Called with (stage, steps done, steps in all)."""


@dataclass
class Run:
    """A run in `folder`. Stages are methods; each reads its record where it is intact and makes it where it is not.

    parts: where finished pieces of stages are kept; None for a folder inside. Raises ValueError when the folder belongs to a run with
    other settings.
    """

    folder: Path
    settings: RunSettings
    progress: Progress = field(default=lambda stage, done, total: None)
    parts: Path | None = None

    def __post_init__(self) -> None:
        path = self.folder / "settings.json"
        if path.exists():
            stored = {name: value for name, value in read_json(path, SETTINGS_SCHEMA).items() if name != "schema"}
            before = parse(RunSettings, stored, path)
            changed = [name for name, value in vars(self.settings).items() if value != getattr(before, name)]
            if changed:
                name = changed[0]
                raise ValueError(
                    f"{self.folder} holds a run with another {name} ({getattr(before, name)}, now {getattr(self.settings, name)}); "
                    "choose another folder, or delete this one"
                )

    def everything(self) -> dict[str, Any]:
        """Run all stages and return the summary."""
        self.begin()
        self.samples()
        self.profile()
        self.table()
        self.front()
        self.plan()
        self.measurements()
        return self.report()

    def begin(self) -> None:
        """Check the lengths and note the settings: from now on the folder is this run's."""
        self._check_lengths()
        write_json(self.folder / "settings.json", {"schema": SETTINGS_SCHEMA, **to_json(self.settings)})

    def at(self, density: float) -> Run:
        """The same run at another density, in a folder inside: what does not depend on the density is made once, here."""
        other = Run(self.folder / f"density-{density:g}", replace(self.settings, density=density), self.progress, parts=self.parts_dir(""))
        other.folder.mkdir(parents=True, exist_ok=True)
        shared: list[tuple[Callable[[], object], str]] = [(self.samples, "samples"), (self.profile, "profile"), (self.table, "table")]
        if self.preset.learning_steps:
            shared.append((self.lessons, "lessons"))
        for record, name in shared:
            record()
            shutil.copyfile(self.folder / f"{name}.safetensors", other.folder / f"{name}.safetensors")
        other.__dict__.update(_loaded=self._loaded, documents=self.documents, suites=self.suites)
        other.begin()
        return other

    @cached_property
    def _loaded(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        self.progress("load model", 0, 1)
        loaded = load_model(self.settings.model)
        self.progress("load model", 1, 1)
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

    @property
    def limits(self) -> dict[int, float]:
        """The lengths at which plans keep to the density: the profiled ones, twice the longest, and shorter tested ones where the
        floor takes at most a quarter of it."""
        density = self.settings.density
        short = {n for n in self.test_lengths if n < min(self.lengths) and MIN_SPAN / n <= density / 4}
        return dict.fromkeys(sorted({*limit_lengths(self.table()), *short}), density)

    @cached_property
    def documents(self) -> dict[Split, Sequence[Document] | None]:
        """Documents per split: None means the embedded ones."""
        if self.settings.source is None:
            return dict.fromkeys(SPLITS)
        columns = ColumnMap.parse(self.settings.columns) if self.settings.columns else None
        loaded = load_documents(self.settings.source, columns=columns, seed=self.settings.seed)
        return dict(split_documents(loaded, self.settings.seed))

    @cached_property
    def suites(self) -> Suites:
        """What plans are chosen by and tested on."""
        return Suites(
            self.model, self.tokenizer, self.preset, self.lengths, self.documents, self.settings.seed,
            answers_dir=self.parts_dir("answers"), answer_batch=self.answer_batch, progress=self.progress,
        )  # fmt: skip

    def samples(self) -> SampleSet:
        """Stage calibrate."""
        preset = self.preset
        wanted = requests(
            self.settings.supervision,
            questions=preset.questions,
            per_sample=preset.questions_per_sample,
            others=preset.summaries,
            texts=preset.texts,
            answer_tokens=preset.answer_tokens,
        )
        return _stored(
            self.folder / "samples.safetensors", SampleSet.load,
            lambda: calibrate(
                self.model, self.tokenizer, self.lengths, wanted=wanted, documents=self.documents["calibration"],
                seed=self.settings.seed, batch_size=self.answer_batch, parts_dir=self.parts_dir("answers"),
                progress=self._steps("calibrate"),
            ),
        )  # fmt: skip

    def lessons(self) -> SampleSet:
        """Samples that spans are learned from: more than are profiled, in more wordings, and at the shorter tested lengths too."""
        preset = self.preset
        wanted = requests(
            questions=preset.learning_questions, per_sample=min(QUESTIONS_PER_LESSON, preset.learning_questions),
            others=preset.learning_others, texts=preset.learning_others, answer_tokens=preset.answer_tokens, wordings=LESSONS,
        )  # fmt: skip
        return _stored(
            self.folder / "lessons.safetensors", SampleSet.load,
            lambda: calibrate(
                self.model, self.tokenizer, sorted({*self.lengths, *(n for n in self.test_lengths if n < max(self.lengths))}),
                wanted=wanted, documents=self.documents["calibration"], seed=self.settings.seed, batch_size=self.answer_batch,
                parts_dir=self.parts_dir("answers"), progress=self._steps("lessons"),
            ),
        )  # fmt: skip

    def profile(self) -> InfluenceProfile:
        """Stage profile."""
        return _stored(
            self.folder / "profile.safetensors", InfluenceProfile.load,
            lambda: profile(self.model, self.samples(), parts_dir=self.parts_dir("profile"), progress=self._steps("profile")),
        )  # fmt: skip

    def table(self) -> LossTable:
        """The loss table of the profile."""
        return _stored(self.folder / "table.safetensors", LossTable.load, lambda: loss_table(self.profile()))

    def front(self) -> Front:
        """Stages search and refine: candidates from the dense profile, and better plans near the best of them."""
        return _stored(self.folder / "front.json", Front.load, self._searched)

    def plan(self) -> Plan:
        """Stage validate: the plan that lost least when measured."""
        return _stored(self.folder / "plan.json", Plan.load, self._validated)

    def baselines(self) -> tuple[Plan, ...]:
        """Dense, uniform at the same density, and the preset's other baselines."""
        lengths = (*self.test_lengths,)
        plans = [dense_plan(self.geometry, lengths), uniform_plan(self.geometry, self.settings.density, lengths)]
        for name in self.preset.baselines:
            made = _stored(
                self.folder / f"baseline-{name}.json", Plan.load,
                partial(baseline_plan, name, self.profile(), self.settings.density),
            )  # fmt: skip
            plans.append(replace(made, lengths=lengths))
        return tuple(plans)

    def measurements(self) -> Measurements:
        """Stage evaluate: the chosen plan and the baselines on test samples that nothing was chosen by."""
        return _stored(self.folder / "measurements.json", Measurements.load, self._measured)

    def measure(
        self, plans: Sequence[Plan], *, lengths: Sequence[int] | None = None, tasks: Sequence[str] | None = None
    ) -> list[Measurement]:
        """Scores of `plans` on the test samples, nothing scored twice in this run. None: every tested length, every task."""
        rows: list[Measurement] = []
        sets = [samples for n in lengths or self.test_lengths for samples in self.suites.test(n, tasks)]
        total = sum(map(len, sets)) * len(plans)
        done = 0
        for plan in plans:
            for samples in sets:
                scores = score_samples(
                    self.model, plan, samples, store=self._store, progress=partial(self._evaluated, before=done, total=total)
                )
                done += len(samples)
                rows += score_rows(plan, samples, scores)
        return rows

    def report(self) -> dict[str, Any]:
        """Write summary.json and report.html; return the summary."""
        plans = (*self.baselines(), self.plan())
        summary = summarise(plans, self.measurements(), max(self.test_lengths))
        write_json(self.folder / "summary.json", summary)
        save_report(
            self.folder / "report.html", self.plan(), self.profile(), self.front(), self.measurements(),
            title=f"Mixture of attention spans: {self.settings.model} at {self.settings.density:.0%}", baselines=self.baselines(),
        )  # fmt: skip
        return summary

    def _searched(self) -> Front:
        front = _stored(self.folder / "front-search.json", Front.load, self._search)
        if self.preset.learning_steps:
            learned = self.learned()
            front = replace(front, points=(*front.points, *learned), settings={**front.settings, "learning": learned.settings})
        if not self.preset.refine_rounds:
            return front
        draft = _stored(self.folder / "draft.json", Plan.load, lambda: self.validation(front, "draft").best)
        refined = refine(
            self.model, draft, self.samples(), self.table(), self.limits, rounds=self.preset.refine_rounds,
            heads=self.preset.refine_heads, max_rules_per_layer=self.settings.max_rules_per_layer, parts_dir=self.parts_dir("refine"),
            progress=self._steps("refine"),
        )  # fmt: skip
        return replace(front, points=(*front.points, *refined), settings={**front.settings, "refine_rounds": self.preset.refine_rounds})

    def _search(self) -> Front:
        return search(
            self.profile(), self.limits, max_rules_per_layer=self.settings.max_rules_per_layer, seed=self.settings.seed,
            time_limit_s=self.preset.search_seconds, max_points=self.preset.candidates,
            progress=lambda done, total, message: self.progress("search", done, total),
        )  # fmt: skip

    def learned(self) -> Front:
        """Stage learn: the plan that a descent ends at."""
        return _stored(
            self.folder / "front-learned.json", Front.load,
            lambda: learn_spans(
                self.model, self.lessons(), self.table(), self.limits, steps=self.preset.learning_steps,
                max_rules_per_layer=self.settings.max_rules_per_layer, seed=self.settings.seed, progress=self._steps("learn"),
            ),
        )  # fmt: skip

    def validation(self, front: Front, name: str) -> Validation:
        """Measure every plan of `front` on validation samples; the best is called `name`."""
        return choose(self.model, front, self.suites.validation, name=name, store=self._store, progress=self._steps(f"validate {name}"))

    def _validated(self) -> Plan:
        found = self.validation(self.front(), "moa")
        origin = self.origin()
        replace(found.measurements, provenance=origin).save(self.folder / "validation.json")
        return replace(found.best, provenance=origin, lengths=tuple(sorted({*self.lengths, *self.test_lengths})))

    def _measured(self) -> Measurements:
        plans = (*self.baselines(), self.plan())
        rows = self.measure(plans)
        rows += [memory_row(plan, length, self.model.device) for plan in plans for length in self.test_lengths]
        return Measurements(tuple(rows), {"run": to_json(self.settings)}, self.origin())

    def _evaluated(self, finished: int, _: int, *, before: int, total: int) -> None:
        self.progress("evaluate", before + finished, total)

    def _chosen_lengths(self, asked: tuple[int, ...] | None, usual: tuple[int, ...]) -> tuple[int, ...]:
        if asked:
            return tuple(sorted(set(asked)))
        reached = tuple(n for n in usual if n <= self.geometry.max_length)
        if not reached:
            raise ValueError(f"the model's maximum length is {self.geometry.max_length}; name shorter lengths than the preset's {usual}")
        return reached

    def _check_lengths(self) -> None:
        for n in (*self.lengths, *self.test_lengths):
            if not 1 <= n <= self.geometry.max_length:
                raise ValueError(f"length {n} is beyond the model's maximum of {self.geometry.max_length} tokens")

    def origin(self) -> Provenance:
        """Where this run's numbers come from."""
        model = self.model
        return provenance(
            model=model_name(model), weights=weights_fingerprint(model), tokenizer=tokenizer_fingerprint(self.tokenizer),
            calibration=self.samples().identity, seed=self.settings.seed, device=_device(model),
        )  # fmt: skip

    @property
    def answer_batch(self) -> int:
        """Samples that the model answers at once."""
        return 1 if self.model.device.type == "cpu" else ANSWER_BATCH

    @property
    def _store(self) -> ScoreStore:
        return ScoreStore(self.parts_dir("scores"), weights_fingerprint(self.model))

    def parts_dir(self, name: str) -> Path:
        """Where finished pieces of that name are kept."""
        return (self.parts or self.folder / "parts") / name

    def _steps(self, stage: str) -> Callable[[int, int], None]:
        return lambda done, total: self.progress(stage, done, total)


def _stored(path: Path, load: Callable[[Path], Record], make: Callable[[], Record]) -> Record:
    """The record at `path`, made and saved first where it is missing or broken."""
    if path.exists():
        try:
            return load(path)
        except RecordError as error:
            logger.warning("%s; making it again", error)
    record = make()
    record.save(path)
    return load(path)


def _device(model: PreTrainedModel) -> str:
    return torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else f"{platform.machine()} CPU"
