"""Prompts of a whole model, as `generate` takes them in (E7): tokens/s until the first new token, against what vLLM told."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel, __version__

from moa_lab.bench.endtoend import ours_name
from moa_lab.bench.generate import fitting_batch
from moa_lab.bench.lab import bench_device, bench_dtype, device_name
from moa_lab.bench.models import LLAMA2_7B, TINY, described_plan, plan_for, random_model
from moa_lab.bench.record import GOALS, BenchRecord, BenchRow, judged
from moa_lab.bench.shapes import default_plans
from moa_lab.bench.tries import tried_run
from moa_lab.clock import clock
from moa_lab.interface.compiled import compiling
from moa_lab.models import geometry_of
from moa_lab.plan import Plan, dense_plan
from moa_lab.provenance import provenance
from moa_lab.runtime import apply_plan, ring_cache
from moa_lab.runtime.generate import PREFILL_TOKENS, prefill

ROW, PEER = "E7", "vLLM-bf16"
PLAIN, COMPILED = "plain", "compiled layers"
NEW_TOKENS = 64
REPEATS = 2
"""Passes over all prompts: the first of a shape also compiles."""


def bench_answering(
    prompt: int = 4096,
    batches: Collection[int] = (8, 64),
    quick: bool = False,
    told: Mapping[tuple[str, int], float] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> BenchRecord:
    """Rows E7: the dense model and the recorded plans, `batches` of prompts of `prompt` tokens each, on the geometry of Llama-2-7B.

    Each as the model is written and, on a GPU, with its layers compiled; the row tells the faster. Fewer prompts at once where so many do
    not fit; what fits not even once has no row, and is told in the settings. quick: a tiny model, also without a GPU. told: prompt tokens/s
    of `PEER`, by (peer, prompt). Raises ValueError without a GPU if not quick.
    """
    device = bench_device("bench_answering", quick)
    shape, on_gpu = TINY if quick else LLAMA2_7B, device.type == "cuda"
    n_tokens = prompt + NEW_TOKENS
    model = random_model(shape, n_tokens, device, bench_dtype(device))
    plans: dict[str, Plan] = {"dense": dense_plan(geometry_of(model))}
    plans |= {name: replace(plan_for(plan, geometry_of(model), n_tokens), name=name) for name, plan in default_plans().items()}
    most = {name: fitting_batch(model, plan, ours_name(name), n_tokens) for name, plan in plans.items()}
    tasks = [(name, batch) for name in plans for batch in dict.fromkeys(min(batch, most[name]) for batch in batches) if batch]
    rows: list[BenchRow] = []
    failed: list[dict[str, Any]] = []
    peer = (told or {}).get((PEER, prompt))
    for done, (name, batch) in enumerate(tasks, 1):
        plan = plans[name]
        ways = (PLAIN, COMPILED)[: 2 if on_gpu else 1]
        found = {how: tried_run(partial(_rate, model, plan, batch, prompt, how == COMPILED), device) for how in ways}
        failed += [{"plan": name, "batch": batch, "how": how, **each} for how, each in found.items() if "failed" in each]
        rates = [each["rate"] for each in found.values() if "rate" in each]
        if rates:
            described, detail = described_plan(shape, plan, batch, n_tokens), {"peers": found, "prompt": prompt}
            rows.append(judged(ROW, GOALS[ROW], described, max(rates), peer, PEER, "tokens/s", on_gpu and not quick, detail))
        if progress is not None:
            progress(done, len(tasks))
    name = device_name(device)
    settings = {
        "device": name, "dtype": str(model.dtype).removeprefix("torch."), "torch": torch.__version__, "transformers": __version__,
        "weights": "random", "prefill_tokens": PREFILL_TOKENS, "failed": failed,
        "told": [[*key, rate] for key, rate in (told or {}).items()],
    }  # fmt: skip
    return BenchRecord(tuple(rows), settings, provenance(device=name, seed=0))


@torch.no_grad()
def _rate(model: PreTrainedModel, plan: Plan, batch: int, prompt: int, compiled: bool) -> dict[str, Any]:
    """Tokens/s (rate) and ms of the last of `REPEATS` passes over all prompts."""
    tokens = torch.randint(model.config.vocab_size, (batch, prompt)).tolist()
    ms = 0.0
    with apply_plan(model, plan, prompt + NEW_TOKENS), compiling(model) if compiled else contextlib.nullcontext():
        for _ in range(REPEATS):
            cache = ring_cache(model, prompt + NEW_TOKENS)
            began = clock(model.device)
            prefill(model, cache, tokens, PREFILL_TOKENS)
            ms = (clock(model.device) - began) * 1e3
            del cache
    return {"ms": ms, "rate": batch * prompt / ms * 1e3}
