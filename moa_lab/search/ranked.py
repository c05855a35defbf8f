"""Ranked plans: the heads with the most influence beyond a floor are whole, the others at the floor."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from moa_lab.plan import DENSE, Bits, Plan, SpanRule, told_bits
from moa_lab.records import LossTable, Objective
from moa_lab.search.goals import QUESTIONS
from moa_lab.search.problem import Density, InfeasibleError, Limits, Usage, densities

FLOORS = (128, 192, 256)

Floor = int | SpanRule
"""Tokens that every head keeps at least, or a rule for them."""


def ranked_plan(
    table: LossTable,
    density: Density,
    *,
    task: str = QUESTIONS,
    floor_tokens: Floor = 192,
    lengths: Iterable[int] | None = None,
    name: str | None = None,
    mixes: tuple[Bits, Bits] | None = None,
) -> Plan:
    """As many whole heads as every density limit allows, by influence of `task` beyond `floor_tokens`; the rest at the floor.

    The influence is pooled per KV head and summed over the table's lengths (over all tasks when the table has no `task`); where
    layers have windows of their own, it is counted per token that a whole head takes. floor_tokens: tokens, or a rule for them.
    `density` and `lengths` as in `solve_milp`. `name` defaults to `ranked-` and the floor. mixes: bits of the whole heads, and of those
    at the floor, where the table knows several (None: its first). Raises ValueError when the table lacks the floor or the dense rule in
    these bits, or when even the floor alone exceeds a limit.
    """
    heads = WholeHeads(table, density, floor_tokens, lengths, mixes)
    choice = heads.choice(-head_scores(table, task, floor_tokens, mixes) / heads.cost)
    told = _told(floor_tokens)
    search = {"origin": "ranked", "task": task, "floor_tokens": told, "whole_heads": int(heads.whole(choice).sum())}
    bits = "" if mixes is None else "".join(f"-{told_bits(mix)}" for mix in mixes)
    return table.plan(choice, name or f"ranked-{told}{bits}", lengths=heads.lengths, search=search)


def head_scores(
    table: LossTable, task: str = QUESTIONS, floor_tokens: Floor = 192, mixes: tuple[Bits, Bits] | None = None
) -> np.ndarray:  # fmt: skip
    """Influence (layers * kv_heads,) that every head loses with a span of `floor_tokens`; `task` and `mixes` as in `ranked_plan`: in
    bits of their own, what it loses more than a whole head does."""
    _, floor, dense = _floor_choice(table, floor_tokens, mixes)
    return _lost_at(table, task, floor) - (0.0 if mixes is None else _lost_at(table, task, dense))


def floor_rule(floor_tokens: Floor) -> SpanRule:
    """The rule of a floor in tokens."""
    return floor_tokens if isinstance(floor_tokens, SpanRule) else SpanRule(float(floor_tokens), 0.0)


class WholeHeads:
    """Plans whose heads are whole or at a floor, within density limits. Raises as `ranked_plan`."""

    def __init__(
        self, table: LossTable, density: Density, floor_tokens: Floor, lengths: Iterable[int] | None = None,
        mixes: tuple[Bits, Bits] | None = None,
    ) -> None:  # fmt: skip
        self._layers = table.geometry.layers
        self._start, self._floor, self._dense = _floor_choice(table, floor_tokens, mixes)
        targets = densities(table, density, lengths)
        self.lengths = tuple(targets)
        self._limits = Usage(table, targets).limits(targets)
        _check_floor(self._start, self._limits, floor_tokens)

    @property
    def cost(self) -> np.ndarray:
        """What each head (layers * kv_heads,) takes when made whole, as a share of the dearest; 1 for a head that takes nothing."""
        usage = self._limits.usage
        more = (usage[:, :, self._dense] - usage[:, :, self._floor]).mean(axis=0)
        return np.where(more > 0, more / max(more.max(), 1e-300), 1.0)

    def choice(self, price: np.ndarray) -> np.ndarray:
        """The choice (layers, kv_heads) with the cheapest heads by `price` (layers * kv_heads,) whole, as many as the limits allow."""
        choice, limits = self._start.copy(), self._limits
        used = limits.usage[:, np.arange(len(choice)), choice].sum(axis=1)
        for head in np.argsort(price, kind="stable"):
            more = limits.usage[:, head, self._dense] - limits.usage[:, head, self._floor]
            if (used + more <= limits.limit + limits.slack).all():
                choice[head] = self._dense
                used = used + more
        return choice.reshape(self._layers, -1)

    def whole(self, choice: np.ndarray) -> np.ndarray:
        """Boolean, of the shape of `choice`: which heads are whole."""
        return np.asarray(choice == self._dense)


def _told(floor_tokens: Floor) -> str:
    rule = floor_rule(floor_tokens)
    return f"{rule.alpha:g}" if rule.beta == 0 else f"{rule.beta:.1%}"


def _floor_choice(table: LossTable, floor_tokens: Floor, mixes: tuple[Bits, Bits] | None = None) -> tuple[np.ndarray, int, int]:
    """Every head at the floor (heads,), and the indices of the floor's and the dense rule."""
    whole, low = mixes or (table.mixes[0],) * 2
    wanted = (floor_rule(floor_tokens), low), (DENSE, whole)
    missing = [choice for choice in wanted if choice not in table.choices]
    if missing:
        floors = [int(rule.alpha) for rule, mix in table.choices if rule.beta == 0 and mix == low]
        told = f"{missing[0][0]}{f' in {told_bits(missing[0][1])} bits' if table.stored else ''}"
        raise ValueError(f"a ranked plan needs the rule {told}, which the table lacks; its constant floors are {floors}")
    floor, dense = map(table.choices.index, wanted)
    return np.full(table.geometry.layers * table.geometry.kv_heads, floor), floor, dense


def _lost_at(table: LossTable, task: str, rule: int) -> np.ndarray:
    """Influence (heads,) that each head loses with `rule`, summed over the task's profiled lengths (each scaled alike)."""
    chosen = [o for o in table.objectives if o.task == task] or list(table.objectives)
    summed = [o for o in chosen if o.form == "sum"] or chosen
    return np.sum([_rows(table, objective)[:, :, :, rule].sum(axis=0) for objective in summed], axis=0).ravel()


def _rows(table: LossTable, objective: Objective) -> np.ndarray:
    return table.losses[slice(*objective.rows)]


def _check_floor(choice: np.ndarray, limits: Limits, floor_tokens: Floor) -> None:
    used = limits.usage[:, np.arange(len(choice)), choice].sum(axis=1)
    for n, asked, least, limit, slack in zip(limits.lengths, limits.asked, used, limits.limit, limits.slack, strict=True):
        if least > limit + slack:
            raise InfeasibleError(
                f"density {asked:.4g} at length {n} is infeasible: floor_tokens {_told(floor_tokens)} needs at least {least:.4g}; "
                f"raise density or lower floor_tokens"
            )
