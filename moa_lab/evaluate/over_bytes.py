"""Measured plans of several runs as scores over the bytes that they keep, for a figure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from moa_lab.evaluate.options import NEEDLES, TEXTS, Option
from moa_lab.records import Measurement

RUN = "run"
"""Entry of a row's detail: where it was measured."""


def scores_over_bytes(options: Iterable[Option], task: str, length: int) -> list[Measurement]:
    """Scores of all plans, and the dense model's of most samples once, for a figure over density.

    Runs whose plans have one name and as many samples are a line: every row is named for them and for the bytes it keeps, as in
    "moa (standard-25, -50)-25". `detail["run"]` is a row's own run. The order is that of the runs' names.
    """
    found: list[Measurement] = []
    dense: Measurement | None = None
    lines: dict[tuple[str, int], list[str]] = {}
    for option in sorted(options, key=lambda one: one.source):
        for row in option.rows:
            if (row.task, row.length) == (task, length) and row.plan == option.plan.name:
                lines.setdefault((row.plan, row.n), []).append(option.source)
                found.append(replace(row, detail={**row.detail, RUN: option.source}))
            elif (row.task, row.length, row.plan) == (task, length, "dense") and (dense is None or row.n > dense.n):
                dense = row
    named = [replace(row, plan=f"{_line(row, lines[row.plan, row.n])}-{100 * row.density:.3g}") for row in found]
    return named if dense is None else [*named, dense]


def _line(row: Measurement, runs: Sequence[str]) -> str:
    known = [run for run in runs if run]
    return f"{row.plan} ({_together(known)})" if known else f"{row.plan}, n = {row.n}"


def _together(runs: Sequence[str]) -> str:
    """Names of runs; of those that differ after their last hyphen alone only that: "standard-25, -50"."""
    stems = {run.rpartition("-")[0] for run in runs}
    if len(runs) < 2 or len(stems) > 1 or "" in stems:
        return ", ".join(runs)
    return ", ".join([runs[0], *(f"-{run.rpartition('-')[2]}" for run in runs[1:])])


def measured_at(options: Iterable[Option], tasks: Iterable[str] = (NEEDLES, *TEXTS)) -> list[tuple[str, int]]:
    """Tasks and lengths that every plan was measured at, the longest length of a task first."""
    every = [{(row.task, row.length) for row in option.rows if row.plan == option.plan.name} for option in options]
    common = set.intersection(*every) if every else set()
    return [(task, length) for task in tasks for length in sorted({n for name, n in common if name == task}, reverse=True)]
