"""Cutting planes in a trust region close the last per mille of a dual bound: slower than Newton steps, but exact."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import linprog

from moa_lab.search.lagrange import Dual, Group, Relaxed

ROUNDS = 120
TOLERANCE = 1e-6


def polish(relaxed: Relaxed, start: np.ndarray, ceiling: float = np.inf) -> Dual:
    """Maximise a dual function from the multipliers `start` (K,).

    Every evaluation gives a plane above the concave dual; the next point maximises the minimum of the planes near the best point.
    Stops once the bound exceeds `ceiling`: with infeasible limits the dual has no maximum.
    """
    best = relaxed.dual(start)
    points, values, slopes = [start], [best.bound], [_slope(relaxed, best)]
    radius = 0.5
    for _ in range(ROUNDS):
        if best.bound > ceiling:
            break
        found = _master(np.array(points), np.array(values), np.array(slopes), best.multipliers, radius, relaxed.groups)
        if found is None:
            break
        trial, promised = found
        if promised - best.bound <= TOLERANCE * abs(best.bound) and radius >= 0.1:
            break
        dual = relaxed.dual(trial)
        points.append(trial)
        values.append(dual.bound)
        slopes.append(_slope(relaxed, dual))
        good = dual.bound - best.bound > 0.2 * (promised - best.bound)
        best = dual if dual.bound > best.bound else best
        radius = min(2 * radius, 4.0) if good else max(0.6 * radius, 1e-4)
    return best


def _slope(relaxed: Relaxed, dual: Dual) -> np.ndarray:
    return relaxed.used(dual.reduced) - relaxed.limit


def _master(
    points: np.ndarray, values: np.ndarray, slopes: np.ndarray, centre: np.ndarray, radius: float, groups: Sequence[Group]
) -> tuple[np.ndarray, float] | None:
    """The point within `radius` (relative) of the centre that maximises the minimum of the planes, and that minimum."""
    count = len(centre)
    size = radius * (centre + 0.1 * centre.mean() + 1e-9)
    # Scaled by the trust region and the bound, every variable is of order 1.
    unit = max(abs(float(values.max())), 1e-12)
    planes = np.column_stack([-slopes * size / unit, np.ones(len(values))])
    above = (values + ((centre - points) * slopes).sum(axis=1)) / unit
    bounds = [(max(-1.0, -c / s), 1.0) for c, s in zip(centre, size, strict=True)] + [(None, None)]
    sums = np.zeros((len(groups), count + 1))
    for row, (members, _) in enumerate(groups):
        sums[row, members] = size[members]
    result = linprog(
        np.append(np.zeros(count), -1.0), A_ub=planes, b_ub=above,
        A_eq=sums if len(groups) else None, b_eq=np.zeros(len(groups)) if len(groups) else None, bounds=bounds, method="highs",
    )  # fmt: skip
    if result.x is None:
        return None
    moved = np.maximum(centre + size * result.x[:count], 0.0)
    for members, weight in groups:
        total = moved[members].sum()
        # Clipping may zero a whole group; any weights of the right sum prove a bound, so the centre's do.
        moved[members] = moved[members] * (weight / total) if total > 0 else centre[members]
    return moved, float(result.x[-1]) * unit
