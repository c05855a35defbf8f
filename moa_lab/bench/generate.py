"""Decoding end to end, every side at its largest batch: against transformers, a compiled cache, our dense loop, the roofline."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, __version__

from moa_lab.bench.check import check_tokens
from moa_lab.bench.endtoend import COMPILED, DYNAMIC, KINDS, ROWS, STATIC, TOLD, Findings, Job, jobs_of, ours_name, tasks_of
from moa_lab.bench.generate_rows import rows_of
from moa_lab.bench.lab import bench_device, bench_dtype, device_name
from moa_lab.bench.models import (
    TINY,
    ModelShape,
    kept_bytes,
    largest_batch,
    plan_for,
    random_model,
    read_weight_bytes,
    roofline_ms,
    smaller_batch,
)  # fmt: skip
from moa_lab.bench.record import BenchRecord
from moa_lab.bench.shapes import default_plans
from moa_lab.bench.steps import SETTLED, our_step, transformers_step
from moa_lab.bench.timing import copy_rate
from moa_lab.bench.tries import release, tried_run
from moa_lab.geometry import ModelGeometry
from moa_lab.models import geometry_of
from moa_lab.plan import WHOLE_BITS, Plan, dense_plan, stored_plan
from moa_lab.provenance import provenance
from moa_lab.side_by_side import free_bytes

NEW_TOKENS, QUICK_NEW_TOKENS = 64, 16
RESERVE_BYTES = 2 * 2**30
"""Memory for other activations, CUDA graphs, and the workspaces of libraries."""

QUICK_BYTES = 2**20


def bench_generate(
    rows: Collection[str] = ROWS,
    quick: bool = False,
    plans: Sequence[Plan | str | Path] = (),
    out: str | Path | None = None,
    sides: Collection[str] = KINDS,
    lengths: Collection[int] | None = None,
    resume: bool = False,
    progress: Callable[[int, int], None] | None = None,
    told: Mapping[tuple[str, int], float] | None = None,
) -> BenchRecord:
    """Measure the rows named, of E1 to E6; E1 to E4 take about a quarter of an hour on a GPU of 80 GB.

    quick: a tiny model, also without a GPU, where no row meets its goal. plans: plans, config cards or published plans, every one in all
    rows, instead of the recorded ones of 50% and 25%. out: the record is written there after every side. sides: some of `KINDS`. lengths:
    some prompt lengths. resume: sides in the record at `out` are not measured again, and what was told stays. progress: called with sides
    done and sides in all. told: tokens/s of `TOLD`, peers that cannot run here, by (peer, prompt tokens): rows E5 and E6 are held against
    them. Raises ValueError for an unknown row, side or peer, for two plans of one name, where nothing can be measured, and for rows E5 and
    E6 of a plan that has bits.
    """
    state = open_findings(rows, quick, plans, sides, lengths)
    _check_told(told or {}, state)
    if resume and out is not None and Path(out).exists():
        _take_up(state, BenchRecord.load(out))
    state.told.update(told or {})
    shapes = list(dict.fromkeys(job.shape for job in state.jobs))
    tasks = {shape: tasks_of(state, shape) for shape in shapes}
    total, done = sum(map(len, tasks.values())), 0
    for shape in shapes:
        longest = state.n_tokens(max(job.prompt for job in state.jobs))
        model = random_model(shape, longest, state.device, state.dtype)
        _resolve(state, shape, model)
        for prompt, side in tasks[shape]:
            state.found[shape.name, prompt, side] = _measured(state, shape, model, prompt, side)
            done += 1
            if out is not None:
                _record(state).save(out)
            if progress is not None:
                progress(done, total)
        del model
        release(state.device)
    record = _record(state)
    if out is not None:
        record.save(out)
    return record


def open_findings(
    rows: Collection[str],
    quick: bool,
    plans: Sequence[Plan | str | Path] = (),
    sides: Collection[str] = KINDS,
    lengths: Collection[int] | None = None,
) -> Findings:
    """Empty findings, with the copy rate measured. Raises ValueError as `bench_generate`."""
    for name, asked, known in (("rows", rows, ROWS), ("sides", sides, KINDS)):
        if not asked or not set(asked) <= set(known):
            raise ValueError(f"{name} must be among {', '.join(known)}, got {', '.join(sorted(set(asked) - set(known))) or 'none'}")
    device = bench_device("bench_generate", quick)
    named = {_name_of(plan): plan for plan in plans} or dict[str, Plan | str | Path](default_plans())
    if plans and len(named) < len(plans):
        raise ValueError(f"plans must have names of their own, got {', '.join(map(_name_of, plans))}")
    jobs = jobs_of(rows, quick, named, lengths)
    if not jobs:
        raise ValueError(f"lengths must be among those of the rows, 4096 to 65536, got {sorted(lengths or ())}")
    rate = copy_rate(device) if device.type == "cuda" else copy_rate(device, QUICK_BYTES)
    return Findings(device, bench_dtype(device), named, jobs, rows, sides, QUICK_NEW_TOKENS if quick else NEW_TOKENS, rate)


def _name_of(plan: Plan | str | Path) -> str:
    """A plan's own name; of a file that of the file, or of its folder where every run calls the file so."""
    if isinstance(plan, Plan):
        return plan.name
    path = Path(plan)
    return path.parent.name if path.name == "plan.json" and path.parent.name else path.stem


def _take_up(state: Findings, record: BenchRecord) -> None:
    """Resume from a record. Raises ValueError where its device, dtype, plans or number of new tokens are others."""
    fresh = _record(state).settings
    for name in ("device", "dtype", "plans", "new_tokens"):
        if record.settings.get(name) != fresh[name]:
            raise ValueError(f"the record cannot be resumed: its {name} is {record.settings.get(name)!r}, here it is {fresh[name]!r}")
    for entry in record.settings["sides"]:
        # Failed sides are tried again.
        if "failed" not in entry["found"]:
            state.found[entry["model"], entry["prompt"], entry["side"]] = entry["found"]
    state.told.update({(entry["peer"], entry["prompt"]): entry["rate"] for entry in record.settings.get("told", ())})


def _check_told(told: Mapping[tuple[str, int], float], state: Findings) -> None:
    """Raise ValueError for another peer than `TOLD`, a prompt that no row has, and a rate that is none."""
    prompts = {job.prompt for job in state.jobs}
    for (peer, prompt), rate in told.items():
        if peer not in TOLD or prompt not in prompts or not 0 < rate < float("inf"):
            raise ValueError(
                f"told must be tokens/s of {' or '.join(TOLD)} at a prompt of the rows ({', '.join(map(str, sorted(prompts)))}), "
                f"got {peer} at {prompt}: {rate}"
            )


def _record(state: Findings) -> BenchRecord:
    """The rows of all that is measured."""
    name = device_name(state.device)
    settings = {
        "device": name, "dtype": str(state.dtype).removeprefix("torch."), "torch": torch.__version__, "transformers": __version__,
        "ceilings": {"copy_GB/s": state.copy_bytes / 1e9}, "new_tokens": state.new_tokens, "timed_steps": state.new_tokens - 1 - SETTLED,
        "prefill": "none: random keys and values in the caches of all sides", "weights": "random",
        "allocator": os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""),
        "plans": {name: plan.identity() if isinstance(plan, Plan) else Path(plan).name for name, plan in state.plans.items()},
        "told": [{"peer": peer, "prompt": prompt, "rate": rate} for (peer, prompt), rate in state.told.items()],
        "sides": [{"model": model, "prompt": prompt, "side": side, "found": found} for (model, prompt, side), found in state.found.items()],
    }  # fmt: skip
    return BenchRecord(tuple(rows_of(state)), settings, provenance(device=name, seed=0))


def _resolve(state: Findings, shape: ModelShape, model: PreTrainedModel) -> None:
    """Set the plans of a model's jobs, and check our loop under them."""
    for job in (job for job in state.jobs if job.shape == shape):
        whole = plan_for(state.plans[job.plan], geometry_of(model), state.n_tokens(job.prompt))
        plan = _stored(whole, job)
        state.used[shape.name, job.prompt, ours_name(job.stored)] = plan
        if job.beside:
            state.used[shape.name, job.prompt, job.beside] = whole
        if (shape.name, job.stored) not in state.checks:
            size = {} if shape != TINY else {"n_tokens": 144, "new_tokens": 16}
            check = partial(check_tokens, shape, plan, state.device, state.dtype, **size)
            state.checks[shape.name, job.stored] = tried_run(check, state.device)


def _stored(whole: Plan, job: Job) -> Plan:
    """The plan in the bits of the job. Raises ValueError where both have some."""
    if job.bits != WHOLE_BITS and whole.bits:
        raise ValueError(f"row {job.row} stores a plan in bits of its own, and plan {whole.name!r} has some: pass plan.with_bits(16)")
    return stored_plan(whole, job.bits)


def _measured(state: Findings, shape: ModelShape, model: PreTrainedModel, prompt: int, side: str) -> dict[str, Any]:
    """A side at the largest batch that fits: see `measured_side`."""
    plan = state.used.get((shape.name, prompt, side.removesuffix(COMPILED))) or dense_plan(geometry_of(model))
    batch = fitting_batch(model, plan, side, state.n_tokens(prompt))
    return measured_side(model, plan, side, batch, prompt, state.new_tokens, state.copy_bytes)


def fitting_batch(model: PreTrainedModel, plan: Plan, side: str, n_tokens: int) -> int:
    """Rows of `n_tokens` tokens of `side` that should fit beside a reserve: in the free memory of a GPU, in `QUICK_BYTES` on a CPU."""
    itemsize = model.dtype.itemsize
    row = plan.kv_bytes(n_tokens, itemsize) + extra_bytes(plan.geometry, side, n_tokens, itemsize)
    if model.device.type != "cuda":
        return largest_batch(QUICK_BYTES, 0, row)
    return largest_batch(free_bytes(model.device), RESERVE_BYTES, row + logits_bytes(model))


def measured_side(
    model: PreTrainedModel, plan: Plan, side: str, batch: int, prompt: int, new_tokens: int, copy_bytes: float
) -> dict[str, Any]:
    """Speed of decoding by `side` with `batch` rows of `prompt` tokens (fewer where these do not fit), and its roofline.

    side: `DYNAMIC` or `STATIC` of transformers (`plan` is then the dense one), else our loop under `plan`, compiled where the name ends in
    `COMPILED`. copy_bytes: the device's copy rate, bytes/s. Returns tokens/s of all rows (rate), ms per step, batch, bytes of K and V
    that a step reads (kept_bytes), roofline_ms and over_roofline, batches tried; or why it "failed".
    """
    n_tokens, tried = prompt + new_tokens, 0
    found: dict[str, Any] = {"failed": f"not even one row of {n_tokens} tokens fits"}
    while batch > 0:
        tried += 1
        found = tried_run(partial(_run, model, plan, side, batch, prompt, new_tokens), model.device)
        if not found.get("out_of_memory"):
            break
        batch = smaller_batch(batch)
    if "failed" in found:
        return found
    length = prompt + (SETTLED + new_tokens) // 2
    kv = batch * kept_bytes(plan, n_tokens, length, model.dtype.itemsize)
    roofline = roofline_ms(read_weight_bytes(model), kv, copy_bytes)
    rate = batch / found["ms"] * 1e3
    over = {"roofline_ms": roofline, "over_roofline": found["ms"] / roofline}
    return {**found, **over, "batch": batch, "rate": rate, "kept_bytes": kv, "tried": tried}


def logits_bytes(model: PreTrainedModel) -> int:
    """Bytes per row of a step's logits: in the model's dtype and in float32, each inside a captured graph and before it."""
    return 2 * model.config.get_text_config(decoder=True).vocab_size * (model.dtype.itemsize + torch.float32.itemsize)


def extra_bytes(geometry: ModelGeometry, side: str, n_tokens: int, itemsize: int) -> int:
    """Bytes per row that a side needs beside the cache: copies of a layer where the cache grows or KV heads are repeated per group."""
    layer = n_tokens * geometry.kv_bytes_per_token(itemsize)
    if side == DYNAMIC:
        return 2 * layer * geometry.kv_heads
    return layer * geometry.query_heads if side == STATIC and geometry.group_size > 1 else 0


@torch.no_grad()
def _run(model: PreTrainedModel, plan: Plan, side: str, batch: int, prompt: int, new_tokens: int) -> dict[str, Any]:
    if side in (DYNAMIC, STATIC):
        return transformers_step(model, side == STATIC, batch, prompt, new_tokens)
    return our_step(model, plan, batch, prompt, new_tokens, compiled=side.endswith(COMPILED))
