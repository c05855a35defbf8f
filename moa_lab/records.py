"""What the stages hand to one another: frozen dataclasses that save themselves and refuse files that are not theirs."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
from pydantic import BeforeValidator

from moa_lab.geometry import ModelGeometry, check_whole
from moa_lab.plan import Plan, SpanRule
from moa_lab.provenance import Provenance
from moa_lab.storage import STAGE_CURE, RecordError, end_to_json, parse, read_json, read_tensors, to_json, write_json, write_tensors

logger = logging.getLogger(__name__)

PROFILE_SCHEMA = "moa-lab/profile/1"
TABLE_SCHEMA = "moa-lab/loss-table/1"
FRONT_SCHEMA = "moa-lab/front/1"
MEASUREMENTS_SCHEMA = "moa-lab/measurements/1"

BLOCK_TOKENS = 64

Form = Literal["sum", "all_or_nothing", "worst_distance"]
FORMS: tuple[Form, ...] = get_args(Form)

ProfileKey = tuple[str, int]
"""(calibration task, length in tokens)."""


@dataclass(frozen=True)
class InfluenceProfile:
    """Influence of every (layer, query head), per calibration task and length.

    `blocks[task, N]`: float32 (layers, query_heads, N/64, N/64), |influence| summed over each 64 x 64 block of
    (query, key), averaged over samples, in nats of the sample's loss (mean over answer tokens).
    `distances[task, N]`: float32 (samples, layers, query_heads, N/64), one histogram per sample: bin b sums |influence|
    of the keys beyond the sink whose distance i - j lies in [64 b, 64 b + 63].
    `span_effects[task, N]`: float32 (samples, layers, query_heads, N/64), signed: entry b is the loss change when the head
    loses all keys beyond the sink at distances >= 64 b at once. Empty for a profile of single values only.
    """

    geometry: ModelGeometry
    sink_tokens: int
    blocks: dict[ProfileKey, np.ndarray]
    distances: dict[ProfileKey, np.ndarray]
    provenance: Provenance = field(default_factory=Provenance)
    span_effects: dict[ProfileKey, np.ndarray] = field(default_factory=dict)

    @property
    def keys(self) -> tuple[ProfileKey, ...]:
        """The profiled (task, length) pairs, sorted."""
        return tuple(sorted(self.distances))

    @property
    def lengths(self) -> tuple[int, ...]:
        """The profiled lengths in tokens, ascending."""
        return tuple(sorted({length for _, length in self.distances}))

    @property
    def tasks(self) -> tuple[str, ...]:
        """The calibration tasks, sorted."""
        return tuple(sorted({task for task, _ in self.distances}))

    def distance(self, task: str, length: int) -> np.ndarray:
        """Mean histogram over samples: float64 (layers, query_heads, length/64)."""
        return self.distances[task, length].astype(np.float64).mean(axis=0)

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file."""
        tensors = {}
        for task, length in self.keys:
            tensors[f"blocks/{task}/{length}"] = self.blocks[task, length]
            tensors[f"distances/{task}/{length}"] = self.distances[task, length]
        for (task, length), effects in self.span_effects.items():
            tensors[f"span_effects/{task}/{length}"] = effects
        description = {
            "schema": PROFILE_SCHEMA,
            "geometry": to_json(self.geometry),
            "sink_tokens": self.sink_tokens,
            "provenance": to_json(self.provenance),
        }
        return write_tensors(path, tensors, description)

    @classmethod
    def load(cls, path: str | Path) -> InfluenceProfile:
        """Read a profile; raises RecordError for a broken or foreign file."""
        tensors, data = read_tensors(path, PROFILE_SCHEMA)
        grids: dict[str, dict[ProfileKey, np.ndarray]] = {"blocks": {}, "distances": {}, "span_effects": {}}
        for name, array in tensors.items():
            # A task may have a "/" in its name: what stands first and last is ours.
            kind, _, key = name.partition("/")
            task, _, length = key.rpartition("/")
            if kind not in grids or not length.isdigit():
                raise RecordError(f"{path}: tensor {name!r} does not belong in a profile; run its stage again")
            grids[kind][task, int(length)] = array
        if set(grids["blocks"]) != set(grids["distances"]) or set(grids["span_effects"]) - set(grids["distances"]):
            raise RecordError(f"{path}: blocks, distances and span effects cover different (task, length) pairs; run its stage again")
        head = parse(_ProfileHead, {name: value for name, value in data.items() if name != "schema"}, path)
        for kind, arrays in grids.items():
            for pair, array in arrays.items():
                _check_grid(path, head.geometry, kind, pair, array)
        return cls(head.geometry, head.sink_tokens, grids["blocks"], grids["distances"], head.provenance, grids["span_effects"])


@dataclass(frozen=True)
class _ProfileHead:
    geometry: ModelGeometry
    sink_tokens: int
    provenance: Provenance

    def __post_init__(self) -> None:
        check_whole("sink_tokens", self.sink_tokens, 0)


def _check_grid(path: str | Path, geometry: ModelGeometry, kind: str, key: ProfileKey, array: np.ndarray) -> None:
    """Refuse a tensor of a profile that is not of the profile's model or length, or holds what is no number."""
    heads, bins = (geometry.layers, geometry.query_heads), -(-key[1] // BLOCK_TOKENS)
    expected = (*heads, bins, bins) if kind == "blocks" else (*array.shape[:1], *heads, bins)
    if array.shape != expected or not array.size:
        raise RecordError(f"{path}: {kind} of {key[0]}@{key[1]} must be {expected}, got {array.shape}; {STAGE_CURE}")
    if array.dtype.kind != "f" or not np.isfinite(array).all():
        raise RecordError(f"{path}: {kind} of {key[0]}@{key[1]} must be finite numbers, got {array.dtype}; {STAGE_CURE}")


@dataclass(frozen=True)
class Objective:
    """One predicted loss: a calibration task at a length, in one of three forms (METHOD words: sum of lost influence;
    all-or-nothing, where a cut head loses everything beyond the floor; worst distance, the largest loss of any distance bucket).

    `rows` names the rows of the table's `losses`: the objective of a plan is the largest row sum (one row, unless the form
    is worst_distance).
    """

    task: str
    length: int
    form: Form
    rows: tuple[int, int]

    def __post_init__(self) -> None:
        check_whole("length", self.length, 1)
        if not 0 <= self.rows[0] < self.rows[1]:
            raise ValueError(f"rows must be a range that is not empty, [first, behind the last], got {self.rows}")

    @property
    def name(self) -> str:
        """For instance `questions@2048/all_or_nothing`."""
        return f"{self.task}@{self.length}/{self.form}"


@dataclass(frozen=True)
class LossTable:
    """Predicted loss of every choice: `losses[row, layer, kv_head, rule]`, float64, pooled to KV heads.

    Each objective is scaled so that the plan with every head at the cheapest rule scores 1 and the dense plan 0.
    """

    geometry: ModelGeometry
    rules: tuple[SpanRule, ...]
    sink_tokens: int
    min_span: int
    objectives: tuple[Objective, ...]
    losses: np.ndarray
    provenance: Provenance = field(default_factory=Provenance)

    def __post_init__(self) -> None:
        check_whole("sink_tokens", self.sink_tokens, 0)
        check_whole("min_span", self.min_span, self.sink_tokens + 1)
        rows = max((objective.rows[1] for objective in self.objectives), default=0)
        expected = (rows, self.geometry.layers, self.geometry.kv_heads, len(self.rules))
        if self.losses.shape != expected:
            raise ValueError(f"losses must be (rows, layers, kv_heads, rules) = {expected}, got {self.losses.shape}")
        if self.losses.dtype.kind != "f" or not np.isfinite(self.losses).all():
            raise ValueError(f"losses must be finite numbers, got {self.losses.dtype}")

    @property
    def lengths(self) -> tuple[int, ...]:
        """The profiled lengths in tokens, ascending."""
        return tuple(sorted({objective.length for objective in self.objectives}))

    def span_tokens(self, n_tokens: int) -> np.ndarray:
        """Tokens kept by every choice at a length: int64 (layers, rules), capped by a layer's own window."""
        spans = np.array([rule.span_tokens(n_tokens, self.min_span) for rule in self.rules], dtype=np.int64)
        caps = np.array([self.geometry.dense_span_tokens(layer, n_tokens) for layer in range(self.geometry.layers)])
        return np.minimum(spans[None, :], caps[:, None])

    def dense_tokens(self, n_tokens: int) -> int:
        """Tokens that the dense model keeps, summed over layers and KV heads."""
        per_head = sum(self.geometry.dense_span_tokens(layer, n_tokens) for layer in range(self.geometry.layers))
        return per_head * self.geometry.kv_heads

    def predict(self, choice: np.ndarray) -> dict[str, float]:
        """Predicted loss per objective name for `choice`: int (layers, kv_heads), an index into `rules`."""
        picked = np.take_along_axis(self.losses, choice[None, :, :, None], axis=3)[..., 0].sum(axis=(1, 2))
        return {objective.name: float(picked[slice(*objective.rows)].max()) for objective in self.objectives}

    def density(self, choice: np.ndarray, n_tokens: int) -> float:
        """Density of `choice` at a length."""
        spans = self.span_tokens(n_tokens)
        kept = np.take_along_axis(spans, choice, axis=1).sum()
        return float(kept / self.dense_tokens(n_tokens))

    def plan(self, choice: np.ndarray, name: str, **fields: Any) -> Plan:
        """The Plan that picks `rules[choice[layer, kv_head]]`."""
        rules = tuple(tuple(self.rules[int(index)] for index in row) for row in choice)
        return Plan(
            geometry=self.geometry, rules=rules, sink_tokens=self.sink_tokens, min_span=self.min_span,
            name=name, provenance=self.provenance, **fields,
        )  # fmt: skip

    def choice(self, plan: Plan) -> np.ndarray:
        """The inverse of `plan`: int64 (layers, kv_heads). Raises ValueError for a rule that is not in the table."""
        index = {rule: position for position, rule in enumerate(self.rules)}
        try:
            return np.array([[index[rule] for rule in row] for row in plan.rules], dtype=np.int64)
        except KeyError as error:
            raise ValueError(f"plan {plan.name!r} uses {error}, which is not among the table's {len(self.rules)} rules") from None

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file."""
        description = {
            "schema": TABLE_SCHEMA,
            "geometry": to_json(self.geometry),
            "rules": [to_json(rule) for rule in self.rules],
            "sink_tokens": self.sink_tokens,
            "min_span": self.min_span,
            "objectives": [to_json(objective) for objective in self.objectives],
            "provenance": to_json(self.provenance),
        }
        return write_tensors(path, {"losses": self.losses}, description)

    @classmethod
    def load(cls, path: str | Path) -> LossTable:
        """Read a loss table; raises RecordError for a broken or foreign file."""
        tensors, data = read_tensors(path, TABLE_SCHEMA)
        head = parse(_TableHead, {name: value for name, value in data.items() if name != "schema"}, path)
        if "losses" not in tensors:
            raise RecordError(f"{path}: loss table without losses")
        try:
            return cls(head.geometry, head.rules, head.sink_tokens, head.min_span, head.objectives, tensors["losses"], head.provenance)
        except ValueError as error:
            raise RecordError(f"{path}: {error}") from error


@dataclass(frozen=True)
class _TableHead:
    geometry: ModelGeometry
    rules: tuple[SpanRule, ...]
    sink_tokens: int
    min_span: int
    objectives: tuple[Objective, ...]
    provenance: Provenance


@dataclass(frozen=True)
class FrontPoint:
    """A plan with what the search says of it: predicted loss per objective name, density per length ("2048": 0.5),
    the solver that found it, and its proven optimality gap (None where the solver proves nothing)."""

    plan: Plan
    predicted: dict[str, float]
    density: dict[str, float]
    origin: str
    gap: float | None = None


@dataclass(frozen=True)
class Front:
    """Plans none of which is beaten in every front objective by another, and the settings of the search that found them.

    `objectives` are the names that span the front (keys of every point's `predicted`, or "density").
    """

    points: tuple[FrontPoint, ...]
    objectives: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    provenance: Provenance = field(default_factory=Provenance)

    def __len__(self) -> int:
        return len(self.points)

    def __iter__(self) -> Iterator[FrontPoint]:
        return iter(self.points)

    def save(self, path: str | Path) -> Path:
        """Write one JSON file; plans are stored as config cards."""
        points = [{**_without_plan(point), "plan": point.plan.card()} for point in self.points]
        data = {"schema": FRONT_SCHEMA, "objectives": list(self.objectives), "points": points, "settings": self.settings}
        return write_json(path, {**data, "provenance": to_json(self.provenance)})

    @classmethod
    def load(cls, path: str | Path) -> Front:
        """Read a front; raises RecordError for a broken or foreign file."""
        data = read_json(path, FRONT_SCHEMA)
        head = parse(_FrontHead, {name: value for name, value in data.items() if name != "schema"}, path)
        points = tuple(FrontPoint(**{**vars(point), "plan": Plan.from_card(point.plan, path)}) for point in head.points)
        return cls(points, head.objectives, head.settings, head.provenance)


@dataclass(frozen=True)
class _PointHead:
    """A point of a front whose plan is still a card."""

    plan: dict[str, Any]
    predicted: dict[str, float]
    density: dict[str, float]
    origin: str
    gap: float | None = None


@dataclass(frozen=True)
class _FrontHead:
    points: tuple[_PointHead, ...]
    objectives: tuple[str, ...]
    settings: dict[str, Any]
    provenance: Provenance


def _without_plan(point: FrontPoint) -> dict[str, Any]:
    return {"predicted": point.predicted, "density": point.density, "origin": point.origin, "gap": point.gap}


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
