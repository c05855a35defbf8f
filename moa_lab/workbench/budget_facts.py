"""What the budget panel says of an answer: names and values."""

from __future__ import annotations

from moa_lab.figures.theme import byte_size, percent
from moa_lab.workbench.budget import Answer, Budget

NOTABLE = 0.005
"""Difference of densities that is told."""


def kept(answer: Answer, budget: Budget) -> list[tuple[str, str]]:
    """What a sequence keeps under the answer's plan."""
    spans = answer.spans
    whole = answer.plan.geometry.whole_heads(spans, budget.n_tokens)
    return [
        ("density", f"{percent(answer.density, 1)} of the bytes at {budget.n_tokens:,} tokens{_bound(answer, budget)}"),
        *([("stored in", f"{budget.bits} bits: predicted losses do not know it")] if answer.plan.bits else []),
        ("mean span", f"{spans.mean():,.0f} tokens ({whole} of {spans.size} heads keep all)"),
        ("KV, predicted", byte_size(answer.kv_bytes)),
        ("KV, allocated", byte_size(answer.allocated_bytes)),
        ("KV, dense", byte_size(answer.dense_bytes)),
    ]


def predicted(answer: Answer) -> list[tuple[str, str]]:
    """What the answer's plan loses, as predicted, and how it was found."""
    return [
        ("predicted loss", "0: dense; 1: every head at its shortest span"),
        *((f"predicted loss, {name}", f"{value:.4f}") for name, value in answer.losses.items()),
        *((f"predicted loss at {n:,}", f"{value:.4f}") for n, value in answer.losses_at.items()),
        ("gap to optimal", f"at most {percent(answer.gap, 2)}"),
        ("solved by", f"{answer.solver}, {1e3 * answer.seconds:.0f} ms"),
        *([("rules per layer", "not kept yet: press Solve exactly")] if answer.rules_ignored else []),
    ]


def _bound(answer: Answer, budget: Budget) -> str:
    """Where the limit binds, if that is at another length: it holds at all of them."""
    if budget.density - answer.density < NOTABLE:
        return ""
    n, most = max(((n, answer.plan.density(n)) for n in budget.lengths), key=lambda pair: pair[1])
    return f", {percent(most, 1)} at {n:,}: the limit holds at every length" if most - answer.density > NOTABLE else ""
