"""A plan under engines as a table: what each allocates, and how many requests that leaves room for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from moa_lab.engines.holding import held
from moa_lab.engines.limits import EngineLimits
from moa_lab.plan import Plan, dense_plan
from moa_lab.text import one_line

HEADER = ("engine", "tokens", "asked", "allocated", "windows", "in a layer", "KV a sequence")
REQUESTS = ("requests", "dense")


def engine_table(
    plan: Plan, engines: Iterable[EngineLimits], lengths: Sequence[int], kv_room: float | None = None
) -> tuple[list[tuple[str, ...]], dict[str, str]]:
    """Rows of an engine and a length in tokens, below a header; and by name why an engine does not hold the plan.

    kv_room: bytes for keys and values of all requests; then how many fit is told, and how many of the dense cache.
    """
    rows: list[tuple[str, ...]] = [HEADER if kv_room is None else (*HEADER, *REQUESTS)]
    refused: dict[str, str] = {}
    for limits in engines:
        try:
            rows += [_row(plan, limits, n, kv_room) for n in lengths]
        except ValueError as error:
            refused[limits.name] = one_line(error)
    return rows, refused


def _row(plan: Plan, limits: EngineLimits, n: int, kv_room: float | None) -> tuple[str, ...]:
    """Raises ValueError as `held` does."""
    found, whole = held(plan, limits, n), held(dense_plan(plan.geometry), limits, n)
    allocated = f"{found.density:.1%}" + ("" if found.exact else " rounded")
    requests = () if kv_room is None else tuple(f"{max(0, kv_room // each.kv_bytes):,.0f}" for each in (found, whole))
    kept = f"{found.kv_bytes / 2**20:,.1f} MiB"
    return (limits.name, f"{n:,}", f"{plan.density(n):.1%}", allocated, str(found.windows), str(found.layer_windows), kept, *requests)
