"""Solve a mixed-integer model with HiGHS, in this process or in a child process that can be stopped."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, hstack

IN_PROCESS_S = 1.0
"""A cancellable model first runs this long in this process: most finish, and starting a child takes as long."""
IN_PROCESS_ENTRIES = 50_000
"""A cancellable model with more matrix entries runs in a child at once: HiGHS checks the time between steps, which grow long."""


@dataclass(frozen=True)
class Model:
    """Minimise `objective . x` with `low <= matrix x <= high`; the first `binaries` variables are 0 or 1, all others at least 0, and the
    next `integers` whole. offset: added to the objective."""

    objective: np.ndarray
    binaries: int
    matrix: csr_array
    low: np.ndarray
    high: np.ndarray
    integers: int = 0
    offset: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """`status`: optimal, time_limit, infeasible or cancelled. `x` is None without a solution; `bound` is proven."""

    status: str
    x: np.ndarray | None
    bound: float


def solve(model: Model, *, time_limit_s: float, mip_gap: float, cancel: threading.Event | None = None) -> Outcome:
    """Solve within `time_limit_s`; with `cancel`, a large or slow model runs in a child process, killed when it is set."""
    if cancel is None:
        return _solve_here(model, time_limit_s, mip_gap)
    if cancel.is_set():
        return Outcome("cancelled", None, -np.inf)
    if model.matrix.nnz > IN_PROCESS_ENTRIES:
        return _solve_apart(model, time_limit_s, mip_gap, cancel)
    first = _solve_here(model, min(IN_PROCESS_S, time_limit_s), mip_gap)
    if first.status != "time_limit" or time_limit_s <= IN_PROCESS_S:
        return first
    later = _solve_apart(model, time_limit_s - IN_PROCESS_S, mip_gap, cancel)
    x = first.x if later.x is None else later.x
    return Outcome(later.status, x, max(first.bound, later.bound))


def _solve_here(model: Model, time_limit_s: float, mip_gap: float) -> Outcome:
    """With presolve, then without where that fails: HiGHS's presolve has called feasible models infeasible, or given up on them."""
    began = time.monotonic()
    outcome = _call(model, time_limit_s, mip_gap, presolve=True)
    left = time_limit_s - (time.monotonic() - began)
    if outcome.status in ("optimal", "time_limit") or left <= 0:
        return replace(outcome, status="time_limit") if outcome.status == "trouble" else outcome
    again = _call(model, left, mip_gap, presolve=False)
    return replace(again, status="time_limit") if again.status == "trouble" else again


def _call(model: Model, time_limit_s: float, mip_gap: float, presolve: bool) -> Outcome:
    """One call of HiGHS; status "trouble" where the solver itself failed."""
    # scipy passes no offset, to which a relative gap must refer too: the last variable is 1.
    index = np.arange(len(model.objective) + 1)
    last = index == len(model.objective)
    upper = np.where((index < model.binaries) | last, 1.0, np.inf)
    result = milp(
        np.append(model.objective, model.offset),
        integrality=(index < model.binaries + model.integers).astype(int),
        bounds=Bounds(last.astype(float), upper),
        constraints=LinearConstraint(hstack([model.matrix, csr_array((len(model.low), 1))], format="csr"), model.low, model.high),
        options={"time_limit": time_limit_s, "mip_rel_gap": mip_gap, "presolve": presolve},
    )
    # scipy: 0 optimal, 1 iteration or time limit, 2 infeasible, 3 unbounded, 4 other.
    status = {0: "optimal", 1: "time_limit", 2: "infeasible"}.get(result.status, "trouble")
    bound = getattr(result, "mip_dual_bound", None)
    x = None if result.x is None else result.x[:-1]
    return Outcome(status, x, float(bound) if bound is not None and np.isfinite(bound) else -np.inf)


def _solve_apart(model: Model, time_limit_s: float, mip_gap: float, cancel: threading.Event) -> Outcome:
    with tempfile.TemporaryDirectory(prefix="moa-lab-") as folder:
        question, answer = Path(folder, "model.npz"), Path(folder, "outcome.npz")
        np.savez(
            question, objective=model.objective, binaries=model.binaries, integers=model.integers, offset=model.offset,
            low=model.low, high=model.high, data=model.matrix.data, indices=model.matrix.indices, indptr=model.matrix.indptr,
            time_limit_s=time_limit_s, mip_gap=mip_gap,
        )  # fmt: skip
        # Not multiprocessing: its spawn imports the caller's script again, which fails without a main guard.
        code = "import sys; from moa_lab.search.highs import answer; answer(sys.argv[1], sys.argv[2])"
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        child = subprocess.Popen(
            [sys.executable, "-c", code, str(question), str(answer)],
            env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        try:
            stopped = _wait(child, time.monotonic() + 2 * time_limit_s + 10, cancel)
        finally:
            child.kill()
            complaint = child.communicate()[1].decode(errors="replace").strip()
        if stopped is not None:
            return Outcome(stopped, None, -np.inf)
        if child.returncode or not answer.exists():
            raise RuntimeError(f"the solver process ended with code {child.returncode}: {complaint[-300:]}")
        with np.load(answer, allow_pickle=False) as found:
            x = found["x"] if found["x"].size else None
            return Outcome(str(found["status"]), x, float(found["bound"]))


def _wait(child: subprocess.Popen[bytes], deadline: float, cancel: threading.Event) -> str | None:
    """Wait for the child: why it must be stopped, or None when it ended by itself."""
    while child.poll() is None:
        if cancel.wait(0.05):
            return "cancelled"
        if time.monotonic() > deadline:
            return "time_limit"
    return None


def answer(question: str, target: str) -> None:
    """Runs in the child: read a model, solve it, write the outcome."""
    with np.load(question, allow_pickle=False) as data:
        shape = (len(data["low"]), len(data["objective"]))
        matrix = csr_array((data["data"], data["indices"], data["indptr"]), shape=shape)
        whole, offset = (int(data["binaries"]), int(data["integers"])), float(data["offset"])
        model = Model(data["objective"], whole[0], matrix, data["low"], data["high"], whole[1], offset)
        outcome = _solve_here(model, float(data["time_limit_s"]), float(data["mip_gap"]))
    x = np.array([]) if outcome.x is None else outcome.x
    np.savez(target, x=x, status=outcome.status, bound=outcome.bound)
