"""From a good plan to a better one: a few heads at a time are moved where the loss, taken under the plan itself, says it pays.

A profile of the dense model says what each head is worth while all the others are whole. Under a plan others have gone, and what
is left is worth more. The gradient under the plan knows that, but only for small changes: a plan that is optimal for it as a
whole is far away and bad. So every round asks for the best plans that differ in a few heads, measures them, and goes on from
the best (a trust region: Conn, Gould and Toint, 2000). Every round's plan has a lower measured loss than the one before.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel

from moa_lab.calibration.samples import SampleSet
from moa_lab.evaluate.scoring import mean_losses, score_samples
from moa_lab.evaluate.store import ScoreStore
from moa_lab.plan import Plan
from moa_lab.profiling import span_effects
from moa_lab.records import Front, FrontPoint, LossTable, Objective
from moa_lab.search.budget import BudgetSolver
from moa_lab.search.front import DENSITY, point
from moa_lab.search.goals import Goal, default_goals
from moa_lab.search.losses import rule_effects
from moa_lab.search.milp import solve_milp
from moa_lab.search.problem import Density, densities

logger = logging.getLogger(__name__)

MOVES = (1, 2, 3, 4, 6, 8, 12)
"""Heads that a round may move: one plan is made and measured for each number."""
BISECTIONS = 24

Progress = Callable[[int, int], None]
"""Called with (rounds done, rounds in all)."""


def refine(
    model: PreTrainedModel,
    plan: Plan,
    samples: SampleSet,
    table: LossTable,
    density: Density,
    *,
    rounds: int = 4,
    moves: Sequence[int] = MOVES,
    max_rules_per_layer: int | None = None,
    parts_dir: str | Path | None = None,
    store: ScoreStore | None = None,
    progress: Progress | None = None,
) -> Front:
    """The plan of every round that lowers the loss on `samples`, at most `rounds` of them; empty when none does.

    The loss is the mean over (task, length) of nats per answer token, as in validation. samples: calibration samples; validation
    must choose among the start and the points, since these were chosen by `samples`. table: the rules to choose from, and
    what predicts the points' losses; `density` and its lengths are as in `search`. parts_dir and store keep gradients and scores,
    so that the same call after a kill goes on. Raises ValueError for a plan of another geometry or with rules that the table
    lacks, and InfeasibleError as `search` does.
    """
    if rounds < 1 or not moves or min(moves) < 1:
        raise ValueError(f"rounds and moves must be at least 1, got rounds {rounds}, moves {tuple(moves)}")
    targets = densities(table, density)
    neighbours = _Neighbours(table, targets, max_rules_per_layer)
    choice, here = table.choice(plan), plan
    loss = _measured(model, here, samples, store)
    found: list[FrontPoint] = []
    for number in range(1, rounds + 1):
        effects = span_effects(model, samples, here, parts_dir=parts_dir)
        change = np.mean([rule_effects(values, table, length) for (_, length), values in effects.items()], axis=0)
        tried = [(_measured(model, table.plan(near, "near"), samples, store), near) for near in neighbours.of(choice, change, moves)]
        best, near = min(tried, key=lambda pair: pair[0], default=(loss, choice))
        logger.info("refinement round %d: loss %.4f, best of %d neighbours %.4f", number, loss, len(tried), best)
        if best >= loss:
            break
        told = {"start": plan.name, "round": number, "moved_heads": int((near != choice).sum()), "calibration_loss": best}
        loss, choice = best, near
        found.append(
            point(table, choice, name=f"refined-{number}", origin="refined", lengths=targets, goals=default_goals(table), search=told)
        )
        here = found[-1].plan
        if progress:
            progress(number, rounds)
    if progress:
        progress(rounds, rounds)
    names = (*(objective.name for objective in table.objectives), DENSITY)
    settings = {
        "solver": "refine",
        "start": plan.name,
        "rounds": rounds,
        "moves": list(moves),
        "density": {str(n): d for n, d in targets.items()},
    }
    return Front(tuple(found), names, settings, table.provenance)


class _Neighbours:
    """Plans near a choice that keep the density limits."""

    def __init__(self, table: LossTable, targets: dict[int, float], max_rules: int | None) -> None:
        self._table, self._targets, self._max_rules = table, targets, max_rules

    def of(self, choice: np.ndarray, change: np.ndarray, moves: Sequence[int]) -> list[np.ndarray]:
        """For each number in `moves` the best choice that differs from `choice` in at most so many heads, none twice.

        change: (layers, kv_heads, rules), the loss change of every rule. A toll on every head that moves is raised until few enough
        do; where none would be left then, the last plan before that is taken, which moves the fewest.
        """
        gain = change - np.take_along_axis(change, choice[:, :, None], axis=2)
        highest = float(np.abs(gain).max())
        # Every bisection starts at the same tolls: none is solved twice.
        solved_at = cache(lambda toll: self._solved(gain, choice, toll))
        found: dict[bytes, np.ndarray] = {}
        for most in moves:
            low, high = 0.0, highest
            fewest = within = None
            for _ in range(BISECTIONS):
                toll = (low + high) / 2
                solved = solved_at(toll)
                moved = int((solved != choice).sum())
                if moved > most:
                    low, fewest = toll, solved
                    continue
                high = toll
                within = solved if moved else within
                if moved == most:
                    break
            near = fewest if within is None else within
            if near is not None:
                found.setdefault(near.tobytes(), near)
        return list(found.values())

    def _solved(self, gain: np.ndarray, choice: np.ndarray, toll: float) -> np.ndarray:
        costs = gain + toll
        np.put_along_axis(costs, choice[:, :, None], 0.0, axis=2)
        objective = Objective("refined", self._table.lengths[-1], "sum", (0, 1))
        # The same for all rules of a head changes no choice; losses are told from 0 on.
        table = replace(self._table, objectives=(objective,), losses=(costs - costs.min(axis=2, keepdims=True))[None])
        goal = Goal("refined", {objective.name: 1.0})
        if self._max_rules is None:
            return BudgetSolver(table, goal, self._targets).solve(self._targets).choice
        return solve_milp(table, self._targets, goal=goal, max_rules_per_layer=self._max_rules).choice


def _measured(model: PreTrainedModel, plan: Plan, samples: SampleSet, store: ScoreStore | None) -> float:
    scores = score_samples(model, plan, list(samples), store=store)
    return float(np.mean(list(mean_losses(list(samples), scores).values())))
