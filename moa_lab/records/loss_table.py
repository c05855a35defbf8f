"""Predicted losses of every choice of rules: all that the search needs to know of a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from moa_lab.engines import EngineLimits
from moa_lab.geometry import ModelGeometry, check_whole
from moa_lab.plan import WHOLE_BITS, Bits, Plan, SpanRule, told_bits
from moa_lab.plan.bits import as_bits, check_bits, vector_bytes
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
    is worst_distance). profiled: whether the length was, else the losses are extrapolated from the profiled lengths. error: of the
    extrapolation, as a share of the losses, where it was tried on a profiled length; None elsewhere.
    """

    task: str
    length: int
    form: Form
    rows: tuple[int, int]
    profiled: bool = True
    error: float | None = None

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

    Each objective is scaled so that the plan with every head at the cheapest rule scores 1 and the dense plan 0. engine: what allocates
    the tokens that choices keep, by which densities count (None: exactly these tokens). stored: the bits of K and V of every choice, whose
    losses are then those of its span and of the rounding together; a rule is there once for each pair of bits. Empty: all choices are
    stored in 16 bits, or in others by which the losses do not differ.
    """

    geometry: ModelGeometry
    rules: tuple[SpanRule, ...]
    sink_tokens: int
    min_span: int
    objectives: tuple[Objective, ...]
    losses: np.ndarray
    provenance: Provenance = field(default_factory=Provenance)
    engine: EngineLimits | None = None
    stored: tuple[Bits, ...] = ()

    def __post_init__(self) -> None:
        check_whole("sink_tokens", self.sink_tokens, 0)
        check_whole("min_span", self.min_span, self.sink_tokens + 1)
        rows = max((objective.rows[1] for objective in self.objectives), default=0)
        expected = (rows, self.geometry.layers, self.geometry.kv_heads, len(self.rules))
        if self.losses.shape != expected:
            raise ValueError(f"losses must be (rows, layers, kv_heads, rules) = {expected}, got {self.losses.shape}")
        if self.losses.dtype.kind != "f" or not np.isfinite(self.losses).all():
            raise ValueError(f"losses must be finite numbers, got {self.losses.dtype}")
        check_bits((self.stored,) if self.stored else (), 1, len(self.rules))

    @property
    def choices(self) -> tuple[tuple[SpanRule, Bits], ...]:
        """Rule and bits of K and V of every choice."""
        return tuple(zip(self.rules, self.stored or (WHOLE_BITS,) * len(self.rules), strict=True))

    @property
    def mixes(self) -> tuple[Bits, ...]:
        """The pairs of bits that a head may be stored in, each once."""
        return tuple(dict.fromkeys(self.stored)) or (WHOLE_BITS,)

    @property
    def lengths(self) -> tuple[int, ...]:
        """All lengths with predicted losses, in tokens, ascending: those where plans will be used."""
        return tuple(sorted({objective.length for objective in self.objectives}))

    @property
    def profiled_lengths(self) -> tuple[int, ...]:
        """Those of `lengths` that were profiled."""
        return tuple(sorted({objective.length for objective in self.objectives if objective.profiled}))

    def span_tokens(self, n_tokens: int) -> np.ndarray:
        """Tokens kept by every choice at a length: int64 (layers, rules), capped by a layer's own window."""
        return self._spans(self.rules, n_tokens)

    def _spans(self, rules: Sequence[SpanRule], n_tokens: int) -> np.ndarray:
        spans = np.array([rule.span_tokens(n_tokens, self.min_span) for rule in rules], dtype=np.int64)
        caps = np.array([self.geometry.dense_span_tokens(layer, n_tokens) for layer in range(self.geometry.layers)])
        return np.minimum(spans[None, :], caps[:, None])

    def slot_tokens(self, n_tokens: int) -> np.ndarray:
        """Tokens allocated for every choice at a length: int64 (layers, rules); those kept, unless the table has an engine."""
        spans = self.span_tokens(n_tokens)
        return spans if self.engine is None else self.engine.slots(spans, n_tokens)

    def dense_tokens(self, n_tokens: int) -> int:
        """Tokens that the dense model keeps, summed over layers and KV heads."""
        per_head = sum(self.geometry.dense_span_tokens(layer, n_tokens) for layer in range(self.geometry.layers))
        return per_head * self.geometry.kv_heads

    def slot_cost(self, n_tokens: int) -> np.ndarray:
        """What every choice takes at a length: int64 (layers, rules), of `slot_tokens`; of their bytes where choices differ in bits."""
        return self.slot_tokens(n_tokens) * self.token_cost

    def dense_cost(self, n_tokens: int) -> int:
        """What the dense model takes in 16 bits, in the unit of `slot_cost`."""
        return self.dense_tokens(n_tokens) * (self._token_bytes(WHOLE_BITS) if self.stored else 1)

    @property
    def token_cost(self) -> np.ndarray:
        """What a token of one head takes under every choice, in the unit of `slot_cost`: int64 (rules,)."""
        return np.array([self._token_bytes(mix) for mix in self.stored] or [1] * len(self.rules), dtype=np.int64)

    def _token_bytes(self, mix: Bits) -> int:
        return sum(vector_bytes(self.geometry.head_dim, bits) for bits in mix)

    def predict(self, choice: np.ndarray) -> dict[str, float]:
        """Predicted loss per objective name for `choice`: int (layers, kv_heads), an index into `rules`."""
        picked = np.take_along_axis(self.losses, choice[None, :, :, None], axis=3)[..., 0].sum(axis=(1, 2))
        return {objective.name: float(picked[slice(*objective.rows)].max()) for objective in self.objectives}

    def density(self, choice: np.ndarray, n_tokens: int) -> float:
        """Density of `choice` at a length, of what is allocated for it (what fills up an engine's classes not counted)."""
        kept = np.take_along_axis(self.slot_cost(n_tokens), choice, axis=1).sum()
        return float(kept / self.dense_cost(n_tokens))

    def plan(self, choice: np.ndarray, name: str, **fields: Any) -> Plan:
        """The Plan that picks `rules[choice[layer, kv_head]]`, stored in the bits of that choice."""
        rules = tuple(tuple(self.rules[int(index)] for index in row) for row in choice)
        return Plan(
            geometry=self.geometry, rules=rules, sink_tokens=self.sink_tokens, min_span=self.min_span,
            bits=as_bits(np.array(self.stored)[choice]) if self.stored else (), name=name, provenance=self.provenance, **fields,
        )  # fmt: skip

    def choice(self, plan: Plan) -> np.ndarray:
        """The inverse of `plan`: int64 (layers, kv_heads). Raises ValueError for a rule that is not in the table, or not in these bits."""
        index = {choice: position for position, choice in enumerate(self.choices)}
        try:
            return np.array([[index[choice] for choice in row] for row in self._choices_of(plan)], dtype=np.int64)
        except KeyError as error:
            rule, mix = error.args[0]
            told = f"{rule!r}{f' stored in {told_bits(mix)} bits' if self.stored else ''}"
            raise ValueError(f"plan {plan.name!r} uses {told}, which is not among the table's {len(self.rules)} rules") from None

    def _choices_of(self, plan: Plan) -> list[list[tuple[SpanRule, Bits]]]:
        """Rule and bits by layer and KV head; a table of one mix takes bits for that."""
        if not self.stored:
            return [[(rule, WHOLE_BITS) for rule in row] for row in plan.rules]
        bits = [[(k, v) for k, v in row] for row in plan.widths().tolist()]
        return [list(zip(row, mixes, strict=True)) for row, mixes in zip(plan.rules, bits, strict=True)]

    def with_rules(self, rules: Iterable[SpanRule]) -> LossTable:
        """The table with those of `rules` that it lacks, in all its mixes of bits, behind its own. See `with_plans`."""
        return self._with([(rule, mix) for rule in rules for mix in self.mixes])

    def with_plans(self, *plans: Plan) -> LossTable:
        """The table with the choices of these plans that it lacks, behind its own.

        Their losses are interpolated by span between its rules in the same bits. A span that sees everything loses what the dense rule
        loses; a shorter one is at least as bad as the longest that is cut. Raises ValueError for bits that the table does not know.
        """
        return self._with([choice for plan in plans for row in self._choices_of(plan) for choice in row])

    def _with(self, choices: Iterable[tuple[SpanRule, Bits]]) -> LossTable:
        there = set(self.choices)
        new = [choice for choice in dict.fromkeys(choices) if choice not in there]
        if not new:
            return self
        added = np.empty((*self.losses.shape[:3], len(new)))
        spans = {n: (self.span_tokens(n), self._spans([rule for rule, _ in new], n)) for n in self.lengths}
        for mix in dict.fromkeys(mix for _, mix in new):
            known, wanted = ([at for at, (_, other) in enumerate(some) if other == mix] for some in (self.choices, new))
            if not known:
                raise ValueError(f"the table knows no losses of {told_bits(mix)} bits, only of {', '.join(map(told_bits, self.mixes))}")
            for objective in self.objectives:
                rows, (own, asked) = slice(*objective.rows), spans[objective.length]
                for layer in range(self.geometry.layers):
                    dense, losses = self.geometry.dense_span_tokens(layer, objective.length), self.losses[rows, layer][..., known]
                    added[rows, layer][..., wanted] = _between(own[layer, known], losses, asked[layer, wanted], dense)
        return replace(
            self, rules=(*self.rules, *(rule for rule, _ in new)), losses=np.concatenate([self.losses, added], axis=3),
            stored=(*self.stored, *(mix for _, mix in new)) if self.stored else (),
        )  # fmt: skip

    def in_mixes(self, mixes: Iterable[Bits]) -> LossTable:
        """A table of no bits with all its rules in each of `mixes`, of whose rounding the losses do not know."""
        known = tuple(mixes)
        return replace(
            self, rules=self.rules * len(known), losses=np.tile(self.losses, len(known)),
            stored=tuple(mix for mix in known for _ in self.rules),
        )  # fmt: skip

    def only(self, rules: Iterable[int]) -> LossTable:
        """The table with the choices of these indices alone, in their order."""
        chosen = list(rules)
        return replace(
            self, rules=tuple(self.rules[index] for index in chosen), losses=self.losses[..., chosen],
            stored=tuple(self.stored[index] for index in chosen) if self.stored else (),
        )  # fmt: skip

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
            **({} if self.engine is None else {"engine": to_json(self.engine)}),
            **({"stored": [list(mix) for mix in self.stored]} if self.stored else {}),
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
            return cls(losses=tensors["losses"], **vars(head))
        except ValueError as error:
            raise RecordError(f"{path}: {error}") from error


def _between(known: np.ndarray, losses: np.ndarray, wanted: np.ndarray, dense: int) -> np.ndarray:
    """Losses (rows, kv_heads, wanted) at the spans `wanted`, linear between those at the spans `known` (rows, kv_heads, known).

    Spans that are cut and spans that see everything (`dense`) are kept apart: all-or-nothing losses jump between them.
    """
    found = np.empty((*losses.shape[:2], len(wanted)))
    for cut in (False, True):
        here = np.flatnonzero((wanted < dense) == cut)
        alike = np.flatnonzero((known < dense) == cut)
        # A table without a cut rule, or without a dense one, has only the other kind to tell by.
        source = alike if len(alike) else np.arange(len(known))
        order = source[np.argsort(known[source], kind="stable")]
        found[..., here] = interpolated(wanted[here], known[order], losses[..., order])
    return found


def interpolated(wanted: np.ndarray, known: np.ndarray, values: np.ndarray) -> np.ndarray:
    """`np.interp`, to the last digit, of all curves `values` (..., known) at once: (..., wanted)."""
    at = np.searchsorted(known, wanted, side="right") - 1
    left, right = np.clip(at, 0, len(known) - 1), np.clip(at + 1, 0, len(known) - 1)
    low, high = values[..., left], values[..., right]
    # Of equal places, and beyond both ends, there is one value.
    slope = (high - low) / np.maximum(known[right] - known[left], 1)
    return np.where(left == right, low, slope * (wanted - known[left]) + low)


@dataclass(frozen=True)
class _TableHead:
    geometry: ModelGeometry
    rules: tuple[SpanRule, ...]
    sink_tokens: int
    min_span: int
    objectives: tuple[Objective, ...]
    provenance: Provenance
    engine: EngineLimits | None = None
    stored: tuple[Bits, ...] = ()
