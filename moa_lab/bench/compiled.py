"""What the kernels take on chips that they are compiled for, beside those that they were run on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moa_lab.bench.record import BenchRecord
from moa_lab.storage import read_json

COMPILED_SCHEMA = "moa-lab/compiled/1"
NAMED = {"NVIDIA H100 80GB HBM3": "sm_90", "NVIDIA H200": "sm_90"}
"""Of devices in records that do not tell their architecture."""


def chips_table(path: str | Path, measured: Iterable[BenchRecord]) -> list[dict[str, Any]]:
    """A row a chip of the record at `path`: devices of its architecture that `measured` kernels ran on, and what the kernels take.

    Shared memory is a program's, in KiB, and registers are a thread's: the most that a kernel takes, of what there is. spill: kernels
    that do, in all the shapes that were compiled; spill here alone: those that do not on an architecture that they were run on, and the
    most bytes that a thread of these spills. Raises RecordError for a broken or foreign file.
    """
    record = read_json(path, COMPILED_SCHEMA)
    ran: dict[str | None, set[str]] = defaultdict(set)
    for found in measured:
        ran[found.settings.get("architecture") or NAMED.get(found.settings["device"])].add(found.settings["device"])
    elsewhere = {_what(row) for row in record["rows"] if row["chip"] in ran and row["spilled"]}
    table = []
    for chip, limits in record["chips"].items():
        rows = [row for row in record["rows"] if row["chip"] == chip]
        alone = [row["spilled"] for row in rows if row["spilled"] and _what(row) not in elsewhere]
        table.append(
            {
                "chip": chip,
                "run on": ", ".join(sorted(ran[chip])) if chip in ran else "compiled only",
                "kernels": len(rows),
                "shared KiB": f"{max(row['shared'] for row in rows) / 1024:.0f} of {limits['shared'] / 1024:.0f}",
                "registers": f"{max(row['registers'] for row in rows)} of {limits['registers']}",
                "spill": sum(row["spilled"] > 0 for row in rows),
                "spill here alone": len(alone),
                "bytes": max(alone, default=0),
            }
        )
    return table


def _what(row: dict[str, Any]) -> tuple[str, str]:
    return row["case"], row["kernel"]
