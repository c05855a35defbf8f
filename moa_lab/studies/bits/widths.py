"""Bit widths under a byte budget: predicted losses of every width, the best choice by them, and random choices of equal bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, kron, vstack

from moa_lab.plan import UNTOUCHED, Plan
from moa_lab.search import InfeasibleError
from moa_lab.studies.bits.quantise import WEIGHT_GROUP, stored_bytes

FIRST_ORDER, ROOT, SQUARES, ERROR = "first order", "root of squares", "squares", "error alone"
PREDICTORS = (FIRST_ORDER, ROOT, SQUARES, ERROR)
"""Ways to predict a loss from `Effects`; all but the last need the gradient."""


@dataclass(frozen=True)
class Effects:
    """Effects of bit widths on single items (heads, modules), with g = dL/dx and d = Q(x) - x of every number x of an item.

    widths: bits, ascending. signed: sum of g d, the first-order change of a sample's loss in nats. squared: sum of (g d)^2, the
    expected square of the signed sum if the errors are independent. error: sum of d^2 over sum of x^2. All float64 (samples, items,
    widths). shares: (samples,), the weights of the samples, with a sum of 1.
    """

    widths: tuple[int, ...]
    signed: np.ndarray
    squared: np.ndarray
    error: np.ndarray
    shares: np.ndarray

    def paired(self) -> Effects:
        """Items 2k and 2k + 1 as one item: a head whose K and V get the same width."""
        return Effects(self.widths, _pairs(self.signed), _pairs(self.squared), _pairs(self.error), self.shares)

    @classmethod
    def of(cls, widths: tuple[int, ...], parts: np.ndarray, shares: np.ndarray) -> Effects:
        """Effects of (3, samples, items, widths): signed, squared, error."""
        signed, squared, error = parts
        return cls(widths, signed, squared, error, shares)


def predicted(effects: Effects, predictor: str) -> np.ndarray:
    """Predicted loss of every width, (items, widths): means over samples, never less for fewer bits.

    first order: |signed sum|, signs inside a sample only, as in `profiling.influence.span_effect`. squares: the sum of squares, which
    grows with the square of the error as a loss at its minimum does (a diagonal empirical Fisher matrix); root of squares: its root,
    in nats. error alone: the relative squared error, without the gradient. Raises ValueError for another predictor.
    """
    of_samples = {
        FIRST_ORDER: lambda: np.abs(effects.signed),
        ROOT: lambda: np.sqrt(effects.squared),
        SQUARES: lambda: effects.squared,
        ERROR: lambda: effects.error,
    }  # fmt: skip
    if predictor not in of_samples:
        raise ValueError(f"predictor must be one of {', '.join(PREDICTORS)}, got {predictor!r}")
    mean = np.einsum("s,siw->iw", effects.shares, of_samples[predictor]())
    # A sum of signed errors may be smaller for a coarser grid by chance.
    worst: np.ndarray = np.maximum.accumulate(mean[:, ::-1], axis=1)[:, ::-1]
    return worst


def allocate(losses: np.ndarray, costs: np.ndarray, budgets: np.ndarray, time_limit_s: float = 10.0) -> np.ndarray:
    """The width of every item, an index (items,), with the least sum of losses within every budget: a multiple-choice knapsack.

    losses: (items, widths). costs: (limits, items, widths) in bytes, budgets: (limits,). Solved by HiGHS to a gap of 1e-4.
    Raises InfeasibleError where even the cheapest widths cost more.
    """
    items, widths = losses.shape
    cheapest = costs.min(axis=2).sum(axis=1)
    if (cheapest > budgets * (1 + 1e-9)).any():
        raise InfeasibleError(f"the narrowest widths take {max(cheapest / budgets):.2f} times the byte budget")
    one_each = kron(np.eye(items), np.ones((1, widths)))
    spent = csr_array(costs.reshape(len(costs), -1) / budgets[:, None])
    lower, upper = np.r_[np.ones(items), np.full(len(costs), -np.inf)], np.ones(items + len(costs))
    answer = milp(
        losses.ravel() / (losses.max() or 1.0), integrality=np.ones(losses.size), bounds=Bounds(0, 1),
        constraints=LinearConstraint(vstack([one_each, spent]), lower, upper), options={"time_limit": time_limit_s, "mip_rel_gap": 1e-4},
    )  # fmt: skip
    if answer.x is None:
        raise InfeasibleError(f"no widths within the budget were found: {answer.message}")
    choice: np.ndarray = answer.x.reshape(items, widths).argmax(axis=1)
    return choice


def random_choices(costs: np.ndarray, budgets: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """`count` random choices (count, items) in which no single item can be raised within the budgets. Arguments: `allocate`.

    Every item's width is drawn, then items in random order go down until all fits, and up while it still fits; costs grow with the
    index. Raises InfeasibleError where even the cheapest widths cost more.
    """
    if (costs[:, :, 0].sum(axis=1) > budgets * (1 + 1e-9)).any():
        raise InfeasibleError("the narrowest widths exceed the byte budget")
    random = np.random.default_rng(seed)
    _, items, widths = costs.shape
    every = np.arange(items)

    def fits(choice: np.ndarray) -> bool:
        return bool((costs[:, every, choice].sum(axis=1) <= budgets * (1 + 1e-9)).all())

    drawn = random.integers(widths, size=(count, items))
    for choice in drawn:
        while not fits(choice):
            choice[random.choice(np.flatnonzero(choice))] -= 1
        raised = True
        while raised:
            raised = False
            for item in random.permutation(np.flatnonzero(choice < widths - 1)):
                choice[item] += 1
                if fits(choice):
                    raised = True
                else:
                    choice[item] -= 1
    return drawn


def kv_costs(plan: Plan, lengths: Iterable[int], widths: Sequence[int]) -> np.ndarray:
    """Bytes of K, and of V, of every head under `plan`: (lengths, layers * kv_heads * 2, widths)."""
    vector = np.array([stored_bytes(plan.geometry.head_dim, 1, bits) for bits in widths])
    return np.stack([np.repeat(plan.spans(length).ravel(), 2)[:, None] * vector for length in lengths])


def kv_bytes(plan: Plan, length: int, widths: np.ndarray) -> float:
    """Bytes of K and V of one sequence under `plan` with these widths: int (layers, kv_heads, 2)."""
    head_dim = plan.geometry.head_dim
    of_width = {int(bits): stored_bytes(head_dim, 1, int(bits)) for bits in np.unique(widths)}
    vectors = np.vectorize(of_width.__getitem__, otypes=[float])(widths)
    return float((plan.spans(length)[:, :, None] * vectors).sum())


def weight_costs(shapes: Iterable[tuple[int, int]], widths: Sequence[int]) -> np.ndarray:
    """Bytes of weight matrices of these (outputs, inputs): (1, matrices, widths)."""
    return np.array([[[stored_bytes(out * n, out * -(-n // WEIGHT_GROUP), bits) for bits in widths] for out, n in shapes]])


def below_untouched(widths: Sequence[int]) -> int:
    """How many of the ascending `widths` are below 16 bits."""
    return sum(bits < UNTOUCHED for bits in widths)


def _pairs(part: np.ndarray) -> np.ndarray:
    samples, items, widths = part.shape
    summed: np.ndarray = part.reshape(samples, items // 2, 2, widths).sum(axis=2)
    return summed
