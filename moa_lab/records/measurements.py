"""Measured scores of plans, with their intervals."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator

from moa_lab.geometry import check_whole
from moa_lab.provenance import Provenance
from moa_lab.storage import end_to_json, parse, read_json, to_json, write_json

logger = logging.getLogger(__name__)

MEASUREMENTS_SCHEMA = "moa-lab/measurements/1"


ALLOCATED = "kv_bytes_allocated"
"""The metric of memory: bytes of K and V of one sequence at 2 bytes a number, allocated and not predicted."""
EXACT = (ALLOCATED, "hypervolume")
"""Metrics that are counted and not sampled: one value is all there is."""

# JSON has no word for infinity: an end that nothing is known of is null there.
LowEnd = Annotated[float, BeforeValidator(lambda end: -math.inf if end is None else end)]
HighEnd = Annotated[float, BeforeValidator(lambda end: math.inf if end is None else end)]


@dataclass(frozen=True)
class Measurement:
    """One measured score of one plan: the mean of `n` observations with its 95% interval.

    One observation has no interval: its ends are infinite (null in a file), unless the metric is one of `EXACT`.

    `metric` is for instance "retrieval" (exact match, 0 to 1) or "cross_entropy" (nats per token); `task` tells which
    wording or text; `detail` holds what a figure may want (accuracy per depth, ...).
    """

    plan: str
    metric: str
    task: str
    length: int
    value: float
    n: int
    low: LowEnd
    high: HighEnd
    density: float
    detail: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_whole("length", self.length, 0)
        check_whole("n", self.n, 1)
        if not 0 <= self.density <= 1:
            raise ValueError(f"density must be a share of the cache, 0 to 1, got {self.density}")
        if self.n == 1 and self.low == self.high and self.metric not in EXACT:
            object.__setattr__(self, "low", -math.inf)
            object.__setattr__(self, "high", math.inf)

    def score(self, value: str = "value") -> dict[str, float | int | None]:
        """Value (called `value`), n and interval as JSON data."""
        return {value: self.value, "n": self.n, "low": end_to_json(self.low), "high": end_to_json(self.high)}


@dataclass(frozen=True)
class Measurements:
    """A table of scores with where they came from. A log of measurements may hold a row twice; `plus` and figures count it once."""

    rows: tuple[Measurement, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    provenance: Provenance = field(default_factory=Provenance)

    def __iter__(self) -> Iterator[Measurement]:
        return iter(self.rows)

    def select(self, **wanted: Any) -> tuple[Measurement, ...]:
        """Rows whose fields equal `wanted`, for instance `select(plan="moa", metric="retrieval")`."""
        return tuple(row for row in self.rows if all(getattr(row, name) == value for name, value in wanted.items()))

    def plus(self, rows: Iterable[Measurement]) -> Measurements:
        """The same table with those of `rows` that it does not hold: repetition is no evidence.

        Raises ValueError for a table of another model.
        """
        if isinstance(rows, Measurements) and rows.provenance.weights and self.provenance.weights:
            ours, theirs = self.provenance, rows.provenance
            if ours.weights != theirs.weights:
                raise ValueError(
                    f"scores of different models are not one table: weights {ours.weights} (model {ours.model!r}) and {theirs.weights} "
                    f"(model {theirs.model!r}); keep two"
                )
        given = tuple(rows)
        added = _distinct((*self.rows, *given))[len(_distinct(self.rows)) :]
        if len(added) < len(given):
            logger.warning("%d of %d rows of scores were there already, counted once", len(given) - len(added), len(given))
        return Measurements((*self.rows, *added), self.settings, self.provenance)

    def save(self, path: str | Path) -> Path:
        """Write one JSON file."""
        return write_json(path, {"schema": MEASUREMENTS_SCHEMA, **to_json(self)})

    @classmethod
    def load(cls, path: str | Path) -> Measurements:
        """Read a table of scores; raises RecordError for a broken or foreign file."""
        data = read_json(path, MEASUREMENTS_SCHEMA)
        return parse(cls, {name: value for name, value in data.items() if name != "schema"}, path)


def _distinct(rows: Iterable[Measurement]) -> tuple[Measurement, ...]:
    kept: list[Measurement] = []
    alike: dict[tuple[Any, ...], list[Measurement]] = {}
    for row in rows:
        # Details, which cannot be hashed, are compared only where all else is equal.
        same = alike.setdefault((row.plan, row.metric, row.task, row.length, row.value, row.n), [])
        if row not in same:
            same.append(row)
            kept.append(row)
    return tuple(kept)
