"""Searching for what an engine can hold: the table as the engine allocates it, and what is found, for all heads again."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moa_lab.engines import Engine, EngineLimits, engine_of, held
from moa_lab.plan import Plan
from moa_lab.records import Front, FrontPoint, LossTable


def held_table(table: LossTable, engine: Engine | None) -> LossTable:
    """The table whose densities are of what `engine` (None: nothing that limits) allocates.

    Where that cuts whole layers, a layer is one head, whose loss is the sum of its heads' losses: as losses add up, nothing is lost, and
    every solver works on it.
    """
    if engine is None:
        return table
    limits = engine_of(engine)
    if not limits.cuts_layers or table.geometry.kv_heads == 1:
        return replace(table, engine=limits)
    return replace(
        table, geometry=replace(table.geometry, query_heads=1, kv_heads=1), losses=table.losses.sum(axis=2, keepdims=True), engine=limits
    )


def front_for_all_heads(front: Front, table: LossTable) -> Front:
    """A front of a held table, whose plans have the rules of all heads of `table`."""
    return replace(front, points=tuple(replace(point, plan=for_all_heads(point.plan, table)) for point in front))


def for_all_heads(plan: Plan, table: LossTable) -> Plan:
    """A plan of a held table, with the rules of all heads of `table`."""
    if plan.geometry == table.geometry:
        return plan
    heads = table.geometry.kv_heads
    return replace(
        plan, geometry=table.geometry, rules=tuple(row * heads for row in plan.rules), bits=tuple(row * heads for row in plan.bits)
    )


def told_front(front: Front, engine: EngineLimits) -> Front:
    """The front whose plans say which engine they were searched for, and the density that it allocates at the front's lengths."""
    return replace(front, points=tuple(_told(point, engine) for point in front), settings={**front.settings, "engine": engine.name})


def _told(point: FrontPoint, engine: EngineLimits) -> FrontPoint:
    allocated = {n: round(held(point.plan, engine, int(n)).density, 6) for n in point.density}
    search = {**point.plan.search, "engine": {"name": engine.name, "limits": engine.told(), "allocated": allocated}}
    return replace(point, plan=replace(point.plan, search=search))


def over_heads(choice: np.ndarray, kv_heads: int) -> np.ndarray:
    """A choice of a held table (layers, 1 or kv_heads) for all heads: (layers, kv_heads)."""
    return np.broadcast_to(choice, (len(choice), kv_heads)).copy()
