"""Predictors of a plan's loss, and random plans of equal density to test them on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from moa_lab.plan import SpanRule
from moa_lab.records import Form, InfluenceProfile, LossTable
from moa_lab.search import Goal, loss_table, mean_goal, paper_goals
from moa_lab.search.goals import default_goals
from moa_lab.search.problem import Density, Usage, densities

SPREAD = 1.5
"""Standard deviation of the logarithm of random spans: some heads whole, many at the floor."""
BISECTIONS = 40
FOLDS = 5
RIDGES = tuple(10.0**power for power in range(-2, 5))

Predictor = Callable[[np.ndarray], float]
"""Takes a choice (layers, kv_heads), returns the plan's predicted loss."""


def random_choices(table: LossTable, density: Density, count: int, seed: int = 0) -> list[np.ndarray]:
    """Choices (layers, kv_heads) of equal density: log-normal spans, scaled up until they reach a limit."""
    targets = densities(table, density)
    limits = Usage(table, targets).limits(targets)
    spans = np.mean([table.span_tokens(n) / n for n in targets], axis=0)
    order = np.argsort(spans, axis=1)
    rng = np.random.default_rng(seed)
    return [_within(limits.met_by, spans, order, np.exp(SPREAD * rng.standard_normal(_shape(table)))) for _ in range(count)]


def chances_of(choices: Sequence[np.ndarray], rules: int) -> np.ndarray:
    """How often each rule is chosen for each head: (heads, rules)."""
    return np.asarray(np.mean([np.eye(rules)[choice.ravel()] for choice in choices], axis=0))


def predictors(
    profile: InfluenceProfile, under_plans: InfluenceProfile | None = None, rules: Sequence[SpanRule] | None = None
) -> dict[str, Predictor]:
    """Predictors by name. under_plans: a profile of the same samples with the model under other plans. rules: those that a choice
    numbers; None: of `loss_table(profile)`."""
    span = loss_table(profile, rules)
    found = {
        "element, sum": _goal_of(loss_table(profile, span.rules, estimator="element"), paper_goals),
        "span, sum": _goal_of(span, paper_goals),
        "span, all or nothing": _goal_of(span, lambda table: _all_of(table, "all_or_nothing")),
        "span, worst distance": _goal_of(span, lambda table: _all_of(table, "worst_distance")),
        "span, default": _goal_of(span, default_goals),
    }
    if under_plans is not None:
        found["span under plans, sum"] = _goal_of(loss_table(under_plans, span.rules), paper_goals)
    return found


def merged(profiles: Sequence[InfluenceProfile]) -> InfluenceProfile:
    """One profile of the samples of several: blocks are averaged, values per sample concatenated."""
    first = profiles[0]
    together = {
        name: {key: np.concatenate([getattr(one, name)[key] for one in profiles]) for key in getattr(first, name)}
        for name in ("distances", "span_effects")
    }
    blocks = {key: np.mean([one.blocks[key] for one in profiles], axis=0) for key in first.blocks}
    return InfluenceProfile(first.geometry, first.sink_tokens, blocks, provenance=first.provenance, **together)


def regressed(table: LossTable, choices: Sequence[np.ndarray], losses: Sequence[float], seed: int = 0) -> np.ndarray:
    """Losses of `choices`, (choices,), cross-validated: each fold is predicted by a ridge regression fitted on the others.

    Its features are the predicted losses of every head (mean of the default goals), so it corrects the profile head by head; the
    ridge is the one of `RIDGES` that does best within the other folds (Hoerl and Kennard, 1970).
    """
    x, y = _head_losses(table, choices), np.asarray(losses, dtype=np.float64)
    parts = _folds(len(y), seed)
    predicted = np.empty(len(y))
    for part in parts:
        rest = np.setdiff1d(np.arange(len(y)), part)
        inner = [np.setdiff1d(rest, other) for other in parts if other is not part]
        errors = [sum(_error(x, y, kept, np.setdiff1d(rest, kept), ridge) for kept in inner) for ridge in RIDGES]
        predicted[part] = _ridge(x[rest], y[rest], RIDGES[int(np.argmin(errors))])(x[part])
    return predicted


def _error(x: np.ndarray, y: np.ndarray, seen: np.ndarray, left_out: np.ndarray, ridge: float) -> float:
    return float(((_ridge(x[seen], y[seen], ridge)(x[left_out]) - y[left_out]) ** 2).sum())


def _ridge(x: np.ndarray, y: np.ndarray, ridge: float) -> Callable[[np.ndarray], np.ndarray]:
    """Ridge regression that shrinks coefficients towards one shared by all features, not towards 0."""
    total = x.sum(axis=1)
    shared = float(np.cov(total, y)[0, 1] / max(float(total.var(ddof=1)), 1e-12))
    scale = np.maximum(x.std(axis=0), 1e-9)
    residual = y - shared * total
    centred = (x - x.mean(axis=0)) / scale
    shift = np.linalg.solve(centred.T @ centred + ridge * np.eye(x.shape[1]), centred.T @ (residual - residual.mean()))
    return lambda new: np.asarray(shared * new.sum(axis=1) + residual.mean() + (new - x.mean(axis=0)) / scale @ shift)


def _head_losses(table: LossTable, choices: Sequence[np.ndarray]) -> np.ndarray:
    """Share of every head in the mean of the default goals: (choices, heads)."""
    shares = mean_goal(default_goals(table)).shares
    cost = sum(shares.get(o.name, 0.0) * table.losses[slice(*o.rows)].mean(axis=0) for o in table.objectives)
    return np.stack([np.take_along_axis(np.asarray(cost), choice[:, :, None], axis=2).ravel() for choice in choices])


def _folds(count: int, seed: int) -> list[np.ndarray]:
    return [part for part in np.array_split(np.random.default_rng(seed).permutation(count), FOLDS) if len(part)]


def _goal_of(table: LossTable, goals: Callable[[LossTable], Sequence[Goal]]) -> Predictor:
    goal = mean_goal(goals(table))
    return lambda choice: goal.value(table.predict(choice))


def _all_of(table: LossTable, form: Form) -> Sequence[Goal]:
    forms: Mapping[str, Form] = {objective.task: form for objective in table.objectives}
    return default_goals(table, forms=forms)


def _shape(table: LossTable) -> tuple[int, int]:
    return table.geometry.layers, table.geometry.kv_heads


def _within(fits: Callable[[np.ndarray], bool], spans: np.ndarray, order: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """The rules next below `drawn`, times the largest factor that `fits`. spans: (layers, R), share kept; order sorts its rows."""
    best = np.repeat(order[:, :1], drawn.shape[1], axis=1)
    low, high = 0.0, 1.0 / drawn.min()
    for _ in range(BISECTIONS):
        factor = (low + high) / 2
        at = [
            np.searchsorted(row[index], factor * wanted, side="right") - 1 for row, index, wanted in zip(spans, order, drawn, strict=True)
        ]
        choice = np.take_along_axis(order, np.maximum(np.stack(at), 0), axis=1)
        if fits(choice.ravel()):
            low, best = factor, choice
        else:
            high = factor
    return best
