"""Decode over rings of 8 and 4 bits: bytes per second against a pure read (B1), and time against the same spans in 16 bits (B2, B3)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from moa_lab.bench.decode import GIGA, Measured, measure
from moa_lab.bench.lab import READ, Lab
from moa_lab.bench.record import GOALS, BenchRow, judged
from moa_lab.bench.shapes import Shape, Spans, described
from moa_lab.plan import WHOLE_BITS, Bits, told_bits

MIXES: dict[str, tuple[Bits, ...]] = {"B1": ((8, 8),), "B2": (WHOLE_BITS, (8, 8)), "B3": (WHOLE_BITS, (4, 4), (8, 4))}
"""Bits of K and V that a row measures."""


def stored_rows(shape: Shape, lab: Lab, rows: Collection[str]) -> list[BenchRow]:
    """The rows of `rows` (B1, B2, B3) at one shape; every mix of bits is measured once, over spans of the same tokens."""
    spans = lab.spans(shape)
    found: dict[Bits, Measured] = {}
    for mix in dict.fromkeys(mix for row in rows for mix in MIXES[row]):
        found[mix] = measure(replace(shape, bits=mix), spans, lab)[1]
        lab.release()
    return [
        _rate_row(replace(shape, bits=mix), spans, found[mix], lab)
        if row == "B1"
        else _time_row(row, replace(shape, bits=mix), spans, found[mix], found[WHOLE_BITS], lab)
        for row in rows
        for mix in MIXES[row]
        if mix != WHOLE_BITS
    ]


def _rate_row(shape: Shape, spans: Spans, ours: Measured, lab: Lab) -> BenchRow:
    """B1: useful bytes/s, as GB/s, codes and grids as they lie, against what a sum over bfloat16 reads."""
    read = {"by": lab.read_by, "ms_for_useful_bytes": ours.nbytes / lab.read_bytes * 1e3}
    detail = {**ours.detail, "useful_bytes": ours.nbytes, "read": read}
    rates = ours.rate / GIGA, lab.read_bytes / GIGA
    return judged("B1", GOALS["B1"], described(shape, spans), *rates, READ, "GB/s", lab.trusts(ours.errors), detail)


def _time_row(row: str, shape: Shape, spans: Spans, ours: Measured, whole: Measured, lab: Lab) -> BenchRow:
    """B2, B3: milliseconds against those of the kernel for 16 bits; a mix without a goal of its own has that of its row."""
    goal = GOALS.get(f"{row} {told_bits(shape.bits)}", GOALS[row])
    trusted = lab.trusts(ours.errors, whole.errors)
    detail = {**ours.detail, "useful_bytes": ours.nbytes, "16 bits": {**whole.detail, "useful_bytes": whole.nbytes}}
    return judged(row, goal, described(shape, spans), ours.ms, whole.ms, "16 bits", "ms", trusted, detail)
