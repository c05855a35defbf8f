"""The record of a benchmark: rows, their goals, and the table of both."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moa_lab.provenance import Provenance
from moa_lab.storage import parse, read_json, to_json, write_json
from moa_lab.text import aligned

BENCH_SCHEMA = "moa-lab/bench/1"
TOLERANCE = 3e-2
"""Largest error of a bfloat16 result: absolute, and relative to the largest number of the same output row."""

INFORMATION = "for information: nobody asks for it"


@dataclass(frozen=True)
class Goal:
    """The ratio that a row should reach or, with `at_most`, stay below. informs: nobody asks for it; it tells what to expect."""

    ratio: float
    at_most: bool = False
    informs: bool = False

    def meets(self, ratio: float) -> bool:
        """True where `ratio` meets the goal."""
        return ratio <= self.ratio if self.at_most else ratio >= self.ratio

    def __str__(self) -> str:
        told = f"{'<=' if self.at_most else '>='} {self.ratio:.2f}"
        return f"({told})" if self.informs else told


GOALS = {
    "D1": Goal(0.93),
    "D2": Goal(1.05, at_most=True),
    "D3": Goal(0.80),
    "D3 few bytes": Goal(1.0, at_most=True),
    "D4": Goal(0.90),
    "P1 cuDNN": Goal(1.0),
    "P1 FlexAttention": Goal(1.25),
    "P2": Goal(0.58, at_most=True),
    "P3 cuDNN": Goal(0.90),
    "P4": Goal(0.85),
    "M1": Goal(1.02, at_most=True),
    "B1": Goal(0.85),
    "B2": Goal(0.56, at_most=True),
    "B3": Goal(0.36, at_most=True),
    "B3 8+4": Goal(0.46, at_most=True, informs=True),
    "B4": Goal(0.85),
    "E1": Goal(1.9),
    "E1 DynamicCache 4096": Goal(8.2),
    "E1 DynamicCache 8192": Goal(6.0),
    "E1 DynamicCache 16384": Goal(6.5),
    "E2": Goal(3.6),
    "E2 DynamicCache 4096": Goal(15.0),
    "E2 DynamicCache 8192": Goal(11.0),
    "E2 DynamicCache 16384": Goal(12.0),
    "E3": Goal(1.12, at_most=True),
    "E4": Goal(1.7),
    "E5 vLLM-bf16": Goal(3.8),
    "E5 vLLM-fp8": Goal(2.3),
    "E5 16 bits": Goal(1.0, informs=True),
    "E6 vLLM-bf16": Goal(7.0),
    "E6 vLLM-fp8": Goal(4.2),
    "E6 16 bits": Goal(1.0, informs=True),
    "E7": Goal(1.0),
    "C1": Goal(1.0, at_most=True),
    "S1": Goal(1.0, at_most=True),
    "W1": Goal(1.0, at_most=True),
    "W2": Goal(1.0, at_most=True),
}


@dataclass(frozen=True)
class BenchRow:
    """Ours against a peer at one shape: `ratio` = ours / peer, both in `unit`; None where the peer did not run.

    meets: the ratio reaches `goal` (or, `at_most`, stays below it) in a trusted measurement (see `judged`).
    detail: error (largest), relative_error (largest, over its output row's largest number), None where not finite; ms, timer and
    spread (see `moa_lab.bench.timing`); peers, each with its own ms and rate, or with the reason why it "failed"; goal, where nobody asks
    for it (see `Goal.informs`).
    """

    id: str
    shape: dict[str, Any]
    ours: float
    peer: float | None
    peer_name: str
    ratio: float | None
    goal: float
    meets: bool
    unit: str
    at_most: bool = False
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class BenchRecord:
    """Rows, settings and provenance."""

    rows: tuple[BenchRow, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    provenance: Provenance = field(default_factory=Provenance)

    def __iter__(self) -> Iterator[BenchRow]:
        return iter(self.rows)

    def select(self, row: str) -> tuple[BenchRow, ...]:
        """The rows of one id, for instance "D1"."""
        return tuple(found for found in self.rows if found.id == row)

    def save(self, path: str | Path) -> Path:
        """Write one JSON file."""
        return write_json(path, {"schema": BENCH_SCHEMA, **to_json(self)})

    @classmethod
    def load(cls, path: str | Path) -> BenchRecord:
        """Read a record; raises RecordError for a broken or foreign file."""
        data = read_json(path, BENCH_SCHEMA)
        return parse(cls, {name: value for name, value in data.items() if name != "schema"}, path)


def judged(
    row: str, goal: Goal, shape: dict[str, Any], ours: float, peer: float | None, peer_name: str, unit: str, trusted: bool,
    detail: dict[str, Any],
) -> BenchRow:  # fmt: skip
    """A row whose `meets` follows from the ratio, and is False where it is not `trusted` (wrong results, or not timed on a GPU)."""
    ratio = None if peer is None else ours / peer
    detail = {**detail, "goal": INFORMATION} if goal.informs else detail
    meets = trusted and ratio is not None and goal.meets(ratio)
    return BenchRow(row, shape, ours, peer, peer_name, ratio, goal.ratio, meets, unit, goal.at_most, detail)


def errors(found: torch.Tensor, expected: torch.Tensor) -> dict[str, float | None]:
    """Largest error of `found` (..., head_dim) against `expected` in float32.

    Averages over many random values are so small that zeros would pass an absolute tolerance: relative_error divides by the largest
    number of the same output row.
    """
    apart = (found.float() - expected).abs()
    size = expected.abs().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    worst = {"error": float(apart.max()), "relative_error": float((apart / size).max())}
    # None: JSON has no NaN or infinity.
    return {name: value if value <= torch.finfo(torch.float32).max else None for name, value in worst.items()}


def is_right(found: dict[str, float | None]) -> bool:
    """True where all errors are finite and within the tolerance."""
    return all(value is not None and value <= TOLERANCE for value in found.values())


def table(record: BenchRecord) -> str:
    """The record as lines of text: one row per measurement, then device, ceilings and versions."""
    rows = [["row", "shape", "ours", "peer", "ratio", "goal", "meets", "error", "other peers"], *(_cells(row) for row in record)]
    return "\n".join([*aligned(rows), _note(record)])


def _cells(row: BenchRow) -> list[str]:
    error = row.detail.get("relative_error", "-")
    peers = [f"{name} {_peer(found)}" for name, found in row.detail.get("peers", {}).items() if name != row.peer_name]
    return [
        row.id,
        _shape(row.shape),
        f"{row.ours:.4g} {row.unit}",
        f"{row.peer_name} {'-' if row.peer is None else f'{row.peer:.4g}'}",
        "-" if row.ratio is None else f"{row.ratio:.3f}",
        str(Goal(row.goal, row.at_most, "goal" in row.detail)),
        "yes" if row.meets else "no",
        error if isinstance(error, str) else "not finite" if error is None else f"{error:.1e}",
        ", ".join(peers),
    ]


def _shape(shape: dict[str, Any]) -> str:
    if not {"batch", "n_tokens", "plan", "density", "skew"} <= set(shape):
        return ", ".join(f"{name} {value}" for name, value in shape.items())
    heads = shape.get("model") or f"{shape['query_heads']}/{shape['kv_heads']} d{shape['head_dim']}"
    heads = f"{heads} b{shape['batch']} {shape['n_tokens']}"
    bits = f", {shape['bits']} bits" if "bits" in shape else ""
    return f"{heads} {shape['plan']} ({shape['density']:.0%}, skew {shape['skew']:.1f}{bits})"


def _peer(found: dict[str, Any]) -> str:
    return "failed" if "failed" in found else f"{found['rate']:.4g}"


def _note(record: BenchRecord) -> str:
    settings = record.settings
    ceilings = ", ".join(f"{name} {value:.4g}" for name, value in settings.get("ceilings", {}).items())
    versions = ", ".join(f"{name} {settings[name]}" for name in ("torch", "triton", "transformers") if settings.get(name))
    return f"{settings.get('device', 'unknown device')}; {ceilings or 'no ceilings'}; {versions}; error: relative, of our output"
