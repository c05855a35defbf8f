"""Which heads stay whole, found by measuring: a linear model of the loss, fitted to the choices it proposes itself.

A profile says what each head is worth while all others are whole, and adds that up. Heads are redundant, so sums mislead where few
heads are left. Here the loss of a choice of whole heads is measured, a Bayesian linear regression (loss on "head h is whole") is fitted
to all measured choices, those with a low loss weighing most, and the next choice is the best one under a draw from its posterior:
Thompson sampling with a linear model (Thompson, 1933; Agrawal and Goyal, 2013), over sets of heads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel

from moa_lab.calibration.samples import SampleSet
from moa_lab.evaluate.effects import MeasuredLosses
from moa_lab.records import Front, LossTable
from moa_lab.search.front import DENSITY, point
from moa_lab.search.goals import default_goals
from moa_lab.search.problem import Density, InfeasibleError, densities
from moa_lab.search.ranked import WholeHeads, head_scores

logger = logging.getLogger(__name__)

FLOORS = (128, 192)
FIRST_SHARE = 0.25
"""Share of the choices that are drawn around the best of the profile's rankings, before the model is asked."""
KEPT = 4
DRAWS = 20
"""Draws from the posterior before a choice that was measured already is given up."""

Progress = Callable[[int, int], None]
"""Called with (plans measured, plans in all)."""


def select_heads(
    model: PreTrainedModel,
    samples: SampleSet,
    table: LossTable,
    density: Density,
    *,
    plans: int = 256,
    floors: Sequence[int] = FLOORS,
    keep: int = KEPT,
    seed: int = 0,
    parts_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> Front:
    """The `keep` best plans of whole heads over a constant floor, of `plans` that are measured on `samples`.

    The loss is the mean over (task, length) of nats per answer token, as in validation, which must choose among the points.
    floors: spans in tokens of the heads that are not whole; those that the density or the table does not allow are left out.
    `density` and its lengths are as in `search`. parts_dir keeps what was measured, so that the same call after a kill goes on.
    Raises InfeasibleError when no floor is left, ValueError for fewer than 2 plans.
    """
    if plans < 2 or keep < 1:
        raise ValueError(f"plans must be at least 2 and keep at least 1, got {plans} and {keep}")
    arms = _arms(table, density, floors)
    measured = MeasuredLosses(model, samples, parts_dir)
    rng = np.random.default_rng(seed)
    known: dict[str, tuple[float, int, np.ndarray]] = {}

    def measure(floor: int, price: np.ndarray) -> float | None:
        """The loss of the choice at these prices; None where it is known."""
        choice = arms[floor].choice(price)
        plan = table.plan(choice, "selected")
        if plan.identity() in known:
            return None
        if progress:
            progress(len(known), plans)
        known[plan.identity()] = (float(np.mean(list(measured(plan).values()))), floor, choice)
        return known[plan.identity()][0]

    # The rankings themselves come first, and the best of them is what the others are drawn around.
    rankings = _rankings(table, max(arms))
    ranked = [(measure(floor, -scores), index) for index, scores in enumerate(rankings) for floor in arms if len(known) < plans]
    _, best_ranking = min((loss, index) for loss, index in ranked if loss is not None)
    learner = _LinearLoss(rankings[best_ranking], tuple(arms))
    for loss, floor, choice in known.values():
        learner.learn(arms[floor].whole(choice).ravel(), floor, loss)
    first = len(known) + int(FIRST_SHARE * (plans - len(known)))
    for step in range(len(known), plans):
        for _ in range(DRAWS):
            floor, price = learner.around_prior(rng) if step < first else learner.drawn(rng, arms)
            found = measure(floor, price)
            if found is not None:
                learner.learn(arms[floor].whole(arms[floor].choice(price)).ravel(), floor, found)
                break
    if progress:
        progress(plans, plans)
    best = sorted(known.values(), key=lambda found: found[0])[:keep]
    logger.info("%d choices of whole heads measured: losses %.4f to %.4f", len(known), best[0][0], max(f[0] for f in known.values()))
    targets, goals = densities(table, density), default_goals(table)
    points = [
        point(
            table, choice, name=f"selected-{rank}", origin="selected", lengths=targets, goals=goals,
            search={"floor_tokens": floor, "calibration_loss": loss, "whole_heads": int(arms[floor].whole(choice).sum())},
        )
        for rank, (loss, floor, choice) in enumerate(best, start=1)
    ]  # fmt: skip
    settings = {
        "solver": "select", "plans": len(known), "floors": list(arms), "seed": seed, "density": {str(n): d for n, d in targets.items()},
        "losses": [loss for loss, _, _ in known.values()],
    }  # fmt: skip
    return Front(tuple(points), (*(objective.name for objective in table.objectives), DENSITY), settings, table.provenance)


def _arms(table: LossTable, density: Density, floors: Sequence[int]) -> dict[int, WholeHeads]:
    arms, reason = {}, ""
    for floor in sorted(set(floors)):
        try:
            arms[floor] = WholeHeads(table, density, floor)
        except ValueError as error:
            reason = str(error)
    if not arms:
        raise InfeasibleError(reason or "floors is empty: give at least one span in tokens")
    return arms


def _rankings(table: LossTable, floor_tokens: int) -> list[np.ndarray]:
    """Standardised scores (heads,): of every task, and their mean."""
    tasks = sorted({objective.task for objective in table.objectives})
    scores = [_standardised(head_scores(table, task, floor_tokens)) for task in tasks]
    return [*scores, np.mean(scores, axis=0)] if len(scores) > 1 else scores


def _standardised(scores: np.ndarray) -> np.ndarray:
    logs = np.log(np.maximum(scores, 1e-12 * max(float(scores.max()), 1e-300)))
    return np.asarray((logs - logs.mean()) / max(float(logs.std()), 1e-12))


class _LinearLoss:
    """Loss = intercept + floor + sum of the effects of the heads that are whole. The prior says that heads of high score matter."""

    def __init__(self, scores: np.ndarray, floors: tuple[int, ...]) -> None:
        self._scores, self._floors = scores, floors
        self._rows: list[np.ndarray] = []
        self._losses: list[float] = []

    def learn(self, whole: np.ndarray, floor: int, loss: float) -> None:
        """Take in a measured choice; whole: boolean (heads,)."""
        self._rows.append(self._features(whole, floor))
        self._losses.append(loss)

    def around_prior(self, rng: np.random.Generator) -> tuple[int, np.ndarray]:
        """A floor, and prices (heads,) that mostly follow the scores (Gumbel noise: heads drawn by their score's exponential)."""
        return int(rng.choice(self._floors)), -(2 * self._scores + rng.gumbel(size=len(self._scores)))

    def drawn(self, rng: np.random.Generator, arms: dict[int, WholeHeads]) -> tuple[int, np.ndarray]:
        """The floor and prices (heads,) of the best choice under a draw from the posterior."""
        mean, root = self._posterior()
        effects = mean + root @ rng.standard_normal(len(mean))
        price = effects[: len(self._scores)]
        expected = {floor: self._features(arms[floor].whole(arms[floor].choice(price)).ravel(), floor) @ effects for floor in arms}
        return min(expected, key=lambda floor: expected[floor]), price

    def _features(self, whole: np.ndarray, floor: int) -> np.ndarray:
        return np.concatenate([whole.astype(np.float64), [floor == other for other in self._floors]])

    def _posterior(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean (heads + floors,) and a root of the covariance."""
        x, y = np.stack(self._rows), np.array(self._losses)
        heads = len(self._scores)
        # Near the optimum a linear model will do: losses count the less, the further they are above the best.
        spread = max(float(np.median(y) - y.min()), 1e-6)
        weight = np.exp(-(y - y.min()) / spread)
        # How much of the score is an effect is itself fitted: one number, from all choices.
        told = x[:, :heads] @ self._scores
        slope = min(float(((told - told.mean()) @ (y - y.mean())) / max(float(((told - told.mean()) ** 2).sum()), 1e-12)), 0.0)
        prior = np.concatenate([slope * self._scores, np.full(len(self._floors), np.average(y - slope * told, weights=weight))])
        deviation = max(abs(slope), spread / np.sqrt(heads))
        precision = np.concatenate([np.full(heads, deviation**-2), np.full(len(self._floors), (10 * spread) ** -2)])
        residual = y - x @ prior
        noise = max(float(np.average(residual**2, weights=weight)), 1e-12)
        for _ in range(2):
            # Once with the noise about the prior, then with what is left about the fit.
            matrix = (x.T * (weight / noise)) @ x + np.diag(precision)
            shift = np.linalg.solve(matrix, x.T @ (weight / noise * residual))
            noise = max(float(np.average((residual - x @ shift) ** 2, weights=weight)), 1e-3 * noise)
        # matrix = L L^T, so L^-T has the covariance's square.
        return prior + shift, np.linalg.inv(np.linalg.cholesky(matrix)).T
