"""The exact solver: one rule per head by mixed-integer programming (HiGHS), made smaller first by the relaxation's bound."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moa_lab.records import LossTable
from moa_lab.search import highs
from moa_lab.search.exchange import exchange
from moa_lab.search.goals import Goal
from moa_lab.search.instance import Cap, Instance, highest_value, limit_pairs, what_binds, with_caps
from moa_lab.search.lagrange import Dual
from moa_lab.search.layers import EXACT
from moa_lab.search.problem import (
    Density,
    InfeasibleError,
    NoPlanError,
    Pinned,
    Usage,
    allowed_rules,
    check_feasible,
    densities,
    rules_in_a_layer,
    terms,
)
from moa_lab.search.program import condensed, decode, program
from moa_lab.search.reduction import CORE_PER_HEAD, few_rules, few_windows, promising, weighted_cost, worth_keeping
from moa_lab.search.relaxation import THOROUGH, Relaxation, relative_gap, relax
from moa_lab.search.windows import windows_of

EFFORT = 2
"""The relaxation searches harder here than for the slider: every per mille of the gap saves the solver seconds."""


@dataclass(frozen=True)
class MilpAnswer:
    """A choice (layers, kv_heads), its goal value, the proven bound and gap = (value - bound) / value.

    `status`: "optimal" (within the asked gap), "time_limit" or "cancelled" (the best known then).
    """

    choice: np.ndarray
    value: float
    bound: float
    gap: float
    status: str
    seconds: float


def solve_milp(
    table: LossTable,
    density: Density,
    *,
    goal: Goal | None = None,
    lengths: Iterable[int] | None = None,
    limits: Sequence[tuple[Goal, float]] | Mapping[str, float] | None = None,
    max_rules_per_layer: int | None = None,
    pinned: Pinned | None = None,
    time_limit_s: float = 60.0,
    mip_gap: float = 1e-4,
    cancel: threading.Event | None = None,
) -> MilpAnswer:
    """Minimise `goal` (None: the mean of the default goals) with density at most `density` at every limit length.

    `density`: one number for `lengths` (default: the profiled lengths and twice the longest), or {length: density}.
    `limits`: upper bounds on other goals, as (goal, bound) pairs or {objective name: bound} (epsilon constraints).
    `max_rules_per_layer`: at most so many distinct rules in any layer. `pinned`: {(layer, kv_head): rule index}. Where the table has an
    engine, density is of what that allocates, and the windows are as few as it holds (for one window a layer see `held_table`).
    `cancel`: when set, the solver's process is ended and the best choice known is returned with status "cancelled".

    Raises InfeasibleError (a ValueError) naming what binds, NoPlanError when stopped before any feasible choice was known.
    """
    began = time.perf_counter()
    targets = densities(table, density, lengths)
    within = Usage(table, targets).limits(targets)
    max_rules_per_layer = rules_in_a_layer(table, max_rules_per_layer)
    check_feasible(table, within, pinned, max_rules_per_layer)
    caps = tuple(Cap(terms(table, other), float(most)) for other, most in limit_pairs(limits))
    problem = Instance(
        terms(table, goal), within, caps, allowed_rules(table, pinned), table.geometry.layers, max_rules_per_layer,
        windows_of(table, within.lengths),
    )  # fmt: skip
    status, choice, bound = _solve(problem, time_limit_s, mip_gap, cancel, began)
    if status == "infeasible":
        raise InfeasibleError(what_binds(targets, caps, max_rules_per_layer, table.engine))
    if choice is None:
        raise NoPlanError(
            f"no plan was found before the search stopped ({status}); raise time_limit_s ({time_limit_s} s) or loosen the limits"
        )
    value = problem.goal.value(choice)
    bound = min(bound, value)
    return MilpAnswer(
        choice.reshape(table.geometry.layers, -1), value, bound, relative_gap(value, bound), status, time.perf_counter() - began
    )


def _solve(
    problem: Instance, time_limit_s: float, mip_gap: float, cancel: threading.Event | None, began: float
) -> tuple[str, np.ndarray | None, float]:
    within = with_caps(problem)
    relaxed = relax(problem.goal, within, problem.allowed, EFFORT)
    bound, known = relaxed.dual.bound, relaxed.choice
    # With infeasible limits the dual has no maximum: a bound above every possible value proves that.
    ceiling = 2 * highest_value(problem) + 1e-6
    if known is None and bound > ceiling:
        return "infeasible", None, bound
    shared: Dual | None = None
    if problem.max_rules is not None and (known is None or not problem.met_by(known)):
        shared, found = few_rules(problem, within, relaxed, ceiling)
        bound = shared.bound if problem.max_rules <= EXACT else bound
        if bound > ceiling:
            return "infeasible", None, bound
        feasible = [choice for choice in found if problem.met_by(choice)]
        known = min(feasible, key=problem.goal.value) if feasible else None
    near = np.zeros_like(problem.allowed)
    if problem.windows is not None and (known is None or not problem.met_by(known)):
        near, found = few_windows(problem, within, relaxed.dual.multipliers, weighted_cost(problem, relaxed))
        known = min((choice for choice in found if problem.met_by(choice)), key=problem.goal.value, default=None)
    known = known if known is not None and problem.met_by(known) else None
    value = problem.goal.value(known) if known is not None else np.inf
    if relative_gap(value, bound) <= mip_gap and known is not None:
        return "optimal", known, bound
    keep = worth_keeping(problem, relaxed, shared, value)
    scale = 10 / max(value if np.isfinite(value) else bound, 1e-6)
    free = problem.max_rules is None and problem.windows is None
    if near.any() or (free and keep.sum() > CORE_PER_HEAD * len(keep)):
        # The most promising entries are solved first: a better known choice rules out more of the full program.
        core = keep & (near if near.any() else promising(relaxed, len(keep)))
        left = time_limit_s - (time.perf_counter() - began)
        outcome = _program(problem, core, scale, relaxed, max(left / 3, 0.1), mip_gap, cancel)
        known = _improved(problem, known, outcome.choice)
        if free and known is not None:
            known = _improved(problem, known, exchange(problem.goal, within, relaxed.relaxed, relaxed.dual, known, THOROUGH))
            # A choice with another entry costs that entry's lead more than the bound at least.
            bound = max(bound, min(outcome.bound, relaxed.dual.bound + relaxed.dual.lead[keep & ~core].min(initial=np.inf)))
        value = problem.goal.value(known) if known is not None else np.inf
        if outcome.status == "cancelled" or (known is not None and relative_gap(value, bound) <= mip_gap):
            return ("cancelled" if outcome.status == "cancelled" else "optimal"), known, bound
        keep = worth_keeping(problem, relaxed, shared, value)
    left = max(time_limit_s - (time.perf_counter() - began), 0.1)
    outcome = _program(problem, keep, scale, relaxed, left, mip_gap, cancel)
    if outcome.status == "infeasible":
        # Reduced-cost fixing keeps every choice better than the known one: when none is left, the known one is optimal.
        return ("infeasible", None, bound) if known is None else ("optimal", known, value)
    bound = max(bound, min(outcome.bound, value))
    return outcome.status, _improved(problem, known, outcome.choice), bound


@dataclass(frozen=True)
class _Outcome:
    """`highs.Outcome` with the choice (heads,), feasible or not, and the bound of the goal's value."""

    status: str
    choice: np.ndarray | None
    bound: float


def _program(
    problem: Instance, keep: np.ndarray, scale: float, relaxed: Relaxation, seconds: float, mip_gap: float, cancel: threading.Event | None
) -> _Outcome:
    """What HiGHS finds among the entries `keep`; where a head has none, no choice is as good as the known one."""
    if not keep.any(axis=1).all():
        return _Outcome("infeasible", None, np.inf)
    model, entries = program(problem, keep, scale)
    if problem.max_rules is None and problem.windows is None:
        short = condensed(model, entries, relaxed.dual.lead)
        outcome = highs.solve(short.model, time_limit_s=seconds, mip_gap=mip_gap, cancel=cancel)
        x = short.whole(outcome.x)
    else:
        outcome = highs.solve(model, time_limit_s=seconds, mip_gap=mip_gap, cancel=cancel)
        x = outcome.x
    return _Outcome(outcome.status, None if x is None else decode(x, entries, problem.allowed.shape), outcome.bound / scale)


def _improved(problem: Instance, known: np.ndarray | None, found: np.ndarray | None) -> np.ndarray | None:
    """The choice `found` where it is feasible and better than the known one."""
    if found is None:
        return known
    better = known is None or problem.goal.value(found) < problem.goal.value(known)
    return found if better and problem.met_by(found) else known
