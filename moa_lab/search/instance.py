"""One problem to solve: a goal, limits on densities and on other goals, and the rules that each head may have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from moa_lab.engines import EngineLimits
from moa_lab.search.goals import Goal
from moa_lab.search.problem import Limits, Terms
from moa_lab.search.windows import Windows


@dataclass(frozen=True)
class Cap:
    """An epsilon constraint: a goal's value must not exceed `most`."""

    terms: Terms
    most: float

    @property
    def forgiving(self) -> float:
        """`most` plus a rounding tolerance, as limits are often computed values."""
        return self.most * (1 + 1e-6) + 1e-7

    def met_by(self, choice: np.ndarray) -> bool:
        """Whether a choice (heads,) meets the constraint."""
        return self.terms.value(choice) <= self.forgiving


@dataclass(frozen=True)
class Instance:
    """One problem: minimise `goal` within `limits` and `caps`.

    allowed: bool (heads, rules), heads of all layers in order. max_rules: distinct rules that a layer may have, None for any number.
    windows: those that an engine can hold, None for any.
    """

    goal: Terms
    limits: Limits
    caps: tuple[Cap, ...]
    allowed: np.ndarray
    layers: int
    max_rules: int | None
    windows: Windows | None = None

    def met_by(self, choice: np.ndarray) -> bool:
        """Whether a choice (heads,) meets every limit; `allowed` is not checked."""
        if self.max_rules is not None and max(len(set(row)) for row in choice.reshape(self.layers, -1).tolist()) > self.max_rules:
            return False
        if self.windows is not None and not self.windows.met_by(choice, self.limits):
            return False
        return self.limits.met_by(choice) and all(cap.met_by(choice) for cap in self.caps)


def highest_value(problem: Instance) -> float:
    """An upper bound on the goal over all allowed choices."""
    linear = np.where(problem.allowed, problem.goal.linear, -np.inf).max(axis=1).sum()
    worst = (term.weight * np.where(problem.allowed, term.rows, -np.inf).max(axis=2).sum(axis=1).max() for term in problem.goal.worst)
    return float(linear + sum(worst))


def with_caps(problem: Instance) -> Limits:
    """The density limits plus one row per cap. Worst rows are averaged: a weaker limit, so bounds stay proven."""
    limits = problem.limits
    if not problem.caps:
        return limits
    rows, most = [], []
    for cap in problem.caps:
        row = cap.terms.linear + sum((term.weight * term.rows.mean(axis=0) for term in cap.terms.worst), 0.0)
        unit = cap.most if cap.most > 1e-6 else 1.0
        rows.append(row / unit)
        most.append(cap.forgiving / unit)
    slack = np.concatenate([limits.slack, np.full(len(most), 1e-9)])
    return replace(limits, usage=np.concatenate([limits.usage, rows]), limit=np.concatenate([limits.limit, most]), slack=slack)


def limit_pairs(limits: Sequence[tuple[Goal, float]] | Mapping[str, float] | None) -> list[tuple[Goal, float]]:
    """Epsilon constraints as (goal, bound) pairs; a mapping names objectives."""
    if limits is None:
        return []
    if isinstance(limits, Mapping):
        return [(Goal(name, {name: 1.0}), most) for name, most in limits.items()]
    return list(limits)


def what_binds(targets: Mapping[int, float], caps: tuple[Cap, ...], max_rules: int | None, engine: EngineLimits | None = None) -> str:
    """One line: which limits together no plan can meet."""
    asked = ", ".join(f"{density:.4g} at {n}" for n, density in targets.items())
    others = [f"{len(caps)} limits on goals"] if caps else []
    others += [f"max_rules_per_layer {max_rules}"] if max_rules is not None else []
    others += [f"engine {engine.name} ({engine.told()})"] if engine is not None else []
    return (
        f"density {asked} together{' with ' + ' and '.join(others) if others else ''} is infeasible; raise the density or loosen the limits"
    )
