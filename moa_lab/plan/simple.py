"""Plans that need no profile: dense, uniform, and whole heads over a floor."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from moa_lab.geometry import ModelGeometry
from moa_lab.plan.card import Plan
from moa_lab.plan.rules import DENSE, MIN_SPAN, SpanRule

EQUAL_BYTES = 0.01
"""Of the bytes: plans whose densities are closer keep the same."""


def dense_plan(geometry: ModelGeometry, lengths: Iterable[int] = ()) -> Plan:
    """The plan that keeps everything: the reference of every comparison."""
    check_geometry(geometry)
    return _same_everywhere(geometry, DENSE, "dense", lengths)


def uniform_plan(geometry: ModelGeometry, density: float, lengths: Iterable[int] = (), **settings: int) -> Plan:
    """Every head keeps the same fraction: StreamingLLM (arXiv 2309.17453) at the KV bytes of `density`.

    Where layers have windows of their own the fraction is that of what a head may see, which its rule cannot follow at every length:
    it fits `lengths` (none: the model's longest), as many of them as possible: all, where all reach beyond the windows or none does.
    What rounding and the floor take there, the other layers give. Raises ValueError for a density outside (0, 1].
    """
    check_geometry(geometry)
    check_density(density)
    chosen = tuple(lengths)
    share = SpanRule(0.0, float(density))
    if density == 1 or not any(geometry.layer_windows):
        return _same_everywhere(geometry, share, "uniform", chosen, **settings)
    asked = sorted({*chosen}) or [geometry.max_length]
    tried = [
        Plan(geometry=geometry, rules=rules, name="uniform", lengths=chosen, search={"origin": "uniform"}, **dict[str, Any](settings))
        for rules in _window_rules(geometry, density, asked, settings.get("min_span", MIN_SPAN))
    ]

    def missed(plan: Plan) -> tuple[int, float]:
        off = [abs(plan.density(n) / density - 1) for n in asked]
        return sum(one > EQUAL_BYTES for one in off), sum(off)

    return min(tried, key=missed)


def full_or_floor_plan(
    geometry: ModelGeometry, whole: Iterable[tuple[int, int]], floor_tokens: int = 192, name: str = "ranked", lengths: Iterable[int] = ()
) -> Plan:
    """The (layer, kv_head) pairs of `whole` keep everything, all others a constant span of `floor_tokens`."""
    check_geometry(geometry)
    chosen = set(whole)
    floor = SpanRule(float(floor_tokens), 0.0)
    rules = tuple(
        tuple(DENSE if (layer, head) in chosen else floor for head in range(geometry.kv_heads)) for layer in range(geometry.layers)
    )
    return Plan(geometry=geometry, rules=rules, name=name, lengths=tuple(lengths))


def check_geometry(geometry: Any) -> None:
    """Raises ValueError for what is no geometry, such as the model itself."""
    if not isinstance(geometry, ModelGeometry):
        raise ValueError(
            f"a ModelGeometry is needed, got {type(geometry).__name__}: take a plan's .geometry, or ModelGeometry.from_config(model.config)"
        )


def check_density(density: float, name: str = "density") -> float:
    """Return `density` if it lies in (0, 1]; raise ValueError otherwise."""
    if not (isinstance(density, int | float) and math.isfinite(density) and 0 < density <= 1):
        raise ValueError(f"{name} must be a number above 0 and at most 1, got {density}")
    return float(density)


def _same_everywhere(geometry: ModelGeometry, rule: SpanRule, name: str, lengths: Iterable[int], **settings: Any) -> Plan:
    rules = ((rule,) * geometry.kv_heads,) * geometry.layers
    return Plan(geometry=geometry, rules=rules, name=name, lengths=tuple(lengths), search={"origin": name}, **settings)


def _window_rules(
    geometry: ModelGeometry, density: float, lengths: Sequence[int], min_span: int
) -> Iterator[tuple[tuple[SpanRule, ...], ...]]:
    """Rules of a uniform plan to choose from: a layer with a window follows the length, does not, or does between two lengths."""
    ends: list[tuple[int, int] | None] = [*itertools.combinations(lengths, 2), None]

    def row(layer: int, between: tuple[int, int] | None) -> SpanRule:
        window = geometry.layer_windows[layer]
        if window is None:
            return SpanRule(0.0, density)
        if between is None:
            return SpanRule(max(density * window, float(min_span)), 0.0)
        near, far = between
        slope = density * (min(far, window) - min(near, window)) / (far - near)
        return SpanRule(density * min(near, window) - slope * near, slope)

    yield ((SpanRule(0.0, density),) * geometry.kv_heads,) * geometry.layers
    for between in ends:
        rules = [row(layer, between) for layer in range(geometry.layers)]
        yield tuple((rule,) * geometry.kv_heads for rule in rules)
        whole = [layer for layer, window in enumerate(geometry.layer_windows) if window is None]
        if between is None and whole:
            # Tokens that the floor and whole numbers add to the windows, or take from them, are the others' to give.
            own = [(rules[layer], window) for layer, window in enumerate(geometry.layer_windows) if window is not None]
            spare = sum(density * window - rule.span_tokens(window, min_span) for rule, window in own)
            given = SpanRule(spare / len(whole), density)
            yield tuple((given if layer in whole else rule,) * geometry.kv_heads for layer, rule in enumerate(rules))
