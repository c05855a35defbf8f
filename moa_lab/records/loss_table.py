"""Predicted losses of every choice of rules: all that the search needs to know of a model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from moa_lab.geometry import ModelGeometry, check_whole
from moa_lab.plan import Plan, SpanRule
from moa_lab.provenance import Provenance
from moa_lab.storage import RecordError, parse, read_tensors, to_json, write_tensors

TABLE_SCHEMA = "moa-lab/loss-table/1"

Form = Literal["sum", "all_or_nothing", "worst_distance"]
FORMS: tuple[Form, ...] = get_args(Form)


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
