"""The budget: the best spans for a density, fast enough for a slider; pinned heads keep theirs, the rest is solved again."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from moa_lab.cache import allocated_kv_bytes
from moa_lab.plan import Bits, Plan, check_density, dense_plan, read_mix, share_bought, stored_plan, token_price, told_bits
from moa_lab.records import LossTable
from moa_lab.search import BudgetAnswer, BudgetSolver, Goal, default_goals, mean_goal, solve_milp

STEP = 0.005
"""Step of the density slider."""
REMEMBERED = 400
"""Solved densities that are kept: the whole slider, and some."""
Key = tuple[float, tuple[tuple[tuple[int, int], int], ...], Bits]
"""A density, the pinned heads with their rules, and the bits of K and V."""


@dataclass(frozen=True)
class Answer:
    """The plan found for a density, with its predicted losses and bytes at `n_tokens`.

    losses: predicted loss per goal (0 dense, 1 with every head at the shortest rule), and their mean, "mean". losses_at: that mean by
    profiled length. kv_bytes: of one sequence, predicted from the spans; allocated_bytes: of the tensors that the ring cache makes for
    it; dense_bytes: of the dense cache; all at two bytes a number. spans: int64 (layers, kv_heads), at `n_tokens`. gap: proven bound on
    (value - optimum) / value of the mean. solver: "slider" or "exact (status)". rules_ignored: the plan exceeds the cap on rules per
    layer.
    """

    plan: Plan
    choice: np.ndarray
    spans: np.ndarray
    density: float
    losses: dict[str, float]
    losses_at: dict[int, float]
    kv_bytes: int
    allocated_bytes: int
    dense_bytes: int
    gap: float
    seconds: float
    solver: str
    rules_ignored: bool = False


class Budget:
    """Density, stored bits, pinned heads and a cap on rules per layer, over one loss table.

    density: of the bytes of the 16-bit KV cache, kept at every limit length (where the plan will be used). bits: in which all heads are
    stored, one mix of `moa_lab.plan.read_mixes`; predicted losses do not know of the rounding. n_tokens: the length that spans are
    shown at; None: the longest profiled one. pinned: {(layer, kv_head): rule index}. goals: default, one per task; their mean is minimised.
    Raises ValueError (InfeasibleError) for an infeasible density.
    """

    def __init__(
        self, table: LossTable, density: float = 0.5, n_tokens: int | None = None, goals: tuple[Goal, ...] | None = None,
        bits: int | str = 16,
    ) -> None:  # fmt: skip
        self.table = table
        self.goals = goals or default_goals(table)
        self.goal = mean_goal(self.goals)
        self.n_tokens = n_tokens or max(table.profiled_lengths or table.lengths)
        self.density = check_density(density)
        self.pinned: dict[tuple[int, int], int] = {}
        self.max_rules: int | None = None
        self._solver = BudgetSolver(table, self.goal)
        self._known: OrderedDict[Key, BudgetAnswer] = OrderedDict()
        self.dense_bytes = dense_plan(table.geometry).kv_bytes(self.n_tokens)
        cheapest = np.zeros((table.geometry.layers, table.geometry.kv_heads), dtype=np.int64)
        cheapest += np.argmin(table.span_tokens(max(self._solver.lengths)).sum(axis=0))
        self._least_tokens = max(table.density(cheapest, n) for n in self._solver.lengths)
        self.bits = bits

    @property
    def bits(self) -> str:
        """The bits in which all heads are stored, as `read_mixes` reads them."""
        return told_bits(self._mix)

    @bits.setter
    def bits(self, bits: int | str) -> None:
        """Raises ValueError for what is no single mix."""
        self._mix = read_mix(bits)
        self._price = token_price(self._mix, self.table.geometry.head_dim)
        self.least = self._least_tokens * self._price

    @property
    def lengths(self) -> tuple[int, ...]:
        """Lengths at which the density is kept."""
        return self._solver.lengths

    def answer(self, density: float | None = None) -> Answer:
        """Solve for `density` (None: the current one), in tens of milliseconds; it becomes the current one if it is feasible."""
        asked = self.density if density is None else check_density(density)
        found = self.solve(asked)
        self.density = asked
        few = self.max_rules is None or max(len(set(row)) for row in found.choice.tolist()) <= self.max_rules
        return self._told(found.choice, found.gap, found.seconds, "slider", not few)

    def solve(self, density: float) -> BudgetAnswer:
        """What the slider's solver finds; of the last `REMEMBERED` densities, pins and bits it is remembered. Threads may call this.

        Raises ValueError (InfeasibleError) for an infeasible density.
        """
        mix = self._mix
        key = (round(density, 9), tuple(sorted(self.pinned.items())), mix)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = self._solver.solve(density, dict(key[1]), mix)
            while len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        return found

    def exact(self, time_limit_s: float = 30.0, cancel: threading.Event | None = None) -> Answer:
        """The optimal plan, or the best one found in time, with its proven gap; the cap on rules holds."""
        found = solve_milp(
            self.table, share_bought(self.density, self._mix, self.table.geometry), goal=self.goal, max_rules_per_layer=self.max_rules,
            pinned=self.pinned, time_limit_s=time_limit_s, cancel=cancel,
        )  # fmt: skip
        return self._told(found.choice, found.gap, found.seconds, f"exact ({found.status.replace('_', ' ')})", False)

    def pin(self, layer: int, kv_head: int, tokens: int | None = None, at: int | None = None) -> int:
        """Give a head the shortest rule that keeps at least `tokens` at length `at`, or everything (None); returns the span it gets there.

        at: None for `n_tokens`. Raises ValueError for an unknown head, for a span outside 1..at, and where the budget becomes infeasible:
        then the head stays as it was.
        """
        length = at or self.n_tokens
        geometry = self.table.geometry
        if not (0 <= layer < geometry.layers and 0 <= kv_head < geometry.kv_heads):
            raise ValueError(f"there is no layer {layer}, KV head {kv_head}: {geometry.layers} layers of {geometry.kv_heads} KV heads")
        spans = self.table.span_tokens(length)[layer]
        wanted = int(spans.max()) if tokens is None else tokens
        if not 1 <= wanted <= length:
            raise ValueError(f"a span must lie in 1..{length} tokens, got {wanted}")
        # Among rules of the same span here, the one that grows least beyond it, or most for a head that keeps everything.
        later = self.table.span_tokens(max(self.lengths))[layer]
        fitting = np.flatnonzero(spans >= min(wanted, int(spans.max())))
        rule = max(fitting, key=lambda r: (spans[r], later[r])) if tokens is None else min(fitting, key=lambda r: (spans[r], later[r]))
        before = dict(self.pinned)
        self.pinned[layer, kv_head] = int(rule)
        try:
            self.solve(self.density)
        except ValueError:
            self.pinned = before
            raise
        return int(spans[rule])

    def release(self, layer: int, kv_head: int) -> None:
        """Let the search choose a head again."""
        self.pinned.pop((layer, kv_head), None)

    def release_all(self) -> None:
        """Let the search choose every head."""
        self.pinned.clear()

    def density_at(self, answer: Answer, n_tokens: int) -> float:
        """The share of the dense bytes that the answer's plan keeps at another length."""
        # From the table: a plan works out every head's span anew.
        spans = np.take_along_axis(self.table.span_tokens(n_tokens), answer.choice, axis=1)
        dense = self.table.dense_tokens(n_tokens) * self.table.geometry.kv_bytes_per_token()
        return int((spans * answer.plan.token_bytes()).sum()) / dense

    def density_of_bytes(self, kv_bytes: float) -> float:
        """The density at which one sequence of `n_tokens` takes `kv_bytes`, at least the least feasible one, at most 1."""
        return self._possible(kv_bytes / self.dense_bytes)

    def density_of_span(self, tokens: float) -> float:
        """The density at which heads keep `tokens` of `n_tokens` on average, at least the least feasible one, at most 1."""
        geometry = self.table.geometry
        share = tokens * geometry.layers * geometry.kv_heads / self.table.dense_tokens(self.n_tokens)
        return self._possible(share * self._price)

    def _possible(self, density: float) -> float:
        return float(min(max(density, self.least), 1.0))

    def _losses_at(self, predicted: Mapping[str, float]) -> dict[int, float]:
        lengths = {objective.name: objective.length for objective in self.table.objectives}
        shares = self.goal.shares
        parts = {n: {name: share for name, share in shares.items() if lengths[name] == n} for n in self.table.lengths}
        return {n: Goal(f"at {n}", part).value(predicted) for n, part in parts.items() if part}

    def _told(self, choice: np.ndarray, gap: float, seconds: float, solver: str, rules_ignored: bool) -> Answer:
        predicted = self.table.predict(choice)
        losses = {goal.name: goal.value(predicted) for goal in (*self.goals, replace(self.goal, name="mean"))}
        search = {"density": self.density, "solver": solver, "gap": gap, "pinned": [[*head, rule] for head, rule in self.pinned.items()]}
        plan = stored_plan(self.table.plan(choice, "budget", lengths=self.lengths, search=search), self._mix)
        # On the meta device, without storage: a slider must not allocate memory at every step.
        allocated = allocated_kv_bytes(plan, self.n_tokens, device="meta")
        # From the table: a plan works out every head's span anew.
        spans = np.take_along_axis(self.table.span_tokens(self.n_tokens), choice, axis=1)
        kept = int((spans * plan.token_bytes()).sum())
        return Answer(
            plan=plan, choice=choice, spans=spans, density=kept / self.dense_bytes, losses=losses,
            losses_at=self._losses_at(predicted), kv_bytes=kept,
            allocated_bytes=allocated, dense_bytes=self.dense_bytes, gap=gap, seconds=seconds, solver=solver, rules_ignored=rules_ignored,
        )  # fmt: skip
