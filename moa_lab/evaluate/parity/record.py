"""The record of a parity check, and its table."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moa_lab.provenance import Provenance
from moa_lab.storage import parse, read_json, to_json, write_json
from moa_lab.text import aligned

PARITY_SCHEMA = "moa-lab/parity/1"


@dataclass(frozen=True)
class ParityRow:
    """One case.

    compared: in words, with tokens per row. positions: number of positions (or needles) compared.
    difference: the largest |logit - reference|, in standard deviations of the reference's logits at that position; where only tokens are
    known, how far a token's reference logit lies below the best, in the same unit; for bytes |allocated / predicted - 1|; for needles
    |loss / reference - 1|. None where it is not finite. tolerance: for `difference`; twice that of logits where only tokens are known.
    decided: positions whose best two reference logits are further apart than twice the tolerance of logits. agreement: share of these
    with the same likeliest token (for bytes, of caches; for needles, of answers, of which 2% may differ). None where none is decided.
    """

    name: str
    compared: str
    positions: int
    difference: float | None
    agreement: float | None
    decided: int
    tolerance: float
    passed: bool


@dataclass(frozen=True)
class Parity:
    """All cases, with the settings and the provenance of the run."""

    rows: tuple[ParityRow, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    provenance: Provenance = field(default_factory=Provenance)

    @property
    def passed(self) -> bool:
        """True where every case passed, and there was one."""
        return bool(self.rows) and all(row.passed for row in self.rows)

    def row(self, name: str) -> ParityRow:
        """The case of that name; KeyError where it was left out."""
        return {row.name: row for row in self.rows}[name]

    def save(self, path: str | Path) -> Path:
        """Write one JSON file."""
        return write_json(path, {"schema": PARITY_SCHEMA, **to_json(self)})

    @classmethod
    def load(cls, path: str | Path) -> Parity:
        """Read a record of parity; raises RecordError for a broken or foreign file."""
        data = read_json(path, PARITY_SCHEMA)
        return parse(cls, {name: value for name, value in data.items() if name != "schema"}, path)


def table(found: Parity) -> str:
    """The cases as lines of text, what was left out, and the verdict."""
    head = ["case", "compared", "positions", "difference", "tolerance", "same token", ""]
    rows = [[*_cells(row), "passed" if row.passed else "FAILED"] for row in found.rows]
    lines = aligned([head, *rows])
    lines += [f"left out: {reason}" for reason in found.settings.get("left_out", ())]
    failed = sum(not row.passed for row in found.rows)
    verdict = f"{failed} of {len(found.rows)} cases failed" if failed else f"all {len(found.rows)} cases passed"
    note = "differences in standard deviations of a position's logits; same token: where the reference's best two are clearly apart"
    return "\n".join([*lines, note, verdict])


def _cells(row: ParityRow) -> list[str]:
    difference = "not finite" if row.difference is None else f"{row.difference:.2g}"
    agreement = "-" if row.agreement is None else f"{row.agreement:.1%} of {row.decided}"
    return [row.name, row.compared, str(row.positions), difference, f"{row.tolerance:.2g}", agreement]
