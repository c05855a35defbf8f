"""The plans of a desk page: the best ones for densities in steps, measured ones, and those of a front, with what is known of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from moa_lab.evaluate.options import Option
from moa_lab.plan import Plan, dense_plan
from moa_lab.records import Front, LossTable, Measurement
from moa_lab.search import BudgetSolver, default_goals, mean_goal
from moa_lab.search.problem import limit_lengths

STEP = 0.025
"""Between two densities of the slider."""
MEAN = "mean"
"""The goal that plans of a budget are best in: the mean of the others."""


Progress = Callable[[int, int], object]


def _silent(done: int, total: int) -> None:
    """Nobody waits."""


@dataclass(frozen=True)
class Stop:
    """A plan of the page. kind: "chosen", "budget", "measured", "front" or "dense". predicted: loss by goal (0 dense, 1 with every head
    at the shortest rule); empty where none is known. rows: its measured scores.
    """

    plan: Plan
    kind: str
    predicted: dict[str, float]
    rows: tuple[Measurement, ...] = ()


def budget_stops(table: LossTable, step: float = STEP, progress: Progress = _silent) -> list[Stop]:
    """The plan of least predicted loss for every density from the least feasible one, rounded up to a step, up to below 1.

    progress: called with the densities solved, and all of them, before each. Raises ValueError for a step outside (0, 0.5].
    """
    if not 0 < step <= 0.5:
        raise ValueError(f"step must be a share above 0 and at most 0.5, got {step}")
    solver = BudgetSolver(table, mean_goal(default_goals(table)))
    lengths = limit_lengths(table)
    shortest = np.zeros((table.geometry.layers, table.geometry.kv_heads), dtype=np.int64)
    shortest += np.argmin(table.span_tokens(max(lengths)).sum(axis=0))
    least = max(table.density(shortest, n) for n in lengths)
    found = []
    counts = range(int(np.ceil(least / step)), int(np.ceil(1 / step)))
    for done, count in enumerate(counts):
        progress(done, len(counts))
        density = count * step
        choice = solver.solve(density).choice
        plan = table.plan(choice, f"budget {100 * density:.4g}%", lengths=lengths, search={"density": density})
        found.append(Stop(plan, "budget", predicted(table, plan)))
    return found


def measured_stops(options: Iterable[Option], table: LossTable | None) -> list[Stop]:
    """Measured plans with their scores, each named with its run."""
    return [
        Stop(
            one.plan.renamed(one.name), "measured", predicted(table, one.plan),
            tuple(row for row in one.rows if row.plan == one.plan.name),
        )
        for one in options
    ]  # fmt: skip


def front_stops(front: Front | None, table: LossTable | None) -> list[Stop]:
    """The plans of a front; what it says of them comes before what the table predicts."""
    return [Stop(point.plan, "front", predicted(table, point.plan) | point.predicted) for point in front or ()]


def all_stops(
    table: LossTable | None, front: Front | None, options: Sequence[Option], step: float = STEP, chosen: Plan | None = None,
    rows: Iterable[Measurement] = (), progress: Progress = _silent,
) -> tuple[Stop, ...]:  # fmt: skip
    """Every plan once, by density at the longest length, and the dense one: what was found in several ways keeps all that is known of it.

    chosen: one more plan, with its scores `rows`. progress: as of `budget_stops`. Raises ValueError where there is no plan at
    all, and for plans of different geometries.
    """
    found = [Stop(chosen, "chosen", predicted(table, chosen), tuple(rows))] if chosen is not None else []
    found += [
        *measured_stops(options, table),
        *front_stops(front, table),
        *(budget_stops(table, step, progress) if table is not None else ()),
    ]
    if not found:
        raise ValueError("a desk page needs a plan, a loss table, a front or measured plans: none of them is there")
    geometry = found[0].plan.geometry
    for stop in found:
        stop.plan.check_model(geometry)
    joined: dict[str, Stop] = {}
    for stop in found:
        if not stop.plan.is_dense:
            known = joined.get(stop.plan.identity())
            joined[stop.plan.identity()] = stop if known is None else _joined(known, stop)
    goals = dict.fromkeys((name for stop in found for name in stop.predicted), 0.0)
    length = longest(found, options)
    stops = sorted(joined.values(), key=lambda stop: stop.plan.density(length))
    return (*stops, Stop(dense_plan(geometry), "dense", goals, _dense_rows(options)))


def _joined(first: Stop, second: Stop) -> Stop:
    """One plan found twice: under its first name, a budget's where one of them is, with every score once."""
    rows = {(row.metric, row.task, row.length, row.value, row.n): row for row in (*first.rows, *second.rows)}
    kind = "budget" if "budget" in (first.kind, second.kind) else first.kind
    return Stop(first.plan, kind, second.predicted | first.predicted, tuple(rows.values()))


def longest(stops: Iterable[Stop], options: Iterable[Option] = ()) -> int:
    """The longest length in tokens that any plan names or was measured at, else the model's maximum."""
    stops = list(stops)
    named = [n for stop in stops for n in (*stop.plan.lengths, *(row.length for row in stop.rows))]
    measured = [row.length for option in options for row in option.rows]
    return max((*named, *measured), default=stops[0].plan.geometry.max_length)


def predicted(table: LossTable | None, plan: Plan) -> dict[str, float]:
    """Predicted loss by objective, by task, and their mean; empty where the table cannot tell: of another geometry, sink or floor, and
    for stored bits, of which it knows nothing.
    """
    if table is None or plan.bits or not plan.geometry.fits(table.geometry):
        return {}
    if (plan.sink_tokens, plan.min_span) != (table.sink_tokens, table.min_span) or plan.span_multiple != 1:
        return {}
    known = table.with_plans(plan)
    found = known.predict(known.choice(plan))
    goals = default_goals(table)
    return found | {goal.name: goal.value(found) for goal in (*goals, replace(mean_goal(goals), name=MEAN))}


def _dense_rows(options: Iterable[Option]) -> tuple[Measurement, ...]:
    """The dense model's scores, of each the one of most samples."""
    kept: dict[tuple[str, str, int], Measurement] = {}
    for row in (row for option in options for row in option.rows if row.plan == "dense"):
        key = (row.metric, row.task, row.length)
        if key not in kept or row.n > kept[key].n:
            kept[key] = row
    return tuple(kept.values())
