"""The rows of decoding end to end, from the findings of each side."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moa_lab.bench.endtoend import COMPILED, DENSE, DYNAMIC, LENGTHS, ROWS, STATIC, TOLD, Findings, Job, ours_name
from moa_lab.bench.models import TINY, described_plan
from moa_lab.bench.record import GOALS, BenchRow, Goal, judged
from moa_lab.plan import UNTOUCHED, WHOLE_BITS, Plan

PLAN_DENSITY = {"E1": 0.5, "E2": 0.25, "E4": 0.5, "E5": 0.5, "E6": 0.25}
"""Kept bytes over all; where the row itself stores fewer bits, kept tokens."""
SAME_TOKENS = {"E5": "E1", "E6": "E2"}
"""Rows whose goals inform where a row of stored bits has none of its own: those of the same tokens in 16 bits."""
DENSITY_TOLERANCE = 0.02
PEERS = {DYNAMIC: "dynamic", STATIC: "static", DENSE: "dense"}
"""Peers of all rows, and their kinds of sides."""
ELSEWHERE = "given, not measured in this process"


def rows_of(state: Findings) -> list[BenchRow]:
    """The rows of all that is measured, in the order of their names."""
    rows: list[BenchRow] = []
    seen = set()
    for job in state.jobs:
        if _ours(state, job) is None:
            continue
        if job.row in state.rows:
            rows += [_rate_row(state, job, peer) for peer in (*_asked_peers(state, job), *_more_peers(state, job))]
        if "E3" in state.rows and (job.shape, job.prompt, job.stored) not in seen:
            seen.add((job.shape, job.prompt, job.stored))
            rows.append(_roofline_row(state, job))
    return sorted(rows, key=lambda row: ROWS.index(row.id))


def goal_of(job: Job, peer: str) -> Goal:
    """The goal of the ratio to a peer; against DynamicCache, a length without its own goal has that of 4k, if there is one."""
    if peer in TOLD or peer == job.beside:
        return GOALS[f"{job.row} {'16 bits' if peer == job.beside else peer}"]
    row = SAME_TOKENS.get(job.row, job.row)
    names = [f"{row} DynamicCache {prompt}" for prompt in (job.prompt, LENGTHS[0])] if peer == DYNAMIC else []
    goal = next((GOALS[name] for name in names if name in GOALS), GOALS[row])
    return replace(goal, informs=row != job.row)


def _ours(state: Findings, job: Job, plain: bool = False) -> dict[str, Any] | None:
    """Our fastest measurement, or, `plain`, the one that was not compiled; None where there is none yet."""
    return _fastest(state, job, ours_name(job.stored), plain)


def _fastest(state: Findings, job: Job, side: str, plain: bool = False) -> dict[str, Any] | None:
    """The faster of a side of ours and the same compiled."""
    names = [side] if plain else [side, side + COMPILED]
    found = [state.found.get((job.shape.name, job.prompt, name), {"failed": "not yet"}) for name in names]
    return max((side for side in found if "failed" not in side), key=lambda side: float(side["rate"]), default=None)


def _asked_peers(state: Findings, job: Job) -> dict[str, dict[str, Any]]:
    """Of the peers of all rows those that are measured or still to be; all where a row would have none."""
    sides = {peer: state.found.get((job.shape.name, job.prompt, peer)) for peer in PEERS}
    asked = [peer for peer, found in sides.items() if found or PEERS[peer] in state.kinds]
    return {peer: sides[peer] or {"failed": "not measured yet"} for peer in asked or ([] if job.beside else PEERS)}


def _more_peers(state: Findings, job: Job) -> dict[str, dict[str, Any]]:
    """What a row of stored bits is held against beside the peers of all rows: 16 bits, and what was told of `TOLD`."""
    if job.beside is None:
        return {}
    told = {peer: {"rate": rate, "told": ELSEWHERE} for (peer, prompt), rate in state.told.items() if prompt == job.prompt}
    return {job.beside: _fastest(state, job, job.beside) or {"failed": "not measured"}, **told}


def _rate_row(state: Findings, job: Job, peer: str) -> BenchRow:
    """E1, E2, E4 to E6: tokens/s against a peer's; against our dense loop, both not compiled."""
    goal, ours = goal_of(job, peer), (_ours(state, job, plain=True) if peer == DENSE else None) or _ours(state, job)
    assert ours is not None
    plan, shape, detail = _told(state, job, ours)
    counted = plan if job.bits == WHOLE_BITS else plan.with_bits(UNTOUCHED)
    fair = abs(counted.density(shape["n_tokens"]) - PLAN_DENSITY[job.row]) <= DENSITY_TOLERANCE
    rate = detail["peers"].get(peer, {}).get("rate")
    return judged(job.row, goal, shape, ours["rate"], rate, peer, "tokens/s", fair and _trusted(state, job), detail)


def _roofline_row(state: Findings, job: Job) -> BenchRow:
    """E3: milliseconds of a step against the time to read weights and kept cache once."""
    ours = _ours(state, job)
    assert ours is not None
    _, shape, detail = _told(state, job, ours)
    peers = detail.pop("peers")
    detail["others_over_roofline"] = {side: found["over_roofline"] for side, found in peers.items() if "over_roofline" in found}
    return judged("E3", GOALS["E3"], shape, ours["ms"], ours["roofline_ms"], "roofline", "ms", _trusted(state, job), detail)


def _told(state: Findings, job: Job, ours: dict[str, Any]) -> tuple[Plan, dict[str, Any], dict[str, Any]]:
    """The plan, the shape and the details of a row."""
    plan = state.used[job.shape.name, job.prompt, ours_name(job.stored)]
    shape = described_plan(job.shape, plan, ours["batch"], state.n_tokens(job.prompt))
    peers = _asked_peers(state, job) | _more_peers(state, job)
    return plan, shape, {**ours, "check": state.checks[job.shape.name, job.stored], "peers": peers}


def _trusted(state: Findings, job: Job) -> bool:
    """True where a row may meet its goal: a real model on a GPU, and no wrong tokens."""
    return state.is_gpu and job.shape != TINY and state.checks[job.shape.name, job.stored].get("wrong") == 0
