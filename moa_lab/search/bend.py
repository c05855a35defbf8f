"""Spend what is left of a budget where heads cannot grow alike: every rule grows by a line of its own, found by a linear program."""

from __future__ import annotations

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import csr_array

ALPHA_STEP, BETA_STEP = 0.25, 2.0**-14
"""Rules are rounded down to these, so that a card reads well and the budget holds."""
ROUNDS = 4
"""Programs in turn: a span that the last one made whole costs no more than the whole from then on."""
ENOUGH = 1e-3
"""Share of a length's budget: a program that spent less more is the last."""
EVENLY = 1e-3
"""Weight of the largest growth of a rule, as a share of what it can see, against the share of the budget that is spent."""


def bent(
    alpha: np.ndarray, beta: np.ndarray, moves: np.ndarray, dense: np.ndarray, lengths: np.ndarray, allowed: np.ndarray, min_span: int,
    price: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Rules `clip(alpha + beta N, min_span, dense)` of longer spans that keep more of `allowed`, first of all where least is kept.

    alpha, beta: (heads,); moves: bool (heads,), heads that may grow. dense: (lengths, heads), tokens that a head can see. allowed:
    (lengths,), tokens that may be kept; price: (heads,), how many a head's token counts for. No span shrinks at any of the lengths, equal
    rules of heads that see as much for one price stay equal, and of what spends as much, growth that is spread evenly is taken.
    """
    alpha, beta = alpha.astype(float), beta.astype(float)
    first = _spans(alpha, beta, dense, lengths, min_span)
    for _ in range(ROUNDS):
        kept = _spans(alpha, beta, dense, lengths, min_span)
        # Spans are whole tokens, and lines that cost all of themselves may find no room. Where what each has beyond its span costs nothing,
        # the spans as they are always do; lines found there may keep a little too much.
        beyond = np.maximum(alpha + beta * lengths[:, None] - kept, 0.0)
        for free in (np.zeros_like(beyond), beyond):
            if found := _program(alpha, beta, moves, dense, lengths, allowed, first, kept, free, min_span, price):
                break
        if found is None:
            break
        before = (kept * price).sum(axis=1)
        grown = (_spans(*found, dense, lengths, min_span) - kept) * price
        back = _given_back(np.stack([alpha, beta, price, *dense]), grown, allowed - before)
        found = np.where(back, alpha, found[0]), np.where(back, beta, found[1])
        spent = (_spans(*found, dense, lengths, min_span) * price).sum(axis=1)
        if (spent > allowed).any() or (spent <= before).all():
            break
        alpha, beta = found
        if ((spent - before) / allowed).max() < ENOUGH:
            break
    return alpha, beta


def _spans(alpha: np.ndarray, beta: np.ndarray, dense: np.ndarray, lengths: np.ndarray, min_span: int) -> np.ndarray:
    """(lengths, heads)."""
    return np.minimum(np.maximum(np.floor(alpha + beta * lengths[:, None] + 1e-6), min_span), dense)


def _program(
    alpha: np.ndarray, beta: np.ndarray, moves: np.ndarray, dense: np.ndarray, lengths: np.ndarray, allowed: np.ndarray,
    least: np.ndarray, kept: np.ndarray, free: np.ndarray, min_span: int, price: np.ndarray,
) -> tuple[np.ndarray, np.ndarray] | None:  # fmt: skip
    """One program, from spans that keep `kept`; None where nothing moves or it has no answer. free: (lengths, heads), tokens of a line
    that cost nothing.

    Variables: of every group of equal rules its line a + b N and, at every length where it is cut, the tokens that it costs; the smallest
    share of `allowed` that is kept at a length; the largest growth.
    """
    keys = np.concatenate([alpha[None], beta[None], price[None], dense])[:, moves]
    if not keys.size:
        return None
    _, index, member, count = np.unique(keys, axis=1, return_index=True, return_inverse=True, return_counts=True)
    heads, member = np.flatnonzero(moves)[index], member.ravel()
    count = count * price[heads]
    groups, many = len(heads), len(lengths)
    cut = kept[:, heads] < dense[:, heads]
    costs = np.full((many, groups), -1)
    costs[cut] = 2 * groups + np.arange(cut.sum())
    share, growth = 2 * groups + int(cut.sum()), 2 * groups + int(cut.sum()) + 1
    entries: list[tuple[int, int, float]] = []
    high: list[float] = []

    def limit(terms: list[tuple[int, float]], most: float) -> None:
        entries.extend((len(high), variable, weight) for variable, weight in terms)
        high.append(most)

    gain = np.zeros(growth + 1)
    for at, n in enumerate(lengths):
        scale = count / allowed[at]
        held = (kept[at] * price).sum() - (count * kept[at, heads])[cut[at]].sum()
        spent: list[tuple[int, float]] = []
        for group, head in enumerate(heads):
            line = [(2 * group, 1.0), (2 * group + 1, float(n))]
            if least[at, head] > min_span:
                limit(_times(line, -1.0), -float(least[at, head]))
            if cut[at, group]:
                limit([*line, (costs[at, group], -1.0)], float(free[at, head]))
                limit([*line, (growth, -float(dense[at, head]))], float(kept[at, head]))
                spent += _times(line, float(scale[group]))
        for variable, weight in spent:
            gain[variable] += weight / many
        limit([(share, 1.0), *_times(spent, -1.0)], held / allowed[at])
        limit([(costs[at, group], float(count[group])) for group in np.flatnonzero(cut[at])], allowed[at] - held)
    gain[share], gain[growth] = 1.0, -EVENLY
    rows, columns, values = zip(*entries, strict=True)
    bounds = [(None, None), (-1.0, None)] * groups + [(float(min_span), None)] * (share - 2 * groups) + [(None, 1.0), (0.0, None)]
    answer = linprog(-gain, A_ub=csr_array((values, (rows, columns)), shape=(len(high), growth + 1)), b_ub=high, bounds=bounds)
    if answer.x is None:
        return None
    alpha, beta = alpha.copy(), beta.copy()
    slopes = np.floor(answer.x[1 : 2 * groups : 2] / BETA_STEP + 1e-6) * BETA_STEP
    tokens = np.floor(answer.x[0 : 2 * groups : 2] / ALPHA_STEP + 1e-6) * ALPHA_STEP
    # Rounded down, a line may fall short of the spans that must not shrink.
    needed = np.where(least[:, heads] > min_span, least[:, heads] - slopes * lengths[:, None], -np.inf).max(axis=0)
    tokens = np.maximum(tokens, np.ceil(needed / ALPHA_STEP - 1e-6) * ALPHA_STEP)
    alpha[moves], beta[moves] = tokens[member], slopes[member]
    return alpha, beta


def _given_back(keys: np.ndarray, grown: np.ndarray, room: np.ndarray) -> np.ndarray:
    """Heads, bool (heads,), that stay as they are so that what the others have `grown` by, (lengths, heads), fits in `room` (lengths,).

    keys: (_, heads), equal for heads that must stay equal.
    """
    _, member = np.unique(keys, axis=1, return_inverse=True)
    member = member.ravel()
    gains = np.stack([np.bincount(member, weights=row) for row in grown])
    # A token more where there is no room, as rounding leaves it, is worth nothing, and nobody can keep it.
    worth = (gains / np.maximum(room, 1.0)[:, None])[room >= 1].sum(axis=0)
    freed = -np.minimum(gains, 0.0).sum(axis=1)
    back = (gains > (room + freed)[:, None]).any(axis=0)
    while (over := gains[:, ~back].sum(axis=1) - room).max() > 0:
        takes = np.where(back, 0.0, gains[over.argmax()])
        # First what is worth least for the tokens that are missing.
        back[np.where(takes > 0, worth / np.maximum(takes, 1.0), np.inf).argmin()] = True
    return back[member]


def _times(terms: list[tuple[int, float]], factor: float) -> list[tuple[int, float]]:
    return [(variable, weight * factor) for variable, weight in terms]
