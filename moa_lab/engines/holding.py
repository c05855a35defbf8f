"""A plan as an engine holds it: spans rounded up to windows that it can have, and the bytes that it allocates for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from moa_lab.engines.limits import EngineLimits
from moa_lab.plan import DENSE, WHOLE_BITS, Bits, Plan, SpanRule


@dataclass(frozen=True)
class Held:
    """A plan in an engine whose windows are those at one length.

    spans: int64 (layers, kv_heads), tokens that each head keeps there, nowhere fewer than the plan asks for. slots: int64 (layers,
    kv_heads), tokens allocated for each. exact: whether every head keeps its own span. windows: different ones in the model, the whole
    sequence not counted; layer_windows: in the layer that has most, the whole counted. kv_bytes: allocated, of one sequence, with what
    fills up classes; density: these as a share of the bytes of the whole cache.
    """

    spans: np.ndarray
    slots: np.ndarray
    exact: bool
    windows: int
    layer_windows: int
    kv_bytes: int
    density: float


def held(plan: Plan, engine: EngineLimits, n_tokens: int, dtype_bytes: int = 2) -> Held:
    """`plan` as `engine` holds it at length `n_tokens`, each limit met at the fewest allocated tokens: first that of a layer, then that
    of the model (of classes that come in multiples, among layers with windows of their own, at few tokens).

    Raises ValueError where the model's own windows are more than the engine holds, and for stored bits that it does not know.
    """
    if not engine.stores_bits:
        plan.check_untouched(f"engine {engine.name}")
    exact = plan.spans(n_tokens)
    if engine.class_multiple == 1 and fits(plan, engine, n_tokens):
        return _held(plan, engine, exact, True, n_tokens, dtype_bytes)
    spans = exact.copy()
    caps = _caps(plan, n_tokens)
    if engine.windows_per_layer is not None:
        for layer, row in enumerate(spans):
            spans[layer] = _rounded_up(row, caps[layer], engine.windows_per_layer, engine, n_tokens)
    most = engine.windows_per_model
    if most is not None or engine.class_multiple > 1:
        members, limits = (spans[:, :1], caps[:, :1]) if engine.cuts_layers else (spans, caps)
        multiple = engine.class_multiple
        found = _rounded_up(members.ravel(), limits.ravel(), most or members.size, engine, n_tokens, multiple, whole_on_top=True)
        spans = np.broadcast_to(found.reshape(members.shape), spans.shape).copy()
    return _held(plan, engine, spans, bool((spans == exact).all()), n_tokens, dtype_bytes)


def padded_plan(plan: Plan, engine: EngineLimits, n_tokens: int) -> Plan:
    """The plan of the spans that `engine` keeps for `plan` at length `n_tokens` (see `held`): constant ones, and whole heads.

    A span of all that a layer's own window shows keeps that at any length. Raises ValueError as `held` does.
    """
    spans, caps = held(plan, engine, n_tokens).spans, _caps(plan, n_tokens)
    rules = tuple(
        tuple(DENSE if span >= cap else SpanRule(float(span), 0.0) for span, cap in zip(row, most, strict=True))
        for row, most in zip(spans.tolist(), caps.tolist(), strict=True)
    )
    search = {"origin": "padded", "plan": plan.name, "engine": engine.name, "n_tokens": n_tokens}
    return replace(plan, rules=rules, span_multiple=1, name=f"{plan.name} in {engine.name}", search=search, scores={})


def allocated_density(plan: Plan, engine: EngineLimits, n_tokens: int) -> float:
    """Share of the bytes of the whole cache that `engine` allocates for `plan`, rounded up where need be (see `held`)."""
    return held(plan, engine, n_tokens).density


def fits(plan: Plan, engine: EngineLimits, n_tokens: int) -> bool:
    """Whether the engine holds the plan at that length with every head's own span."""
    spans = plan.spans(n_tokens)
    rows = max(len(set(row)) for row in spans.tolist())
    return rows <= (engine.windows_per_layer or rows) and _cut_windows(spans, n_tokens) <= (engine.windows_per_model or spans.size)


def meets(plan: Plan, engine: EngineLimits, targets: Mapping[int, float]) -> bool:
    """Whether the engine holds the plan as it is, and allocates no more than the densities `targets` by length."""
    if not all(fits(plan, engine, n) for n in targets):
        return False
    # As it is: rounding a class up to fill a multiple would be another plan.
    found = {n: _held(plan, engine, plan.spans(n), True, n, 2).density for n in targets}
    return all(found[n] <= asked + 1e-9 for n, asked in targets.items())


def check_stored(engine: EngineLimits, mix: Bits) -> None:
    """Raise ValueError where the engine cannot store keys and values in `mix`."""
    if mix != WHOLE_BITS and not engine.stores_bits:
        raise ValueError(f"engine {engine.name} knows no stored bits: ask for 16")


def _held(plan: Plan, engine: EngineLimits, spans: np.ndarray, exact: bool, n_tokens: int, dtype_bytes: int) -> Held:
    geometry, slots = plan.geometry, engine.slots(spans, n_tokens)
    token_bytes = geometry.kv_bytes_per_token(dtype_bytes)
    members, heads = (spans[:, 0], geometry.kv_heads) if engine.cuts_layers else (spans, 1)
    kv_bytes = int((slots * plan.token_bytes(dtype_bytes)).sum()) + _idle(members, engine, n_tokens) * heads * token_bytes
    density = kv_bytes / (int(_caps(plan, n_tokens).sum()) * token_bytes)
    layer_windows = max(len(set(row)) for row in spans.tolist())
    return Held(spans, slots, exact, _cut_windows(spans, n_tokens), layer_windows, kv_bytes, density)


def _cut_windows(spans: np.ndarray, n_tokens: int) -> int:
    """Different windows but that of the whole sequence."""
    return len(np.unique(spans[spans < n_tokens]))


def _idle(spans: np.ndarray, engine: EngineLimits, n_tokens: int) -> int:
    """Tokens that fill the classes of the members `spans` up to multiples."""
    windows, counts = np.unique(spans, return_counts=True)
    return int((-counts % engine.class_multiple * engine.slots(windows, n_tokens)).sum())


def _caps(plan: Plan, n_tokens: int) -> np.ndarray:
    """What every head keeps in the whole cache: int64 (layers, kv_heads)."""
    caps = [plan.geometry.dense_span_tokens(layer, n_tokens) for layer in range(plan.geometry.layers)]
    return np.repeat(np.array(caps, dtype=np.int64)[:, None], plan.geometry.kv_heads, axis=1)


def _rounded_up(
    spans: np.ndarray, caps: np.ndarray, most: int, engine: EngineLimits, n_tokens: int, multiple: int = 1, whole_on_top: bool = False
) -> np.ndarray:
    """The spans (members,) rounded up to at most `most` values, none above its cap, such that the fewest tokens are allocated.

    whole_on_top: the value of the whole sequence does not count.
    """
    order = np.lexsort((caps, spans))
    # Equal spans stay together, unless some of them may fill up a class of longer ones.
    firsts = np.unique(spans[order], return_index=True)[1] if multiple == 1 else np.arange(len(order))
    values, members = spans[order[firsts]], np.diff([*firsts, len(order)])
    lowest = np.minimum.reduceat(caps[order], firsts)
    whole = np.append(values[:-1], n_tokens)
    ways = [(values, most + (whole_on_top and values[-1] == n_tokens))]
    ways += [(whole, most + 1)] if whole_on_top and values[-1] < n_tokens else []
    runs = [_best_runs(one, lowest, members, engine.slots(one, n_tokens), count, multiple) for one, count in ways]
    (total, starts), (chosen, _) = min(zip(runs, ways, strict=True), key=lambda pair: pair[0][0])
    if not np.isfinite(total):
        raise ValueError(f"engine {engine.name} holds {most} windows, and the model's layers have more of their own: no plan fits there")
    ends = np.append(starts[1:], len(values)) - 1
    longest = np.repeat(chosen[ends], np.diff(np.append(starts, len(values))))
    found = spans.copy()
    found[order] = np.repeat(longest, members)
    return found


def _best_runs(
    values: np.ndarray, lowest: np.ndarray, members: np.ndarray, slots: np.ndarray, most: int, multiple: int
) -> tuple[float, np.ndarray]:
    """Ascending `values` cut into at most `most` runs, all of each run taking the slots of its last value: the fewest tokens that takes,
    and where the runs start. By dynamic programming over where they end.

    lowest: of the members of each value the least that one can see, which a run must not exceed. All (values,).
    """
    count = len(values)
    before = np.concatenate([[0], np.cumsum(members)])
    # cost[i, j]: of one run with the values i to j.
    cost = np.full((count, count), np.inf)
    for i in range(count):
        filled = -(-(before[i + 1 :] - before[i]) // multiple) * multiple
        cost[i, i:] = np.where(np.minimum.accumulate(lowest[i:]) >= values[i:], filled * slots[i:], np.inf)
    best, came = [np.append(0.0, np.full(count, np.inf))], []
    for _ in range(min(most, count)):
        total = best[-1][:-1, None] + cost
        came.append(total.argmin(axis=0))
        best.append(np.append(np.inf, total.min(axis=0)))
    used = int(np.argmin([row[-1] for row in best]))
    starts, end = [], count
    for step in range(used, 0, -1):
        end = int(came[step - 1][end - 1])
        starts.append(end)
    return float(best[used][-1]), np.array(starts[::-1], dtype=int)
