"""Whether plans that are compared at a density keep that density, and if not, why."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from moa_lab.plan import EQUAL_BYTES, UNTOUCHED, Plan
from moa_lab.records import Measurement


def keeps(density: float, asked: float) -> bool:
    """Whether a density is the one asked for, to `EQUAL_BYTES`."""
    return abs(density / asked - 1) <= EQUAL_BYTES


def unequal_plans(plans: Iterable[Plan], asked: float, lengths: Sequence[int]) -> list[str]:
    """A clause for every plan and length that does not keep the density `asked`, with the reason; dense plans are left out.

    Looked at are `lengths`, and those that a plan was made for.
    """
    found = []
    for plan in plans:
        dense = plan.is_dense or plan.search.get("origin") == "dense"
        missed = [] if dense else [n for n in sorted({*lengths, *plan.lengths}) if not keeps(plan.density(n), asked)]
        found += [
            f"{plan.name} keeps {plan.density(n):.1%} at {n:,} tokens, not {100 * asked:.3g}%: {_reason(plan, asked, n)}" for n in missed
        ]
    return found


def unequal_rows(rows: Iterable[Measurement]) -> str:
    """A sentence naming plans that keep different densities at one length; empty if there are none. Dense plans are left out."""
    densities: dict[int, dict[str, float]] = {}
    for row in rows:
        if row.density < 1:
            densities.setdefault(row.length, {})[row.plan] = row.density
    told = [
        f"at {length:,} tokens {', '.join(f'{name} {density:.1%}' for name, density in found.items())}"
        for length, found in sorted(densities.items())
        if not keeps(min(found.values()), max(found.values()))
    ]
    return f"Not all keep the same bytes: {'; '.join(told)}." if told else ""


def _reason(plan: Plan, asked: float, length: int) -> str:
    untouched = plan.with_bits(UNTOUCHED).density(length) if plan.bits and plan.density(length) < asked else 0.0
    if untouched == 1:
        return "it keeps every token, in fewer bits"
    if keeps(untouched, asked):
        return "it stores keys or values in fewer bits"
    if told := _allocated(plan, length):
        return told
    has_windows = any(window is not None for window in plan.geometry.layer_windows)
    dense = sum(plan.geometry.dense_span_tokens(layer, length) for layer in range(plan.geometry.layers))
    if 0 < (asked - plan.density(length)) * dense < plan.geometry.layers:
        return "spans are whole tokens"
    if plan.density(length) < asked and not (has_windows and plan.search.get("origin") == "uniform"):
        return _below(plan, asked, length)
    if any(rule.alpha + rule.beta * length < plan.min_span for row in plan.rules for rule in row):
        return f"no head keeps fewer than the floor of {plan.min_span:,} tokens"
    if plan.span_multiple > 1:
        return f"spans are rounded up to {plan.span_multiple} tokens"
    if has_windows:
        return "layers with windows of their own keep the same at every length, and other lengths were asked for as well"
    return "its rules keep to the density at other lengths"


def _allocated(plan: Plan, length: int) -> str:
    """What the engine allocates that a plan was searched for, where its card tells; empty where that is what the plan keeps."""
    engine = plan.search.get("engine")
    if not isinstance(engine, dict):
        return ""
    allocated = engine.get("allocated", {}).get(str(length))
    known = isinstance(allocated, float) and not keeps(plan.density(length), allocated)
    return f"{engine['name']}, which it was searched for, allocates {allocated:.1%}" if known else ""


def _below(plan: Plan, asked: float, length: int) -> str:
    """Why a searched plan keeps less than the density asked for, as far as the plan itself tells."""
    # A search also keeps to the density at twice the longest profiled length.
    known = {*plan.lengths, 2 * max(plan.lengths, default=length)} - {length}
    binding = [n for n in sorted(known) if keeps(plan.density(n), asked)]
    if binding:
        return f"it does at {binding[0]:,} tokens, which binds"
    if plan.search.get("origin") == "ranked":
        return "its heads are whole or at the floor, and no other head fits in whole"
    return "its rules keep no more: they come in steps, and no better choice within the density was found"
