"""`bench_kernels`: the kernels measured on this GPU, against peers and ceilings measured in the same process."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moa_lab.bench.chunks import chunk_row
from moa_lab.bench.decode import decode_row, heterogeneity_row
from moa_lab.bench.lab import INTERPRETER, Lab, open_lab
from moa_lab.bench.memory import memory_row
from moa_lab.bench.paged import paged_row
from moa_lab.bench.prefill import prefill_rows
from moa_lab.bench.record import BENCH_SCHEMA, GOALS, TOLERANCE, BenchRecord, BenchRow, table
from moa_lab.bench.shapes import SHAPES, Shape, shapes_of
from moa_lab.bench.stored import stored_rows
from moa_lab.plan import Plan
from moa_lab.provenance import provenance, version_of

__all__ = ["BENCH_SCHEMA", "GOALS", "INTERPRETER", "ROWS", "BenchRecord", "BenchRow", "bench_kernels", "table"]

ROWS = tuple(SHAPES)
Together = Callable[[Shape, Lab, Collection[str]], list[BenchRow]]
_MEASURES: tuple[tuple[Together, tuple[str, ...]], ...] = ((stored_rows, ("B1", "B2", "B3")), (prefill_rows, ("P1", "P2", "P3")))
TOGETHER: dict[str, Together] = {row: measure for measure, rows in _MEASURES for row in rows}
"""Rows that share a measurement of their shapes."""


def bench_kernels(
    rows: Collection[str] = ROWS,
    quick: bool = False,
    plan: Plan | str | Path | None = None,
    out: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> BenchRecord:
    """Measure the rows named, of D1 to D4, P1 to P4, M1 and, of stored bits, B1 to B4; a few minutes on a GPU.

    quick: tiny shapes, to test that everything runs; also without a GPU under TRITON_INTERPRET=1 (set before Triton is imported),
    where no row meets its goal. plan: a plan or config card whose spans are stretched to the shapes; default: the recorded ones of
    50% and 25%. out: the record is written there after every shape. progress: called with shapes done and shapes in all.

    Raises ValueError for an unknown row, and where nothing can be measured.
    """
    unknown = sorted(set(rows) - set(ROWS))
    if unknown:
        raise ValueError(f"rows must be among {', '.join(ROWS)}, got {', '.join(unknown)}")
    lab = open_lab(quick, plan)
    tasks = _tasks(rows, quick, lab)
    found: list[BenchRow] = []
    for done, task in enumerate(tasks):
        if progress is not None:
            progress(done, len(tasks))
        found += task()
        lab.release()
        if out is not None:
            _record(found, lab, quick).save(out)
    if progress is not None:
        progress(len(tasks), len(tasks))
    return _record(found, lab, quick)


def _record(found: Collection[BenchRow], lab: Lab, quick: bool) -> BenchRecord:
    ordered = sorted(found, key=lambda row: ROWS.index(row.id))
    return BenchRecord(tuple(ordered), _settings(lab, quick), provenance(device=lab.name, seed=0))


def _tasks(rows: Collection[str], quick: bool, lab: Lab) -> list[Callable[[], list[BenchRow]]]:
    """One task per shape and measurement. Those that compile FlexAttention for prefill come last: they take long."""
    tasks: list[Callable[[], list[BenchRow]]] = []
    for row in ROWS:
        if row in rows and row not in TOGETHER:
            tasks += [partial(_one, row, shape, lab) for shape in shapes_of(row, quick, lab.plans)]
    wanted: dict[tuple[Together, Shape], list[str]] = {}
    for row, measure in TOGETHER.items():
        for shape in shapes_of(row, quick, lab.plans) if row in rows else ():
            wanted.setdefault((measure, shape), []).append(row)
    shared = sorted(wanted.items(), key=lambda item: item[0][1].flex)
    return [*tasks, *(partial(measure, shape, lab, names) for (measure, shape), names in shared)]


def _one(row: str, shape: Shape, lab: Lab) -> list[BenchRow]:
    alone: dict[str, Callable[[Shape, Lab], BenchRow]] = {"D2": heterogeneity_row, "P4": chunk_row, "M1": memory_row}
    alone |= {paged: partial(paged_row, paged) for paged in ("D4", "B4")}
    return [alone[row](shape, lab) if row in alone else decode_row(row, shape, lab)]


def _settings(lab: Lab, quick: bool) -> dict[str, Any]:
    ceilings = (
        {"copy_GB/s": lab.copy_bytes / 1e9, "read_GB/s": lab.read_bytes / 1e9, "matmul_TFLOP/s": lab.matmul_flops / 1e12}
        if lab.is_gpu
        else {}
    )
    return {
        "device": lab.name,
        "architecture": lab.architecture,
        "quick": quick,
        "dtype": str(lab.dtype).removeprefix("torch."),
        "tolerance": TOLERANCE,
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "flashinfer": version_of("flashinfer-python"),
        "ceilings": ceilings,
        "plans": {name: plan.identity() for name, plan in lab.plans.items()},
    }
