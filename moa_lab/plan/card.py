"""Plan: how many tokens every KV head keeps, at any length; saved as a config card."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from moa_lab.geometry import ModelGeometry, check_whole
from moa_lab.plan.bits import UNTOUCHED, WIDTHS, Bits, check_bits, read_bits, vector_bytes
from moa_lab.plan.model_card import Score
from moa_lab.plan.pretrained import card_file, save_folder
from moa_lab.plan.rules import GRIDS, MIN_SPAN, PUBLISHED_MULTIPLE, SpanRule, fitted, is_published, published_rules, read_rules
from moa_lab.provenance import Provenance, digest
from moa_lab.storage import HAND_CURE, RecordError, check_schema, parse, read_plain, to_json, write_json

PLAN_SCHEMA = "moa-lab/plan/1"
PLAN_WITH_BITS_SCHEMA = "moa-lab/plan/2"
"""The schema of cards that say in how many bits heads are stored; without bits a card is one that earlier versions read as well."""
BITS_FIELDS = ("key_bits", "value_bits")
SINK_TOKENS = 64
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """One rule for every (layer, KV head): `rules[layer][kv_head]`.

    `lengths` are the lengths at which the card reports density and bytes; `search`, `scores` and `provenance` tell where
    the plan came from and what was measured with it. Spans are rounded up to `span_multiple` tokens when that is above 1.
    `bits[layer][kv_head]`: in how many bits K and V are stored (see `with_bits`); empty: all in the model's own type.
    """

    geometry: ModelGeometry
    rules: tuple[tuple[SpanRule, ...], ...]
    sink_tokens: int = SINK_TOKENS
    min_span: int = MIN_SPAN
    span_multiple: int = 1
    name: str = "plan"
    lengths: tuple[int, ...] = ()
    bits: tuple[tuple[Bits, ...], ...] = ()
    search: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, Any] = field(default_factory=dict)
    provenance: Provenance = field(default_factory=Provenance)

    def __post_init__(self) -> None:
        shape = (len(self.rules), {len(row) for row in self.rules})
        expected = (self.geometry.layers, {self.geometry.kv_heads})
        if shape != expected:
            raise ValueError(
                f"rules must be {self.geometry.layers} layers x {self.geometry.kv_heads} KV heads, "
                f"got {shape[0]} layers of {sorted(shape[1])} heads"
            )
        for name in ("sink_tokens", "min_span", "span_multiple"):
            check_whole(name, getattr(self, name), 0 if name == "sink_tokens" else 1)
        if self.min_span <= self.sink_tokens:
            raise ValueError(f"min_span ({self.min_span}) must exceed sink_tokens ({self.sink_tokens})")
        for n_tokens in self.lengths:
            check_whole("lengths", n_tokens, 1)
        check_bits(self.bits, self.geometry.layers, self.geometry.kv_heads)
        if not self.name.isprintable() or not self.name.strip():
            raise ValueError(f"name must be a line of text, got {self.name!r}")

    def spans(self, n_tokens: int) -> np.ndarray:
        """Tokens kept per head at length `n_tokens`: int64 (layers, kv_heads), capped by a layer's own window."""
        _check_length(n_tokens)
        return np.array(
            [
                [
                    min(rule.span_tokens(n_tokens, self.min_span, self.span_multiple), self.geometry.dense_span_tokens(layer, n_tokens))
                    for rule in row
                ]
                for layer, row in enumerate(self.rules)
            ],
            dtype=np.int64,
        )

    def windows(self, n_tokens: int) -> np.ndarray:
        """Window tokens per head at length `n_tokens`: int64 (layers, kv_heads). The span less the sink.

        A head that keeps everything has a window of the model's maximum length, and no other window is capped at N: tokens
        generated beyond `n_tokens` find the same rule. A layer's own window is applied by the model itself, on top; a span of all that it
        shows is a window of all that, since the sink is not seen beyond it.
        """
        _check_length(n_tokens)
        owns = self.geometry.layer_windows
        return np.array([[self._window(rule, n_tokens, own) for rule in row] for row, own in zip(self.rules, owns, strict=True)], np.int64)

    def _window(self, rule: SpanRule, n_tokens: int, own: int | None) -> int:
        if rule.keeps_everything:
            return max(self.geometry.max_length, n_tokens)
        span = rule.uncapped_tokens(n_tokens, self.min_span, self.span_multiple)
        return span - self.sink_tokens if own is None or span < own else max(span - self.sink_tokens, own)

    def with_bits(self, bits: int | np.ndarray, name: str | None = None) -> Plan:
        """The same spans, stored in 16 (the model's own type), 8 or 4 bits.

        bits: of every head's K and V, or an integer array that broadcasts to (layers, kv_heads, 2). A vector in fewer bits has a grid of
        its own, for 4 bytes more. Raises ValueError for another width.
        """
        widths = np.broadcast_to(np.asarray(bits), (self.geometry.layers, self.geometry.kv_heads, 2))
        return replace(self, bits=read_bits(widths[..., 0], widths[..., 1]), name=name or self.name)

    def widths(self) -> np.ndarray:
        """Bits of K and V: int64 (layers, kv_heads, 2)."""
        shape = (self.geometry.layers, self.geometry.kv_heads, 2)
        return np.array(self.bits, dtype=np.int64) if self.bits else np.full(shape, UNTOUCHED, dtype=np.int64)

    def check_untouched(self, work: str) -> None:
        """Raise ValueError, naming `work`, where heads are stored in fewer bits than the model's own type."""
        if self.bits:
            raise ValueError(f"{work} knows no stored bits, and plan {self.name!r} has some: pass plan.with_bits(16)")

    def bits_of(self, layer: int) -> tuple[Bits, ...] | None:
        """Bits of a layer's heads; None where nothing is stored in fewer than the model's own."""
        row = self.bits[layer] if self.bits else ()
        return row if any(width < UNTOUCHED for pair in row for width in pair) else None

    def stored_text(self) -> list[str]:
        """A clause for every pair of bits with the number of heads stored so, the most frequent first; empty where none is in fewer bits
        than the model's own type."""
        counts = Counter(pair for row in self.bits for pair in row)
        return [f"{count} heads store K in {k} bits, V in {v}" for (k, v), count in counts.most_common()]

    def density(self, n_tokens: int) -> float:
        """KV cache kept at length `n_tokens`, as a fraction of the dense cache of the same model: of its bytes in a 16-bit type."""
        dense = sum(self.geometry.dense_span_tokens(layer, n_tokens) for layer in range(self.geometry.layers))
        return self.kv_bytes(n_tokens) / (dense * self.geometry.kv_heads * self.geometry.kv_bytes_per_token())

    def kv_bytes(self, n_tokens: int, dtype_bytes: int = 2) -> int:
        """Bytes of K and V that one sequence of `n_tokens` needs under this plan (predicted from spans and bits, not measured)."""
        return int((self.spans(n_tokens) * self.token_bytes(dtype_bytes)).sum())

    def token_bytes(self, dtype_bytes: int = 2) -> np.ndarray:
        """Bytes of one token's K and V in every head: int64 (layers, kv_heads)."""
        sizes = {bits: vector_bytes(self.geometry.head_dim, bits, dtype_bytes) for bits in WIDTHS}
        found: np.ndarray = np.vectorize(sizes.__getitem__, otypes=[np.int64])(self.widths()).sum(axis=2)
        return found

    @property
    def longest(self) -> int:
        """The longest length that the plan names, in tokens; the model's maximum where it names none."""
        return max(self.lengths, default=self.geometry.max_length)

    @property
    def is_dense(self) -> bool:
        """True when every head keeps everything at every length, as it is."""
        return not self.bits and all(rule.keeps_everything for row in self.rules for rule in row)

    def identity(self) -> str:
        """Short hash of what the plan does (rules, sink, floor, bits, geometry), whatever it is called."""
        content = [to_json(self.geometry), [[(r.alpha, r.beta) for r in row] for row in self.rules]]
        bits = [self.bits] if self.bits else []
        return digest(json.dumps([content, self.sink_tokens, self.min_span, self.span_multiple, *bits]).encode())

    def check_model(self, geometry: ModelGeometry, weights: str | None = None) -> None:
        """Refuse a model of another geometry (ValueError naming both); warn when the weights are not the profiled ones."""
        if not self.geometry.fits(geometry):
            raise ValueError(f"plan {self.name!r} is for another geometry: plan has {self.geometry}; model has {geometry}")
        made_on = self.provenance.weights
        if weights and made_on and weights != made_on:
            logger.warning("plan %r was made on weights %s, this model has %s: its scores may not hold", self.name, made_on, weights)

    def card(self) -> dict[str, Any]:
        """The config card: everything about the plan, as JSON data."""
        return {
            "schema": PLAN_WITH_BITS_SCHEMA if self.bits else PLAN_SCHEMA,
            "name": self.name,
            "geometry": to_json(self.geometry),
            "sink_tokens": self.sink_tokens,
            "min_span": self.min_span,
            "span_multiple": self.span_multiple,
            "alphas": [[rule.alpha for rule in row] for row in self.rules],
            "betas": [[rule.beta for rule in row] for row in self.rules],
            **({name: self.widths()[..., part].tolist() for part, name in enumerate(BITS_FIELDS)} if self.bits else {}),
            "lengths": list(self.lengths),
            "density": {str(n): self.density(n) for n in self.lengths},
            "kv_bytes": {str(n): self.kv_bytes(n) for n in self.lengths},
            "search": self.search,
            "scores": self.scores,
            "provenance": to_json(self.provenance),
        }

    def save(self, path: str | Path) -> Path:
        """Write the config card (JSON, atomically) and return the path."""
        return write_json(path, self.card())

    def save_pretrained(
        self, folder: str | Path, *, base_model: str | None = None, scores: Iterable[Score] = (), license: str | None = None
    ) -> Path:
        """Write `plan.json`, the config card, and `README.md`, a model card, into `folder`; return the folder.

        The folder may hold a model already. A README.md that is there keeps its text: the plan's section is replaced, or put behind it.
        base_model, license: as the hub calls them. scores: measurements to show beside the card's own, such as `Measurements.load(path)`:
        those of this plan, dense and uniform. `hf upload OWNER/NAME FOLDER` shares it. Raises ValueError where `folder` is a file.
        """
        return save_folder(self, folder, base_model, scores, license)

    @classmethod
    def from_pretrained(cls, name: str | Path, geometry: ModelGeometry | None = None, revision: str | None = None) -> Plan:
        """The plan of a folder, or of the hub repository of that id; revision: a branch, tag or commit of it.

        What the hub gave once, its cache gives without a network. Raises ValueError where there is no plan, else as `load`.
        """
        return cls.load(card_file(name, revision), geometry)

    @classmethod
    def load(cls, path: str | Path, geometry: ModelGeometry | None = None) -> Plan:
        """Read a config card. Raises RecordError for a broken or foreign file, ValueError when `geometry` differs."""
        data = read_plain(path, "a config card", HAND_CURE)
        if is_published(data):
            raise RecordError(f"{path}: one of the authors' plans, which names no geometry: Plan.from_published(path, geometry) reads it")
        has_bits = isinstance(data, dict) and data.get("schema") == PLAN_WITH_BITS_SCHEMA
        plan = cls.from_card(check_schema(path, data, PLAN_WITH_BITS_SCHEMA if has_bits else PLAN_SCHEMA), path)
        if geometry is not None:
            plan.check_model(geometry)
        return plan

    @classmethod
    def from_card(cls, data: Mapping[str, Any], path: str | Path = "plan") -> Plan:
        """Build a Plan from the data of a config card; `path` is named in errors. Raises RecordError."""
        fields = BITS_FIELDS if data.get("schema") == PLAN_WITH_BITS_SCHEMA else ()
        for name in (*GRIDS, *fields, "geometry", "sink_tokens", "min_span", "span_multiple", "name"):
            if name not in data:
                raise RecordError(f"{path}: config card lacks {name!r}")
        # Densities and bytes follow from the rules: what a card says of them is not believed.
        known = {"schema", *GRIDS, *fields, "density", "kv_bytes"}
        head = parse(_CardHead, {name: value for name, value in data.items() if name not in known}, path)
        rules = read_rules(data["alphas"], data["betas"], path)
        try:
            bits = read_bits(*(data[name] for name in fields)) if fields else ()
            return cls(rules=rules, bits=bits, **vars(head))
        except ValueError as error:
            raise RecordError(f"{path}: {error}") from error

    @classmethod
    def from_published(cls, path: str | Path, geometry: ModelGeometry) -> Plan:
        """Import the authors' `{"alphas", "betas"}` JSON (spans rounded up to 64, floor 128, sink 64 inside the span).

        A per-query-head file of a GQA model is pooled to KV heads rule by rule: of a group, the rule with the largest
        span at the model's maximum length stays. The cost is logged. Raises RecordError for a file of another shape.
        """
        rules = published_rules(path)
        plan_rules = fitted(rules, geometry, path)
        plan = cls(
            geometry=geometry, rules=plan_rules, span_multiple=PUBLISHED_MULTIPLE, name=Path(path).stem, search={"origin": "published"}
        )
        if plan_rules is not rules:
            asked = _mean_span_ratio(rules, plan, geometry.max_length)
            got = plan.density(geometry.max_length)
            logger.warning(
                "%s: %d query heads pooled to %d KV heads by max: density at %d is %.1f%% (the file's own heads average %.1f%%)",
                path, geometry.query_heads, geometry.kv_heads, geometry.max_length, 100 * got, 100 * asked,
            )  # fmt: skip
        return plan

    def to_published(self) -> dict[str, list[list[float]]]:
        """Return the authors' `{"alphas", "betas"}` format, one entry per query head (the KV head's rule, repeated).

        Raises ValueError when the plan's sink or floor is not the format's (64 and 128), which the file cannot say.
        """
        if (self.sink_tokens, self.min_span) != (64, 128):
            raise ValueError(
                f"the published format means sink 64 and floor 128, this plan has {self.sink_tokens} and {self.min_span}; "
                "save a config card instead"
            )
        if self.bits:
            raise ValueError("the published format has no word for bits; save a config card instead")
        repeat = self.geometry.group_size
        return {
            "alphas": [[rule.alpha for rule in row for _ in range(repeat)] for row in self.rules],
            "betas": [[rule.beta for rule in row for _ in range(repeat)] for row in self.rules],
        }

    def renamed(self, name: str, **changes: Any) -> Plan:
        """The same plan under another name (and with other `search`, `scores` or `provenance`)."""
        return replace(self, name=name, **changes)


@dataclass(frozen=True)
class _CardHead:
    """A config card without its rules."""

    geometry: ModelGeometry
    sink_tokens: int
    min_span: int
    span_multiple: int
    name: str
    lengths: tuple[int, ...] = ()
    search: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, Any] = field(default_factory=dict)
    provenance: Provenance = field(default_factory=Provenance)


def _mean_span_ratio(rules: tuple[tuple[SpanRule, ...], ...], plan: Plan, n_tokens: int) -> float:
    spans = [rule.span_tokens(n_tokens, plan.min_span, plan.span_multiple) for row in rules for rule in row]
    return sum(spans) / (len(spans) * n_tokens)


def _check_length(n_tokens: int) -> None:
    if n_tokens < 1:
        raise ValueError(f"n_tokens must be at least 1, got {n_tokens}")
