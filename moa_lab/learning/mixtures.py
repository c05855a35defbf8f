"""A distribution over rules for every head, which keeps density limits on average and descends the slope of a loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from scipy.optimize import minimize

from moa_lab.records import LossTable, Objective
from moa_lab.search.budget import BudgetSolver
from moa_lab.search.goals import Goal
from moa_lab.search.holding import held_table, over_heads
from moa_lab.search.milp import solve_milp
from moa_lab.search.problem import Usage, check_feasible, rules_in_a_layer
from moa_lab.search.windows import windows_of

MOMENTUM = 0.9
SCALE_DECAY = 0.99
LARGEST_STEP = 1.0
"""Nats that the evidence for a rule may change in one step."""
DEAREST = 300.0
"""Nats for a whole head: at this price every head takes its cheapest rule, at minus this price its dearest."""
BISECTIONS = 48


class Mixtures:
    """Chances of the rules of every head: `softmax(evidence - price . usage)`, with prices such that the limits hold on average.

    evidence: float64 (heads, rules), in nats, 0 to begin with; it takes steps against the slope of a loss in the chances (exponentiated
    gradients). heads are flattened: layer * kv_heads + kv_head. targets: density by length, as `densities` gives it. Raises
    InfeasibleError where the cheapest rules exceed it.
    """

    def __init__(self, table: LossTable, targets: dict[int, float], rate: float) -> None:
        self._table, self._targets, self._rate = table, targets, rate
        limits = Usage(table, targets).limits(targets)
        check_feasible(table, limits)
        self._heads = limits.usage.shape[1]
        # In shares of an average head, so that a price is what keeping one head whole costs.
        self._usage, self.limit = limits.usage * self._heads, limits.limit
        self.evidence = np.zeros(limits.usage.shape[1:])
        self._prices = np.zeros(len(self.limit))
        self._slope, self._size, self._steps = np.zeros_like(self.evidence), 0.0, 0

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """All that the steps so far have changed: arrays, and numbers as JSON data."""
        return (
            {"evidence": self.evidence, "slope": self._slope, "prices": self._prices},
            {"size": self._size, "steps": self._steps},
        )  # fmt: skip

    def restore(self, arrays: Mapping[str, np.ndarray], numbers: Mapping[str, float]) -> None:
        """Go on from a `state`."""
        self.evidence, self._slope, self._prices = arrays["evidence"], arrays["slope"], arrays["prices"]
        self._size, self._steps = numbers["size"], int(numbers["steps"])

    def chances(self, limit: np.ndarray) -> np.ndarray:
        """Chances (heads, rules) whose mean usage equals one of `limit`, (limits,) shares of the dense cache, and exceeds none."""
        if (self._mean_usage(self._at(np.zeros(len(limit)))) >= limit).any():
            found = minimize(
                self._dual, self._prices, args=(limit,), jac=True, bounds=[(0, None)] * len(limit), method="L-BFGS-B",
            )  # fmt: skip
            self._prices = found.x
            return self._at(found.x)
        # The limit allows more than the evidence alone would use: one negative price for all lengths.
        low, high = -DEAREST, 0.0
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            within = (self._mean_usage(self._at(np.full(len(limit), middle))) < limit).all()
            low, high = (low, middle) if within else (middle, high)
        return self._at(np.full(len(limit), high))

    def step(self, chances: np.ndarray, slope: np.ndarray) -> None:
        """Move the evidence against `slope` (heads, rules), of the loss in `chances`.

        All heads share one scale, the slope's root mean square, so that heads which matter little change little.
        """
        # Only differences between a head's rules matter.
        slope = slope - (chances * slope).sum(axis=1, keepdims=True)
        self._steps += 1
        self._slope = MOMENTUM * self._slope + (1 - MOMENTUM) * slope
        self._size = SCALE_DECAY * self._size + (1 - SCALE_DECAY) * float((slope**2).mean())
        direction = self._slope / (1 - MOMENTUM**self._steps)
        scale = np.sqrt(self._size / (1 - SCALE_DECAY**self._steps))
        if scale > 0:
            self.evidence -= np.clip(self._rate * direction / scale, -LARGEST_STEP, LARGEST_STEP)

    def choice(self, max_rules_per_layer: int | None = None, least: float = 0.0) -> np.ndarray:
        """The rules (layers, kv_heads) with the most evidence that keep the density, and the limits of the table's engine. Raises
        InfeasibleError as `solve_milp` does.

        least: share of what a head can see that every head keeps at least, at the lengths of the table.
        """
        table = self._table
        missing = self.evidence.max(axis=1, keepdims=True) - self.evidence
        if least:
            missing = missing + np.where(self._shorter(least), len(missing) * (missing.max() + 1.0), 0.0)
        objective = Objective("learned", table.lengths[-1], "sum", (0, 1))
        losses = missing.reshape(1, table.geometry.layers, table.geometry.kv_heads, -1)
        wanted, goal = replace(table, objectives=(objective,), losses=losses), Goal("learned", {objective.name: 1.0})
        wanted, heads = held_table(wanted, table.engine), table.geometry.kv_heads
        most = rules_in_a_layer(wanted, max_rules_per_layer)
        if most is None and windows_of(wanted, self._targets) is None:
            return over_heads(BudgetSolver(wanted, goal, self._targets).solve(self._targets).choice, heads)
        return over_heads(solve_milp(wanted, self._targets, goal=goal, max_rules_per_layer=most).choice, heads)

    def _shorter(self, least: float) -> np.ndarray:
        """Bool (heads, rules): rules that keep less than a share of what the head can see, at some length of the table."""
        table = self._table
        short = np.zeros((table.geometry.layers, len(table.rules)), dtype=bool)
        for n in table.lengths:
            dense = np.array([table.geometry.dense_span_tokens(layer, n) for layer in range(table.geometry.layers)])
            short |= table.span_tokens(n) < np.floor(least * dense)[:, None]
        return np.repeat(short, table.geometry.kv_heads, axis=0)

    def _at(self, prices: np.ndarray) -> np.ndarray:
        values = self._priced(prices)
        weights = np.exp(values - values.max(axis=1, keepdims=True))
        return np.asarray(weights / weights.sum(axis=1, keepdims=True))

    def _priced(self, prices: np.ndarray) -> np.ndarray:
        return self.evidence - np.tensordot(prices, self._usage, axes=1)

    def _mean_usage(self, chances: np.ndarray) -> np.ndarray:
        return np.asarray((self._usage * chances).sum(axis=(1, 2)) / self._heads)

    def _dual(self, prices: np.ndarray, limit: np.ndarray) -> tuple[float, np.ndarray]:
        """The dual function, which the prices minimise, and its gradient: the limits less the mean usage."""
        values = self._priced(prices)
        top = values.max(axis=1)
        total = np.log(np.exp(values - top[:, None]).sum(axis=1)) + top
        return float(total.mean() + prices @ limit), limit - self._mean_usage(self._at(prices))
