"""From a good plan to a better one: small steps down the loss that is measured under the plan itself.

A profile of the dense model says what each head is worth while all the others are whole. Under a plan others have gone, and
what is left is worth more. So the plan's own gradient is taken on a few samples, the plan moved a little, and so on. Plans
are discrete; what moves is a potential of every (head, rule) that sums up the gradients of the whole way, and the plan is
each time the best one under it within the budget (dual averaging: Nesterov, 2009; Xiao, 2010).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel

from moa_lab.calibration.samples import Sample, SampleSet, group_by_shape
from moa_lab.plan import Plan
from moa_lab.profiling import estimate_cost
from moa_lab.profiling.spans import span_effects
from moa_lab.records import Front, FrontPoint, LossTable, Objective
from moa_lab.search.budget import BudgetSolver
from moa_lab.search.front import DENSITY, point
from moa_lab.search.goals import Goal, default_goals
from moa_lab.search.losses import rule_effects
from moa_lab.search.milp import solve_milp
from moa_lab.search.problem import Density, densities

STEP = 0.07
"""How far a step moves the potential of a head whose effect has the size that is usual for heads (root mean square)."""
HOLD = 0.5
"""Potential that a head loses per octave away from its span in the first plan: what gradients must overcome to move it."""
PRICE = 2.0
"""Potential that a whole head's cache is worth at the start."""
SAMPLES_PER_STEP = 2
"""Samples of every (task, length) in one step."""

Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""


def refine(
    model: PreTrainedModel,
    plan: Plan,
    samples: SampleSet,
    table: LossTable,
    density: Density,
    *,
    steps: int = 60,
    points: int = 6,
    seed: int = 0,
    max_rules_per_layer: int | None = None,
    parts_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> Front:
    """Plans on the way down from `plan` at a density: `points` of them, evenly spaced over `steps`, for validation to choose from.

    samples: calibration samples; every step takes SAMPLES_PER_STEP of each (task, length), in an order that `seed` decides.
    table: the rules to choose from, and what predicts the points' losses; `density` and its lengths are as in `search`.
    parts_dir: the gradient of every finished (plan, sample) is kept there, so that the same call after a kill goes on.
    Raises ValueError for a plan of another geometry or a table without the plan's rules, and InfeasibleError as `search` does.
    """
    if steps < 1 or not 1 <= points <= steps:
        raise ValueError(f"steps and points must be at least 1, and no more points than steps; got steps {steps}, points {points}")
    checkpoint = estimate_cost(model, samples, sink_tokens=plan.sink_tokens).checkpoint
    targets = densities(table, density)
    way = _Way(table, targets, max_rules_per_layer, table.choice(plan))
    draws = {key: _Draws(group, np.random.default_rng([seed, index])) for index, (key, group) in enumerate(group_by_shape(samples).items())}
    scales = {key: _Scale() for key in draws}
    folder = Path(parts_dir) if parts_dir else None
    marks = {round(steps * (number + 1) / points) for number in range(points)}
    found: list[FrontPoint] = []
    for step in range(1, steps + 1):
        here = table.plan(way.choice, plan.name)
        gradients = []
        for key, draw in draws.items():
            effects = span_effects(model, draw.take(SAMPLES_PER_STEP), here, checkpoint=checkpoint, parts_dir=folder)
            gradients.append(scales[key].scaled(rule_effects(effects, table, key[1]), way.choice))
        way.move(np.mean(gradients, axis=0))
        if step in marks:
            found.append(way.point(f"refined-{step}", {"start": plan.name, "steps": step, "seed": seed}))
        if progress:
            progress(step, steps)
    names = (*(objective.name for objective in table.objectives), DENSITY)
    settings = {
        "solver": "refine",
        "start": plan.name,
        "steps": steps,
        "seed": seed,
        "density": {str(n): value for n, value in targets.items()},
    }
    return Front(tuple(found), names, settings, table.provenance)


class _Way:
    """The potential of every (layer, KV head, rule), and the choice that is best under it within the budget."""

    def __init__(self, table: LossTable, targets: dict[int, float], max_rules: int | None, start: np.ndarray) -> None:
        self._table, self._targets, self._max_rules = table, targets, max_rules
        octaves = np.mean([np.log2(np.maximum(table.span_tokens(n), 1)) for n in table.lengths], axis=0)  # (layers, rules)
        cost = np.mean([table.span_tokens(n) * len(octaves) * table.geometry.kv_heads / table.dense_tokens(n) for n in targets], axis=0)
        away = np.abs(octaves[:, None, :] - np.take_along_axis(octaves, start, axis=1)[:, :, None])
        self._potential = PRICE * cost[:, None, :] - HOLD * away
        self.choice = start

    def move(self, gradient: np.ndarray) -> None:
        """Take a step against `gradient` (layers, kv_heads, rules), the loss change of every rule."""
        self._potential = self._potential - STEP * gradient
        losses = self._potential.max(axis=-1, keepdims=True) - self._potential
        objective = Objective("refined", self._table.lengths[-1], "sum", (0, 1))
        table = replace(self._table, objectives=(objective,), losses=losses[None])
        goal = Goal("refined", {objective.name: 1.0})
        if self._max_rules is None:
            self.choice = BudgetSolver(table, goal, self._targets).solve(self._targets).choice
        else:
            self.choice = solve_milp(table, self._targets, goal=goal, max_rules_per_layer=self._max_rules).choice

    def point(self, name: str, search: dict[str, object]) -> FrontPoint:
        """The present choice as a front point, its losses predicted by the table that the search used."""
        goals = default_goals(self._table)
        return point(self._table, self.choice, name=name, origin="refined", lengths=self._targets, goals=goals, search=search)


@dataclass
class _Draws:
    """Samples of one (task, length) in a random order, all of them before any comes again."""

    samples: Sequence[Sample]
    random: np.random.Generator
    _left: list[Sample] = field(default_factory=list)

    def take(self, count: int) -> list[Sample]:
        """The next `count` samples, no sample twice in one call."""
        count = min(count, len(self.samples))
        if len(self._left) < count:
            self._left = [self.samples[index] for index in self.random.permutation(len(self.samples))]
        taken, self._left = self._left[:count], self._left[count:]
        return taken


@dataclass
class _Scale:
    """Brings the gradients of one (task, length) to a common size: the usual sample moves a head by 1 (root mean square)."""

    _sizes: list[float] = field(default_factory=list)

    def scaled(self, effects: np.ndarray, choice: np.ndarray) -> np.ndarray:
        """Mean over samples of `effects` (samples, layers, kv_heads, rules) less those of `choice`: (layers, kv_heads, rules).

        A sample that is more than usually upset counts as a usual one, or a few lost answers would outweigh all others.
        """
        change = effects - np.take_along_axis(effects, choice[None, :, :, None], axis=3)
        sizes = np.sqrt(np.square(np.ptp(change, axis=3)).mean(axis=(1, 2)))
        self._sizes += sizes.tolist()
        usual = float(np.median(self._sizes))
        if usual == 0:
            return np.zeros(change.shape[1:])
        weights = np.minimum(1.0, usual / np.maximum(sizes, usual)) / usual
        return np.asarray((weights[:, None, None, None] * change).mean(axis=0))
