"""The rows of decoding end to end, from the findings of each side."""

from __future__ import annotations

from typing import Any

from moa_lab.bench.endtoend import COMPILED, DENSE, DYNAMIC, LENGTHS, ROWS, STATIC, Findings, Job, ours_name
from moa_lab.bench.models import TINY, described_plan
from moa_lab.bench.record import GOALS, BenchRow, Goal, judged
from moa_lab.plan import Plan

PLAN_DENSITY = {"E1": 0.5, "E2": 0.25, "E4": 0.5}
DENSITY_TOLERANCE = 0.02
PEERS = (DYNAMIC, STATIC, DENSE)


def rows_of(state: Findings) -> list[BenchRow]:
    """The rows of all that is measured, in the order of their names."""
    rows: list[BenchRow] = []
    seen = set()
    for job in state.jobs:
        if _ours(state, job) is None:
            continue
        if job.row in state.rows:
            rows += [_rate_row(state, job, peer) for peer in PEERS]
        if "E3" in state.rows and (job.shape, job.prompt, job.plan) not in seen:
            seen.add((job.shape, job.prompt, job.plan))
            rows.append(_roofline_row(state, job))
    return sorted(rows, key=lambda row: ROWS.index(row.id))


def goal_of(job: Job, peer: str) -> Goal:
    """The goal of the ratio to a peer; against DynamicCache, a length without its own goal has that of 4k, if there is one."""
    names = [f"{job.row} DynamicCache {prompt}" for prompt in (job.prompt, LENGTHS[0])] if peer == DYNAMIC else []
    return next((GOALS[name] for name in names if name in GOALS), GOALS[job.row])


def _ours(state: Findings, job: Job, plain: bool = False) -> dict[str, Any] | None:
    """Our fastest measurement, or, `plain`, the one that was not compiled; None where there is none yet."""
    names = [ours_name(job.plan)] if plain else [ours_name(job.plan), ours_name(job.plan) + COMPILED]
    found = [state.found.get((job.shape.name, job.prompt, name), {"failed": "not yet"}) for name in names]
    return max((side for side in found if "failed" not in side), key=lambda side: float(side["rate"]), default=None)


def _rate_row(state: Findings, job: Job, peer: str) -> BenchRow:
    """E1, E2, E4: tokens/s against a peer's; against our dense loop, both not compiled."""
    goal, ours = goal_of(job, peer), (_ours(state, job, plain=True) if peer == DENSE else None) or _ours(state, job)
    assert ours is not None
    plan, shape, detail = _told(state, job, ours)
    fair = abs(plan.density(shape["n_tokens"]) - PLAN_DENSITY[job.row]) <= DENSITY_TOLERANCE
    rate = detail["peers"].get(peer, {}).get("rate")
    return judged(job.row, goal, shape, ours["rate"], rate, peer, "tokens/s", fair and _trusted(state, job), detail)


def _roofline_row(state: Findings, job: Job) -> BenchRow:
    """E3: milliseconds of a step against the time to read weights and kept cache once."""
    ours = _ours(state, job)
    assert ours is not None
    _, shape, detail = _told(state, job, ours)
    peers = detail.pop("peers")
    detail["others_over_roofline"] = {side: found["over_roofline"] for side, found in peers.items() if "failed" not in found}
    return judged("E3", GOALS["E3"], shape, ours["ms"], ours["roofline_ms"], "roofline", "ms", _trusted(state, job), detail)


def _told(state: Findings, job: Job, ours: dict[str, Any]) -> tuple[Plan, dict[str, Any], dict[str, Any]]:
    """The plan, the shape and the details of a row."""
    plan = state.used[job.shape.name, job.prompt, ours_name(job.plan)]
    shape = described_plan(job.shape, plan, ours["batch"], state.n_tokens(job.prompt))
    peers = {side: state.found.get((job.shape.name, job.prompt, side), {"failed": "not measured yet"}) for side in PEERS}
    return plan, shape, {**ours, "check": state.checks[job.shape.name, job.plan], "peers": peers}


def _trusted(state: Findings, job: Job) -> bool:
    """True where a row may meet its goal: a real model on a GPU, and no wrong tokens."""
    return state.is_gpu and job.shape != TINY and state.checks[job.shape.name, job.plan].get("wrong") == 0
