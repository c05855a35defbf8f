"""All stages in order, one folder per run: every stage saves a record, and a killed run resumes."""

from __future__ import annotations

import contextlib
import logging
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from moa_lab import processes
from moa_lab.calibration import SampleSet, calibrate
from moa_lab.calibration.dataset import Request
from moa_lab.evaluate.memory import memory_row
from moa_lab.evaluate.scoring import score_plans, score_rows
from moa_lab.evaluate.summary import summarise
from moa_lab.evaluate.validate import Validation, choose
from moa_lab.forecast import Forecast
from moa_lab.learning import learn_spans
from moa_lab.models import model_name, tokenizer_fingerprint, weights_fingerprint
from moa_lab.plan import (
    WHOLE_BITS,
    Bits,
    Plan,
    dense_plan,
    mix_of,
    mixed_name,
    mixes_of,
    share_bought,
    stored_plan,
    told_bits,
    uniform_plan,
)
from moa_lab.profiling import profile, profiling_examiner
from moa_lab.provenance import Provenance, provenance
from moa_lab.records import Front, InfluenceProfile, LossTable, Measurement, Measurements, candidates
from moa_lab.records.keeping import kept_or_made
from moa_lab.refinement import refine
from moa_lab.report import save_report
from moa_lab.run_inputs import RunInputs
from moa_lab.search import baseline_plan, loss_table, search
from moa_lab.search.mixes import bits_table
from moa_lab.search.problem import judged_lengths
from moa_lab.storage import RecordError, to_json, write_json
from moa_lab.text import once

Record = TypeVar("Record", SampleSet, InfluenceProfile, LossTable, Front, Plan, Measurements)

logger = logging.getLogger(__name__)

QUESTIONS_FIRST = {"questions": 3.0}
"""Task weights of the first descent: questions weigh more, as an answer is right or wrong as a whole."""
WORDS_FIRST = {"summaries": 2.0, "text": 3.0}
"""Task weights of a second descent, for a lower loss on text; validation chooses. Its answers have more tokens, so that half the steps
are enough."""


class Run(RunInputs):
    """A run in `folder`. Stages are methods; each loads its record if it is intact, else makes and saves it."""

    _forecast: Forecast | None = None

    def everything(self) -> dict[str, Any]:
        """Run all stages and return the summary. Raises ValueError for unusable settings before the first stage."""
        self._check_documents()
        self._check_lengths()
        self.check_density()
        self.begin()
        self._forecast = processes.from_first(self._foretold)
        if self._forecast:
            logger.info("%s", self._forecast)
        self.samples()
        self.profile()
        self.table()
        self.front()
        self.plan()
        self.measurements()
        return self.report()

    def _foretold(self) -> Forecast | None:
        return None if self.records.place("measurements.json").exists() else Forecast.of(self)

    def at(self, density: float) -> Run:
        """The same run at another density, sharing all that does not depend on it. Raises InfeasibleError as `check_density` does."""
        other = Run(self.folder, replace(self.settings, density=density), self.progress)
        other.__dict__.update(_loaded=self._loaded, documents=self.documents, suites=self.suites)
        other.check_density(tested=False)
        return other

    def samples(self) -> SampleSet:
        """Stage calibrate. On a CPU questions are profiled as they are answered."""
        return self._calibrated("samples", "calibrate", self.lengths, self.wanted, profiled=True)

    def lessons(self) -> SampleSet:
        """Samples that spans are learned from: more than those profiled, in other wordings, and at the shorter tested lengths too.

        The profiled ones where the preset learns nothing.
        """
        if not self.preset.learning_steps:
            return self.samples()
        return self._calibrated("lessons", "lessons", self.lesson_lengths, self.wanted_lessons)

    def _calibrated(self, name: str, stage: str, lengths: Sequence[int], wanted: Sequence[Request], profiled: bool = False) -> SampleSet:
        return self._stored(
            f"{name}.safetensors", SampleSet.load,
            lambda: calibrate(
                self.model, self.tokenizer, lengths, wanted=wanted, documents=self.documents["calibration"], seed=self.settings.seed,
                batch_size=self.answer_batch, parts_dir=self.parts_dir("answers"), progress=self._steps(stage),
                examiner=profiling_examiner(
                    self.model, lengths, self.parts_dir("profile"), sink_tokens=self.settings.sink_tokens, rounding=self.rounding
                ) if profiled else None,
            ),
        )  # fmt: skip

    def profile(self) -> InfluenceProfile:
        """Stage profile."""
        return self._stored(
            "profile.safetensors", InfluenceProfile.load,
            lambda: profile(
                self.model, self.samples(), sink_tokens=self.settings.sink_tokens, parts_dir=self.parts_dir("profile"),
                rounding=self.rounding, progress=self._steps("profile"),
            ),
        )  # fmt: skip

    def table(self) -> LossTable:
        """The loss table of the profile."""
        used = judged_lengths(self.use_lengths, self.lengths)
        return self._stored(
            "table.safetensors", LossTable.load,
            lambda: loss_table(self.profile(), min_span=self.settings.min_span, use_lengths=used), by_first=True,
        )  # fmt: skip

    def front(self) -> Front:
        """Stages search and refine: candidates from the dense profile, and better plans near the best of them."""
        return self._stored("front.json", Front.load, self._searched)

    def plan(self) -> Plan:
        """Stage validate: the candidate with the lowest measured loss."""
        return self._stored("plan.json", Plan.load, self._validated)

    def baselines(self) -> tuple[Plan, ...]:
        """Dense and uniform at the same density, in 16 bits and in every mix, and the preset's other baselines, which store 16 bits.

        Left out is what the floor alone puts above the density, and dense spans where the density holds them in that mix: they are uniform.
        """
        lengths = (*self.test_lengths,)
        density, floor, sink = self.settings.density, self.settings.min_span, self.settings.sink_tokens
        uniform = partial(uniform_plan, self.geometry, lengths=lengths, min_span=floor, sink_tokens=sink)
        dense = dense_plan(self.geometry, lengths)
        plans = [dense, *(stored_plan(dense, mix) for mix in self.mixes_short_of_dense)]
        for mix in filter(self.holds_floor, dict.fromkeys((WHOLE_BITS, *self.mixes))):
            plans.append(stored_plan(uniform(share_bought(density, mix, self.geometry)), mix))
        for name in self.preset.baselines if self.holds_floor(WHOLE_BITS) else ():
            made = self._stored(f"baseline-{name}.json", Plan.load, partial(self._baseline, name), by_first=True)
            plans.append(replace(made, lengths=lengths))
        return tuple(plans)

    def _baseline(self, name: str) -> Plan:
        return baseline_plan(name, self.profile(), self.limits, min_span=self.settings.min_span)

    def measurements(self) -> Measurements:
        """Stage evaluate: the chosen plan and the baselines on test samples, which no choice has used."""
        return self._stored("measurements.json", Measurements.load, self._measured)

    def measure(
        self, plans: Sequence[Plan], *, lengths: Sequence[int] | None = None, tasks: Sequence[str] | None = None
    ) -> list[Measurement]:
        """Scores of `plans` on the test samples, nothing scored twice in this run. None: every tested length, every task."""
        sets = [samples for n in once(lengths or self.test_lengths, "lengths") for samples in self.suites.test(n, tasks)]
        total = sum(map(len, sets)) * len(plans)
        done = 0
        scores = []
        for samples in sets:
            found = partial(self._evaluated, before=done, total=total)
            scores.append(score_plans(self.model, plans, samples, store=self.score_store, progress=found))
            done += len(samples) * len(plans)
        return [
            row
            for at, plan in enumerate(plans)
            for samples, under in zip(sets, scores, strict=True)
            for row in score_rows(plan, samples, under[at])
        ]

    def report(self) -> dict[str, Any]:
        """Write summary.json and report.html; return the summary."""
        plans, measured = (*self.baselines(), self.plan()), self.measurements()
        return processes.from_first(lambda: self._reported(plans, measured))

    def _reported(self, plans: Sequence[Plan], measured: Measurements) -> dict[str, Any]:
        *baselines, plan = plans
        summary = summarise(plans, measured, max(self.test_lengths), self.settings.density)
        write_json(self.records.place("summary.json"), summary)
        save_report(
            self.records.place("report.html"), plan, self.profile(), self.front(), measured,
            title=f"Mixture of attention spans: {self.settings.model} at {self.settings.density:.0%}", baselines=baselines,
            density=self.settings.density, validation=self._validations(),
        )  # fmt: skip
        for name in ("summary.json", "report.html"):
            self.records.publish(name)
        return summary

    def _searched(self) -> Front:
        front = self._found()
        if self.preset.learning_steps:
            learned = self.learned()
            front = replace(front, points=(*front.points, *learned), settings={**front.settings, "learning": learned.settings})
        if not self.preset.refine_rounds:
            return front
        draft = self._stored("draft.json", Plan.load, lambda: self.validation(front, "draft").best)
        refined = refine(
            self.model, draft, self.samples(), self._table_of_bits(), self.limits, rounds=self.preset.refine_rounds,
            heads=self.preset.refine_heads, max_rules_per_layer=self.settings.max_rules_per_layer, engine=self.settings.engine,
            parts_dir=self.parts_dir("refine"),
            progress=self._steps("refine"),
        )  # fmt: skip
        return replace(front, points=(*front.points, *refined), settings={**front.settings, "refine_rounds": self.preset.refine_rounds})

    def _found(self) -> Front:
        """Stage search alone."""
        return self._stored("front-search.json", Front.load, self._search, by_first=True)

    def _search(self) -> Front:
        return search(
            self.profile(), self.limits, max_rules_per_layer=self.settings.max_rules_per_layer, min_span=self.settings.min_span,
            seed=self.settings.seed, time_limit_s=self.preset.search_seconds, max_points=self.preset.candidates, bits=self.settings.bits,
            engine=self.settings.engine,
            progress=lambda done, total, message: self.progress("search", done, total),
        )  # fmt: skip

    def learned(self) -> Front:
        """Stage learn: the plans of two descents, `QUESTIONS_FIRST` and `WORDS_FIRST`; none where the preset learns nothing."""
        steps = self.preset.learning_steps
        if not steps:
            return Front((), ())
        mix = self._learned_mix()
        asked = self._descended("learned", steps, QUESTIONS_FIRST, mix)
        words = self._descended("learned-words", max(1, steps // 2), WORDS_FIRST, mix)
        return replace(asked, points=(*asked.points, *words.points), settings={"learned": asked.settings, "learned-words": words.settings})

    def _learned_mix(self) -> Bits:
        """The mix to learn in: of several that of the plan which loses least in validation, needles and words alike, before any is learned.

        A descent takes minutes in each, and what the plans lose tells mixes apart sooner than what spans they have. All heads are learned
        in the same one: drawn head by head with the spans (`moa-lab learn --bits`), bits left less to spans in as many steps (see
        `data/studies/LOG.md`).
        """
        if len(self.mixes) == 1:
            return self.mixes[0]
        searched = self._found()
        alike = replace(searched, points=tuple(point for point in searched if len(mixes_of(point.plan)) == 1))
        found = choose(
            self.model, alike, self.suites.validation, name="mix", store=self.score_store, progress=self._steps("validate mixes")
        )
        mix = mix_of(found.best)
        logger.info(
            "learning in %s bits, those of %s, which loses least of what was searched", told_bits(mix), found.best.search["candidate"]
        )
        return mix

    def _descended(self, name: str, steps: int, weights: Mapping[str, float], mix: Bits) -> Front:
        return self._stored(
            f"front-{name}.json", Front.load,
            lambda: learn_spans(
                self.model, self.lessons(), self.table(), self.limits, steps=steps, weights=weights, name=name, bits=told_bits(mix),
                max_rules_per_layer=self.settings.max_rules_per_layer, engine=self.settings.engine, seed=self.settings.seed,
                parts_dir=self.parts_dir("learn"), progress=self._steps(f"learn {mixed_name(name, mix)}"),
            ),
        )  # fmt: skip

    def _table_of_bits(self) -> LossTable:
        """The loss table, with all rules in every mix of bits where there are several."""
        return bits_table(self.profile(), self.table(), self.mixes)

    def validation(self, front: Front, name: str) -> Validation:
        """Measure every plan of `front` on validation samples; the best is called `name`."""
        return choose(
            self.model, front, self.suites.validation, name=name, prefer=self.settings.prefer, store=self.score_store,
            progress=self._steps(f"validate {name}"),
        )  # fmt: skip

    def _validated(self) -> Plan:
        found = self.validation(self.front(), "moa")
        origin = self.origin()
        if processes.is_first():
            replace(found.measurements, provenance=origin).save(self.records.place("validation.json"))
            self.records.publish("validation.json")
        return replace(found.best, provenance=origin, lengths=self.use_lengths)

    def _validations(self) -> Measurements | None:
        """What the plan was chosen by; None where the record, which is made with the plan alone, is not whole."""
        path = self.records.place("validation.json")
        try:
            found = Measurements.load(path)
            candidates(found, path)
        except RecordError as error:
            logger.warning("%s; the report goes without it", error)
            return None
        return found

    def _measured(self) -> Measurements:
        plans = (*self.baselines(), self.plan())
        rows = self.measure(plans)
        rows += [memory_row(plan, length, self.model.device) for plan in plans for length in self.test_lengths]
        return Measurements(tuple(rows), {"run": to_json(self.settings)}, self.origin())

    def _evaluated(self, finished: int, _: int, *, before: int, total: int) -> None:
        self.progress("evaluate", before + finished, total)

    def origin(self) -> Provenance:
        """The provenance of this run's numbers."""
        model = self.model
        return provenance(
            model=model_name(model), weights=weights_fingerprint(model), tokenizer=tokenizer_fingerprint(self.tokenizer),
            calibration=self.samples().identity, seed=self.settings.seed, device=_device(model),
        )  # fmt: skip

    def _stored(self, name: str, load: Callable[[Path], Record], make: Callable[[], Record], *, by_first: bool = False) -> Record:
        """The record `name`, made and saved first where it is missing or broken. by_first: the first process makes it alone."""
        timing = partial(self._forecast.timing, name) if self._forecast else contextlib.nullcontext
        found = kept_or_made(self.records.place(name), load, make, by_first=by_first, timing=timing)
        processes.from_first(lambda: self.records.publish(name))
        return found


def _device(model: PreTrainedModel) -> str:
    return torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else f"{platform.machine()} CPU"
