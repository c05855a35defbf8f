"""The search timed on a table of a 7B model's size (S1): the density slider, the exact solver, a front of plans."""

from __future__ import annotations

import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from math import ceil, floor
from statistics import median
from typing import Any

import numpy as np

from moa_lab.bench.lifelike import SEED, lifelike_table
from moa_lab.bench.record import GOALS, BenchRecord, BenchRow, Goal, judged
from moa_lab.provenance import provenance
from moa_lab.records import LossTable
from moa_lab.search import (
    BudgetAnswer,
    BudgetSolver,
    MilpAnswer,
    front_values,
    goal_sets,
    limit_lengths,
    mean_goal,
    non_dominated,
    search,
    solve_milp,
)
from moa_lab.search.goals import Goal as SearchGoal
from moa_lab.text import aligned

ROW = "S1"
SLIDER_MS = 50.0
EXACT_S = 10.0
FRONT_S = 300.0
"""Time limits of the three."""

MOST_GAP = 0.01
"""Largest proven gap allowed in the slider's solves."""

LEAST_PLANS = 10
"""Fewest non-dominated plans that a front must have."""

EXACT_GAP = 1e-4
ROUNDING = 1e-9

EXACT_DENSITIES = (0.25, 0.5, 0.75)
DENSITIES = tuple(step / 48 for step in range(5, 45))
"""Densities of the slider, 10% to 92%; `EXACT_DENSITIES` are among them."""

QUICK_DENSITIES = DENSITIES[1::6] + EXACT_DENSITIES
FRONT_DENSITY = 0.5


@dataclass(frozen=True)
class Move:
    """The slider moved to `density`: milliseconds of the solve, and its answer."""

    density: float
    ms: float
    answer: BudgetAnswer


@dataclass
class SearchBench:
    """A table, the densities to solve, and the exact answers so far. counts: whether rows may meet their goals."""

    table: LossTable
    densities: Sequence[float] = DENSITIES
    counts: bool = True
    exact: dict[tuple[str, float], MilpAnswer] = field(default_factory=dict)

    @property
    def goals(self) -> tuple[SearchGoal, ...]:
        """The mean of every set of goals that a search names; "mean" is that of the default ones."""
        return tuple(mean_goal(each.goals, name="mean" if each.name == "default" else each.name) for each in goal_sets(self.table))

    def shape(self, asked: str, goal: str, density: float | None = None) -> dict[str, Any]:
        """The problem of a row, as JSON data."""
        geometry = self.table.geometry
        return {
            "asked": asked, "goal": goal, "density": density, "layers": geometry.layers, "kv_heads": geometry.kv_heads,
            "rules": len(self.table.rules), "profiled_lengths": list(self.table.lengths), "limit_lengths": list(limit_lengths(self.table)),
            "objectives": len(self.table.objectives),
        }  # fmt: skip


def bench_search(progress: Callable[[int, int], None] | None = None, quick: bool = False) -> BenchRecord:
    """Measure row S1 on the CPU; some minutes.

    The table is random, with a fixed seed: 32 layers x 32 KV heads x 48 rules, two tasks at two lengths, in all forms. quick: 4 x 4 x 8,
    to test that everything runs; no row meets its goal. progress: called with steps done and steps in all.

    A row is trusted where every plan keeps its density at every length, counted in tokens, and has the loss that was stated; the
    slider's rows only where the exact answers also confirm its gaps.
    """
    bench = open_search(quick)
    steps = _steps(bench)
    rows: list[BenchRow] = []
    for done, step in enumerate(steps):
        if progress is not None:
            progress(done, len(steps))
        rows += step()
    if progress is not None:
        progress(len(steps), len(steps))
    ordered = sorted(rows, key=lambda row: ("slider", "exact", "front").index(row.shape["asked"].split(",")[0]))
    settings = {
        "device": f"{platform.machine()}, CPU", "cpus": os.cpu_count(), "quick": quick, "densities": list(bench.densities),
        "table": "drawn with a seed: heavy-tailed heads, losses that fall with the span", "seed": SEED, "most_gap": MOST_GAP,
        "least_plans": LEAST_PLANS, "exact_gap": EXACT_GAP, "scipy": metadata.version("scipy"), "numpy": metadata.version("numpy"),
    }  # fmt: skip
    return BenchRecord(tuple(ordered), settings, provenance(seed=SEED))


def open_search(quick: bool) -> SearchBench:
    """The table of the benchmark and the densities to solve."""
    return SearchBench(lifelike_table(quick), QUICK_DENSITIES if quick else DENSITIES, counts=not quick)


def _steps(bench: SearchBench) -> list[Callable[[], list[BenchRow]]]:
    """Exact solves first: the slider's answers are checked against them."""
    exact = [partial(_exact_step, bench, goal, density) for goal in bench.goals for density in EXACT_DENSITIES]
    slider = [partial(slider_rows, bench, goal) for goal in bench.goals]
    return [*exact, *slider, partial(_front_step, bench)]


def _exact_step(bench: SearchBench, goal: SearchGoal, density: float) -> list[BenchRow]:
    return [exact_row(bench, goal, density)]


def _front_step(bench: SearchBench) -> list[BenchRow]:
    return [front_row(bench)]


def keeps(table: LossTable, choice: np.ndarray, density: float) -> bool:
    """True where `choice` (layers, kv_heads) keeps at most `density` of the dense tokens at every limit length, counted head by head."""
    for length in limit_lengths(table):
        tokens = [rule.span_tokens(length, table.min_span) for rule in table.rules]
        dense = sum(table.geometry.dense_span_tokens(layer, length) for layer in range(table.geometry.layers)) * table.geometry.kv_heads
        kept = sum(
            min(tokens[rule], table.geometry.dense_span_tokens(layer, length))
            for layer, heads in enumerate(choice.tolist())
            for rule in heads
        )
        if kept > floor(density * dense + 1e-6):
            return False
    return True


def is_right(table: LossTable, goal: SearchGoal, density: float, answer: BudgetAnswer | MilpAnswer) -> bool:
    """True where an answer keeps its density, has the loss it states, and its bound and gap are consistent."""
    value = goal.value(table.predict(answer.choice))
    stated = abs(value - answer.value) <= ROUNDING * max(1.0, value)
    proven = answer.value * (1 - answer.gap) <= answer.bound + ROUNDING and answer.bound <= answer.value + ROUNDING
    return keeps(table, answer.choice, density) and stated and proven


def agrees(slider: BudgetAnswer, exact: MilpAnswer) -> bool:
    """True where the exact loss lies within the slider's gap, and neither loss is below the other's bound."""
    return slider.value * (1 - slider.gap) <= exact.value + ROUNDING and exact.bound <= slider.value + ROUNDING


def slider_rows(bench: SearchBench, goal: SearchGoal) -> list[BenchRow]:
    """Milliseconds of a solver at a new density: of a new solver's first one, and the median and the worst over all densities after it."""
    began = time.perf_counter()
    solver = BudgetSolver(bench.table, goal)
    made_ms = 1e3 * (time.perf_counter() - began)
    first = _moved(solver, FRONT_DENSITY)
    moves = [_moved(solver, density) for density in bench.densities]
    right = _are_right(bench, goal, [first, *moves])
    trusted = right and bench.counts and all(move.answer.gap <= MOST_GAP for move in [first, *moves])
    times = [move.ms for move in moves]
    detail: dict[str, Any] = {
        "made_ms": made_ms, "right": right, "first_ms": first.ms, "median_ms": median(times), "worst_ms": max(times),
        **_gaps(bench, goal, moves),
    }  # fmt: skip
    return [
        _judged(bench.shape(f"slider, {name}", goal.name), found, SLIDER_MS, "ms", trusted, detail)
        for name, found in (("first", first.ms), ("median", median(times)), ("worst", max(times)))
    ]


def _moved(solver: BudgetSolver, density: float) -> Move:
    began = time.perf_counter()
    answer = solver.solve(density)
    return Move(density, 1e3 * (time.perf_counter() - began), answer)


def _are_right(bench: SearchBench, goal: SearchGoal, moves: Sequence[Move]) -> bool:
    """True where all answers are right and agree with the exact ones, of which at least one must be known."""
    held = [(move.answer, bench.exact[goal.name, move.density]) for move in moves if (goal.name, move.density) in bench.exact]
    right = all(is_right(bench.table, goal, move.density, move.answer) for move in moves)
    return bool(held) and right and all(agrees(slider, exact) for slider, exact in held)


def _gaps(bench: SearchBench, goal: SearchGoal, moves: Sequence[Move]) -> dict[str, Any]:
    """The proven gaps, and the slider's actual excess over the exact loss."""
    gaps = [move.answer.gap for move in moves]
    above = {
        f"{move.density:.4g}": move.answer.value / bench.exact[goal.name, move.density].value - 1
        for move in moves
        if (goal.name, move.density) in bench.exact
    }
    return {
        "median_gap": median(gaps), "worst_gap": max(gaps), "densities": len(moves), "above_most_gap": sum(gap > MOST_GAP for gap in gaps),
        "above_exact": above, "moves": [{"density": move.density, "ms": move.ms, "gap": move.answer.gap} for move in moves],
    }  # fmt: skip


def exact_row(bench: SearchBench, goal: SearchGoal, density: float) -> BenchRow:
    """Seconds of the exact solver at one density; it must end before its time limit."""
    began = time.perf_counter()
    answer = solve_milp(bench.table, density, goal=goal, mip_gap=EXACT_GAP)
    seconds = time.perf_counter() - began
    bench.exact[goal.name, density] = answer
    right = is_right(bench.table, goal, density, answer)
    trusted = bench.counts and right and answer.status == "optimal"
    detail = {"right": right, "gap": answer.gap, "status": answer.status, "value": answer.value}
    return _judged(bench.shape("exact", goal.name, density), seconds, EXACT_S, "s", trusted, detail)


def front_row(bench: SearchBench) -> BenchRow:
    """Seconds of a search with its defaults; trusted with enough non-dominated plans that keep the density."""
    began = time.perf_counter()
    front = search(bench.table, FRONT_DENSITY)
    seconds = time.perf_counter() - began
    table = bench.table.with_plans(*(point.plan for point in front))
    choices = [table.choice(point.plan) for point in front]
    right = all(keeps(table, choice, FRONT_DENSITY) for choice in choices)
    stated = [point.predicted[name] - value for point, choice in zip(front, choices, strict=True)
              for name, value in table.predict(choice).items()]  # fmt: skip
    right = right and bool(np.abs(stated).max() <= ROUNDING)
    plans = int(non_dominated(front_values(front)).sum())
    gaps = [point.gap for point in front if point.gap is not None]
    detail = {
        "right": right, "plans": plans, "worst_gap": max(gaps, default=None), "median_gap": median(gaps) if gaps else None,
        "origins": dict(Counter(point.origin for point in front)), "found": front.settings.get("found"),
    }  # fmt: skip
    trusted = bench.counts and right and plans >= LEAST_PLANS
    return _judged(bench.shape("front", "all", FRONT_DENSITY), seconds, FRONT_S, "s", trusted, detail)


def _judged(shape: dict[str, Any], ours: float, limit: float, unit: str, trusted: bool, detail: dict[str, Any]) -> BenchRow:
    """A row with the time limit as the peer: the one solver to compare with needs a licence."""
    peers = {"Gurobi": {"failed": "not run: a licence is needed"}}
    return judged(ROW, GOALS[ROW], shape, ours, limit, "limit", unit, trusted, {**detail, "cpus": os.cpu_count(), "peers": peers})


def search_table(record: BenchRecord) -> str:
    """The record as lines of text: one row per measurement, then the size of the table and the device."""
    rows = [["row", "asked", "goal", "density", "ours", "limit", "ratio", "goal ratio", "meets", "gap", "plans"], *map(_cells, record)]
    shape = record.rows[0].shape
    size = f"{shape['layers']} layers x {shape['kv_heads']} KV heads x {shape['rules']} rules"
    return "\n".join(
        [*aligned(rows), f"{size}; {record.settings['device']}, {record.settings['cpus']} cores; gap: the largest that was proven"]
    )


def _cells(row: BenchRow) -> list[str]:
    gap = row.detail.get("gap", row.detail.get("worst_gap"))
    density = row.shape["density"]
    return [
        row.id,
        row.shape["asked"],
        row.shape["goal"],
        f"{row.detail['densities']} of them" if density is None else f"{density:.0%}",
        f"{row.ours:.4g} {row.unit}",
        "-" if row.peer is None else f"{row.peer:g} {row.unit}",
        "-" if row.ratio is None else f"{row.ratio:.3f}",
        str(Goal(row.goal, row.at_most)),
        "yes" if row.meets else "no",
        "-" if gap is None else f"{ceil(gap * 1e4) / 1e2:.2f}%",
        str(row.detail.get("plans", "-")),
    ]
