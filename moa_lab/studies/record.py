"""The record of a study: question, measurements, goals and answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moa_lab.bench.record import Goal
from moa_lab.evaluate.intervals import Interval
from moa_lab.provenance import Provenance
from moa_lab.records import Measurement, Measurements
from moa_lab.storage import end_to_json, parse, read_json, to_json, write_json
from moa_lab.text import aligned, has_interval, interval_text

STUDY_SCHEMA = "moa-lab/study/1"


@dataclass(frozen=True)
class StudyGoal:
    """A number that a study aims at: `value` reaches `goal`, or with `at_most` stays below it.

    low, high: the 95% interval of the value, of n samples, where there is one. A goal inside it is not decided, nor one of a single
    sample.
    """

    name: str
    value: float
    goal: float
    at_most: bool = False
    low: float | None = None
    high: float | None = None
    n: int | None = None
    meets: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "meets", Goal(self.goal, self.at_most).meets(self.value))

    @classmethod
    def of(cls, name: str, found: Interval, goal: float, at_most: bool = False) -> StudyGoal:
        """A goal for a value with its interval."""
        return cls(name, found.value, goal, at_most, end_to_json(found.low), end_to_json(found.high), found.n)

    @property
    def decided(self) -> bool:
        """Whether the whole interval is on one side of the goal; True without an interval, False for one sample."""
        if self.n is not None and self.n < 2:
            return False
        if self.low is None or self.high is None:
            return True
        goal = Goal(self.goal, self.at_most)
        return goal.meets(self.low) == goal.meets(self.high)


@dataclass(frozen=True)
class StudyRecord:
    """One study. question, answer: text; the answer is made from the numbers, negative results included."""

    name: str
    question: str
    answer: str
    rows: tuple[Measurement, ...]
    goals: tuple[StudyGoal, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    provenance: Provenance = field(default_factory=Provenance)

    def select(self, **wanted: Any) -> tuple[Measurement, ...]:
        """Rows whose fields equal `wanted`, for instance `select(plan="moa-25", length=2048)`."""
        return Measurements(self.rows).select(**wanted)

    def mean_score(self, plan: str, task: str, metric: str, lengths: Sequence[int]) -> float:
        """The mean over all samples of `lengths`. Raises ValueError where nothing was measured."""
        rows = [row for row in self.select(plan=plan, task=task, metric=metric) if row.length in lengths]
        if not rows:
            raise ValueError(f"{self.name} measured no {metric} of {plan} on {task} at {', '.join(map(str, lengths))} tokens")
        return float(np.mean([value for row in rows for value in row.detail["per_sample"]]))

    def over_all(self, metric: str, task: str) -> dict[str, Measurement]:
        """Differences over all lengths together, by "PLAN over OTHER"."""
        return {f"{row.plan} over {row.detail['against']}": row for row in self.select(metric=metric, task=task, length=0)}

    def save(self, path: str | Path) -> Path:
        """Write one JSON file."""
        return write_json(path, {"schema": STUDY_SCHEMA, **to_json(self)})

    @classmethod
    def load(cls, path: str | Path) -> StudyRecord:
        """Read a record; raises RecordError for a broken or foreign file."""
        data = {name: value for name, value in read_json(path, STUDY_SCHEMA).items() if name != "schema"}
        # `meets` follows from the numbers; what a file says is ignored.
        goals = data.get("goals")
        if isinstance(goals, list):
            data["goals"] = [
                {name: value for name, value in goal.items() if name != "meets"} if isinstance(goal, dict) else goal for goal in goals
            ]
        return parse(cls, data, path)


def table(record: StudyRecord) -> str:
    """The record as lines of text: the question, a table per metric (a row per plan or pair of plans, a column per task and length), goals,
    answer."""
    parts = [[record.question]]
    parts += [_scores(record, metric) for metric in dict.fromkeys(row.metric for row in record.rows)]
    if record.goals:
        lines = [["goal", "value", "95% interval", "aimed at", "meets"]]
        for goal in record.goals:
            interval = interval_text(goal.low, goal.high) if has_interval(goal.low, goal.high) else "-"
            verdict = ("yes" if goal.meets else "no") + ("" if goal.decided else " (not decided)")
            lines.append([goal.name, f"{goal.value:.3f}", interval, f"{'<=' if goal.at_most else '>='} {goal.goal:g}", verdict])
        parts.append(aligned(lines))
    return "\n\n".join("\n".join(part) for part in [*parts, [record.answer]])


def _scores(record: StudyRecord, metric: str) -> list[str]:
    rows = record.select(metric=metric)
    columns = sorted({(row.task, row.length) for row in rows})
    found = {(_compared(row), row.task, row.length): row for row in rows}
    lines = [[metric.replace("_", " "), *(f"{task} @{length}" if length else task for task, length in columns)]]
    for name in dict.fromkeys(map(_compared, rows)):
        cells = [found.get((name, *column)) for column in columns]
        lines.append([name, *("-" if row is None else f"{row.value:.3f} {interval_text(row.low, row.high, '.2f')}" for row in cells)])
    return aligned(lines)


def _compared(row: Measurement) -> str:
    """What a row is about: a plan, or a plan against another one."""
    return f"{row.plan} against {row.detail['against']}" if "against" in row.detail else row.plan
