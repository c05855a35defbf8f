"""How long a run will take: what each kind of pass takes here, times how many passes the settings ask for."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from moa_lab import processes
from moa_lab.calibration.samples import Sample
from moa_lab.calibration.tasks import Questions
from moa_lab.learning.batches import BATCH_TOKENS
from moa_lab.learning.descent import FLOOR_SHARES
from moa_lab.pace import Pace
from moa_lab.plan import share_bought
from moa_lab.profiling.estimate import estimate_cost
from moa_lab.refinement import MOVES
from moa_lab.run_inputs import RunInputs

logger = logging.getLogger(__name__)

SIMPLE_PLANS = 2
"""Plans of `search.plain` beyond those that a preset counts as candidates, about."""
LEARNED_PLANS = 2 * (1 + len(FLOOR_SHARES))
"""Of two descents."""
LEARNED_STEPS = 1.5
"""Steps of both descents in those of the first: the one that puts words first takes half as many."""
CLIMBS = 3
"""Steps of a round of refinement until no neighbour is better, about."""
LAST_RECORD = {
    "calibrate": "samples.safetensors", "profile": "profile.safetensors", "search": "front-search.json", "lessons": "lessons.safetensors",
    "learn": "front-learned-words.json", "refine": "front.json", "validate": "plan.json", "evaluate": "measurements.json",
}  # fmt: skip
"""What each stage leaves when it is done."""
STAGE_OF = {record: stage for stage, record in LAST_RECORD.items()} | {"front-learned.json": "learn", "draft.json": "validate"}
WITHOUT = {"front.json": ("search", "lessons", "learn", "refine"), "front-learned-words.json": ("lessons",)}
"""Stages that nothing asks for where a record made from theirs is there."""
LIMITED = {"search"}
"""Stages that are foretold by what they may take at most, which says nothing of the pace of passes."""
SURE_S = 20.0
"""Stages that took less together say nothing of those to come."""


@dataclass
class Forecast:
    """Seconds of every stage of a run, as foretold and, of those that ended, as they were; bytes needed beyond the weights, and free.

    resumed: whether an earlier run was stopped in the first of these stages, which then takes less than foretold.
    """

    foretold: dict[str, float]
    needed_bytes: int
    free_bytes: int
    taken: dict[str, float] = field(default_factory=dict)
    resumed: bool = False
    _under_way: list[str] = field(default_factory=list)
    _done: set[str] = field(default_factory=set)
    _since: float = 0.0

    @classmethod
    def of(cls, run: RunInputs) -> Forecast:
        """Of the stages of a run whose records are missing."""
        preset, model, longest = run.preset, run.model, max(run.lengths)
        cost = estimate_cost(model, [Sample("probe", np.zeros(longest, np.int64), ((longest - 1, longest),))])
        samples = {n: sum(request.count for request in run.wanted) for n in run.lengths}
        many = len(run.mixes)
        # Spans are learned in one of the mixes; where fewer bits hold all tokens, nothing is.
        descents = int(share_bought(run.settings.density, run.mixes[0], run.geometry) < 1)
        learned = descents * LEARNED_PLANS * bool(preset.learning_steps)
        measured = preset.candidates + (many + run.rounding) * SIMPLE_PLANS + learned + preset.refine_rounds
        compared = 2 + many + len(run.mixes_short_of_dense) + len(preset.baselines)
        judged = (run.suites.validated_counts(), 1 + measured), (run.suites.tested_counts(run.test_lengths), compared)
        step = BATCH_TOKENS.get(model.device.type, BATCH_TOKENS["cpu"])
        tokens = int(descents * LEARNED_STEPS * preset.learning_steps * step) + sum(
            n * every * plans for counts, plans in judged for n, (every, _) in counts.items()
        )
        pace = Pace.of(model, cost, run.answer_batch, tokens, bool(preset.learning_steps), run.settings.sink_tokens)
        # On a CPU questions are profiled as they are answered.
        joined = model.device.type == "cpu" and not cost.checkpoint
        asked = sum(request.count for request in run.wanted if isinstance(request.task, Questions)) if joined else 0
        foretold = {
            "calibrate": pace.answers(run.wanted, run.lengths, pace.backward if joined else pace.forward) / pace.at_once,
            "profile": sum((count - asked) * pace.backward(n) for n, count in samples.items()) / pace.at_once,
            "search": preset.search_seconds,
        }
        if preset.learning_steps:
            foretold["lessons"] = pace.answers(run.wanted_lessons, run.lesson_lengths, pace.forward) / pace.at_once
            # A length is drawn in proportion to its tokens.
            tasks, drawn = sum(request.count > 0 for request in run.wanted_lessons), np.array(run.lesson_lengths)
            each = [max(step // n, tasks) * pace.drawn(n) for n in run.lesson_lengths]
            foretold["learn"] = descents * LEARNED_STEPS * preset.learning_steps * float(drawn @ each / drawn.sum())
        if preset.refine_rounds:
            heads = min(preset.refine_heads, run.geometry.layers * run.geometry.kv_heads)
            plans = preset.refine_rounds * ((1 + many) * heads + CLIMBS * len(MOVES))
            foretold["refine"] = plans * sum(count * pace.forward(n) for n, count in samples.items()) / pace.at_once
        for stage, counts in zip(("validate", "evaluate"), judged, strict=True):
            foretold[stage] = _judging(pace, *counts, preset.answer_tokens)
        # Samples are shared out among processes; a solver is not.
        foretold = {stage: s / (1 if stage in LIMITED else processes.started()) for stage, s in foretold.items()}
        there = {record for record in (*STAGE_OF, *WITHOUT) if run.records.place(record).exists()}
        unasked = {stage for record, stages in WITHOUT.items() if record in there for stage in stages}
        missing = {stage: s for stage, s in foretold.items() if LAST_RECORD[stage] not in there and stage not in unasked}
        needed = cost.bytes_in_flight * (pace.at_once if joined else 1)
        return cls(missing, needed, cost.free_bytes, resumed=run.parts_dir("").exists())

    @contextlib.contextmanager
    def timing(self, record: str) -> Iterator[None]:
        """Time the making of a record; once a stage is done, tell what it took and how much is left.

        A record that is made on the way to another is timed by itself.
        """
        stage = STAGE_OF.get(record)
        if stage not in self.foretold:
            yield
            return
        self._credit()
        self._under_way.append(stage)
        try:
            yield
        finally:
            self._credit()
            self._under_way.pop()
        if record == LAST_RECORD[stage]:
            self._done.add(stage)
            foretold = minutes(self.foretold[stage])
            logger.info("%s took %s (foretold: %s); about %s left", stage, minutes(self.taken[stage]), foretold, minutes(self.left_s))

    def _credit(self) -> None:
        now = time.perf_counter()
        if self._under_way:
            stage = self._under_way[-1]
            self.taken[stage] = self.taken.get(stage, 0.0) + now - self._since
        self._since = now

    @property
    def left_s(self) -> float:
        """Seconds that the stages to come will take, at the pace of those that ended."""
        stopped_in = set(list(self.foretold)[:1]) if self.resumed else set()
        telling = self._done - LIMITED - stopped_in
        told, took = (sum(times[stage] for stage in telling) for times in (self.foretold, self.taken))
        left = sum(max(s - self.taken.get(stage, 0.0), 0.0) for stage, s in self.foretold.items() if stage not in self._done)
        return left * (took / told if min(told, took) > SURE_S else 1.0)

    def __str__(self) -> str:
        stages = ", ".join(f"{stage} {minutes(seconds)}" for stage, seconds in self.foretold.items())
        memory = f"at most {self.needed_bytes / 2**30:.1f} GiB beyond the weights ({self.free_bytes / 2**30:.1f} GiB free)"
        return f"about {minutes(sum(self.foretold.values()))} in all ({stages}), {memory}"


def minutes(seconds: float) -> str:
    """Seconds in words: 45 s, 8 min, 1 h 20 min."""
    whole = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{whole} min" if whole < 90 else f"{whole // 60} h {whole % 60} min"


def _judging(pace: Pace, counts: dict[int, tuple[int, int]], plans: int, answer_tokens: int) -> float:
    """Samples under `plans` plans, the dense one first. counts: by length, of all samples, and of those that the dense model writes."""
    seconds = 0.0
    for n, (every, own) in counts.items():
        seconds += (every * plans) * pace.forward(n) + own * answer_tokens * pace.token
    return seconds / pace.at_once
