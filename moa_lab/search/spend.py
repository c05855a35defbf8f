"""Spend what a plan leaves of its budget: its short spans grow until every length keeps what was asked for, alike where they can."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from moa_lab.engines import EngineLimits, held, meets
from moa_lab.plan import EQUAL_BYTES, Plan, SpanRule
from moa_lab.search.bend import ALPHA_STEP, BETA_STEP, bent

SLOPES = 65
"""Slopes tried at once, from spans that shrink with the length to whole heads; the best one's neighbourhood is divided once more."""
BISECTIONS = 40
ROOM_SHARES = (1.0, 0.5, 0.25, 0.125)
"""Shares of what an engine leaves of the budget that are tried one after the other: in blocks, a token more may cost many."""


def spend(plan: Plan, targets: Mapping[int, float], heads: np.ndarray | None = None, engine: EngineLimits | None = None) -> Plan:
    """`plan` with `a + b N` tokens more for every head that is cut, so that it keeps the densities `targets` (by length) as nearly as
    one a and b can, and never more; where that leaves tokens at some length, each rule takes what it can by a line of its own (see
    `bend`). A plan that keeps them to `EQUAL_BYTES` already is returned as it is, and so is one that exceeds them.

    heads: bool (layers, kv_heads), heads that may grow; None: all. Heads with equal rules keep equal rules. A plan whose spans are
    rounded up to a multiple is left alone: one token more could cost many. engine: what allocates (see `held_table`); the plan grows as
    far as is tried without exceeding the densities there, or the windows that it holds.
    """
    if engine is not None:
        return _spend_held(plan, targets, heads, engine)
    if plan.span_multiple > 1 or not targets:
        return plan
    grower = _Grower.of(plan, targets, heads)
    if not grower.is_short:
        return plan
    intercept, slope = grower.alike()
    if grower.missing(intercept, slope) < grower.missing(0.0, 0.0):
        plan = grower.plan(
            plan, grower.alpha + intercept * grower.moves, grower.beta + slope * grower.moves, {"alpha": intercept, "beta": slope}
        )
        grower = _Grower.of(plan, targets, heads)
    if not grower.is_short:
        return plan
    alpha, beta = bent(
        grower.alpha, grower.beta, grower.moves, grower.dense, grower.lengths, grower.allowed, grower.min_span, grower.price
    )  # fmt: skip
    changed = int(((alpha != grower.alpha) | (beta != grower.beta)).sum())
    return grower.plan(plan, alpha, beta, {"bent_heads": changed}) if changed else plan


def _spend_held(plan: Plan, targets: Mapping[int, float], heads: np.ndarray | None, engine: EngineLimits) -> Plan:
    room = {n: asked - held(plan, engine, n).density for n, asked in targets.items()}
    if min(room.values(), default=-1.0) < 0:
        return plan
    for share in ROOM_SHARES:
        grown = spend(plan, {n: min(plan.density(n) + share * room[n], 1.0) for n in targets}, heads)
        if grown is plan or meets(grown, engine, targets):
            return grown
    return plan


@dataclass(frozen=True)
class _Grower:
    """A plan's rules as arrays (heads,), the dense spans (lengths, heads) and the tokens that may be kept at every length; price: what a
    head's token counts for, by its bits as a share of 16-bit ones."""

    alpha: np.ndarray
    beta: np.ndarray
    moves: np.ndarray
    dense: np.ndarray
    lengths: np.ndarray
    allowed: np.ndarray
    min_span: int
    price: np.ndarray

    @classmethod
    def of(cls, plan: Plan, targets: Mapping[int, float], heads: np.ndarray | None) -> _Grower:
        geometry, lengths = plan.geometry, sorted(targets)
        rules = [rule for row in plan.rules for rule in row]
        dense = np.array([np.repeat([geometry.dense_span_tokens(layer, n) for layer in range(geometry.layers)], geometry.kv_heads)
                          for n in lengths], dtype=np.float64)  # fmt: skip
        # As `Usage.limits`: whole tokens of the whole cache.
        allowed = np.floor(np.array([targets[n] for n in lengths]) * dense.sum(axis=1) + 1e-6)
        moves = np.ones(len(rules), dtype=bool) if heads is None else heads.ravel().copy()
        moves &= np.array([not rule.keeps_everything for rule in rules])
        return cls(
            np.array([rule.alpha for rule in rules]), np.array([rule.beta for rule in rules]), moves, dense,
            np.array(lengths, dtype=np.float64), allowed, plan.min_span, (plan.token_bytes() / geometry.kv_bytes_per_token()).ravel(),
        )  # fmt: skip

    def kept(self, a: float, b: float) -> np.ndarray:
        """Tokens kept at every length, each for its price: (lengths,)."""
        alpha, beta = self.alpha + a * self.moves, self.beta + b * self.moves
        spans = np.floor(alpha[None] + beta[None] * self.lengths[:, None] + 1e-6)
        return np.asarray((np.minimum(np.maximum(spans, self.min_span), self.dense) * self.price).sum(axis=1))

    def missing(self, a: float, b: float) -> float:
        """The share of what is allowed that is not kept: the largest of any length plus the mean; infinite beyond the budget."""
        kept = self.kept(a, b)
        if (kept > self.allowed).any():
            return np.inf
        short = 1 - kept / self.allowed
        return float(short.max() + short.mean())

    @property
    def is_short(self) -> bool:
        """Whether some length keeps less than is allowed, by more than `EQUAL_BYTES`, and none keeps more."""
        kept = self.kept(0.0, 0.0)
        return bool((kept <= self.allowed).all() and (kept < (1 - EQUAL_BYTES) * self.allowed).any())

    def alike(self) -> tuple[float, float]:
        """The a and b with which the budget is spent best."""
        low, high = -1.0, 1.0
        slope = 0.0
        for _ in range(2):
            # The steepest of equals comes first: spans that grow are enough at longer lengths too.
            tried = np.linspace(high, low, SLOPES)
            slope = min(tried, key=lambda b: round(self.missing(self.intercept(b), b), 4))
            step = (high - low) / (SLOPES - 1)
            low, high = max(-1.0, slope - step), min(1.0, slope + step)
        slope = float(np.floor(slope / BETA_STEP) * BETA_STEP)
        return self.intercept(slope), slope

    def intercept(self, b: float) -> float:
        """The most tokens `a` that the budget allows with a slope b; at least so many that no span shrinks at any of the lengths."""
        low, high = max(-b * self.lengths[0], -b * self.lengths[-1]), 2.0 * float(self.lengths[-1])
        if (self.kept(low, b) > self.allowed).any():
            return low
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            above = (self.kept(middle, b) > self.allowed).any()
            low, high = (low, middle) if above else (middle, high)
        return float(np.floor(low / ALPHA_STEP) * ALPHA_STEP)

    def plan(self, plan: Plan, alpha: np.ndarray, beta: np.ndarray, how: Mapping[str, float]) -> Plan:
        """The plan with other rules; how: what made them, for its card."""
        rules = [SpanRule(float(tokens), float(slope)) for tokens, slope in zip(alpha, beta, strict=True)]
        width = plan.geometry.kv_heads
        rows = tuple(tuple(rules[start : start + width]) for start in range(0, len(rules), width))
        return replace(plan, rules=rows, search={**plan.search, "spent": {**plan.search.get("spent", {}), **how}})
