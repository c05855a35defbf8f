"""Decoding and prefill by vLLM with random weights, at its largest batch: the peer of rows E5 to E7, and plans that it serves."""

from __future__ import annotations

import contextlib
import importlib
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moa_lab.bench.models import LLAMA2_7B, ModelShape, config_of, stretched_plan
from moa_lab.clock import clock
from moa_lab.geometry import ModelGeometry
from moa_lab.plan import Plan
from moa_lab.provenance import provenance
from moa_lab.serving import bucket_lengths, request_pages
from moa_lab.serving.page_pool import page_shape
from moa_lab.serving.vllm.in_process import prepare

ENGINE_SCHEMA = "moa-lab/engine/1"
STORES = {"vLLM-bf16": "auto", "vLLM-fp8": "fp8"}
"""kv_cache_dtype of each peer."""
SERVED = "vLLM-plan"
"""The side that serves a plan."""
MEMORY = 0.95
"""Share of the GPU's memory that the engine may use."""
NEW_TOKENS = 192
WARM_UP_TOKENS = 4
TINY_ENGINE = ModelShape("tiny", 2, 4, 2, 32, 96, 512)
"""Heads of 32, the fewest that vLLM's own attention takes."""
AT_MOST = 512
"""Sequences at once: more than fit at the shortest prompt."""


def bench_engine(
    peer: str,
    prompts: Collection[int],
    shape: ModelShape = LLAMA2_7B,
    new_tokens: int = NEW_TOKENS,
    memory: float = MEMORY,
    progress: Callable[[int, int], None] | None = None,
    engine: Any = None,
    plan: Plan | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Tokens/s of `peer` (of `STORES`, or `SERVED`) for prompts of each length, as JSON data; vLLM must be installed.

    All requests of a batch start together, as many as the engine's cache holds. prefill_rate: prompt tokens/s until each has its first new
    token. rate: new tokens/s of steps in which every request gets one, and no prompt is read; ms: of such a step. answer_rate: new
    tokens/s from the difference between answers of `new_tokens` more tokens and of one, prompts in between. engine: the module, None
    for vllm. plan: what `SERVED` runs under, stretched to the shape. settings: more of vLLM's. The engine runs in this process.
    Raises ValueError for another peer, and for a plan that is missing or too many, ModuleNotFoundError without vLLM, RuntimeError where
    answers are too short for such steps.
    """
    if peer not in (*STORES, SERVED):
        raise ValueError(f"peer must be among {', '.join((*STORES, SERVED))}, got {peer}")
    if (peer == SERVED) != (plan is not None):
        raise ValueError(f"a plan is for {SERVED}, which needs one")
    engine = engine or importlib.import_module("vllm")
    longest = max(prompts) + 1 + new_tokens
    config = config_of(shape, longest, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        served = None if plan is None else stretched_plan(plan, ModelGeometry.from_config(config), max(prompts))
        prepare(None if served is None else served.save(Path(folder) / "plan.json"))
        llm = engine.LLM(
            model=folder, load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", kv_cache_dtype=STORES.get(peer, "auto"),
            max_model_len=longest, max_num_seqs=AT_MOST, gpu_memory_utilization=memory, enable_prefix_caching=False, **settings,
        )  # fmt: skip
        cache = llm.llm_engine.vllm_config.cache_config
        rows = []
        for done, prompt in enumerate(prompts):
            blocks = _blocks(served, prompt + 1 + new_tokens, longest, cache.block_size)
            # A block of the cache belongs to nobody.
            batch = min((cache.num_gpu_blocks - 1) // blocks, AT_MOST)
            density = {} if served is None else {"density": served.density(prompt)}
            rows.append({"prompt": prompt, "batch": batch, **density, **_rates(engine, llm, shape, batch, prompt, new_tokens)})
            if progress is not None:
                progress(done + 1, len(prompts))
    # Of all heads: a block holds so many tokens of one, under a plan, and of every head without.
    heads = 1 if served is None else shape.layers * shape.kv_heads
    named = {} if plan is None else {"plan": plan.name, "plan_identity": plan.identity()}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "schema": ENGINE_SCHEMA, "peer": peer, **named, "model": shape.name, "vllm": engine.__version__,
        "torch": torch.__version__, "device": device, "memory": memory, "cache_tokens": cache.num_gpu_blocks * cache.block_size // heads,
        "new_tokens": new_tokens, "rows": rows,
        "provenance": vars(provenance(device=device, seed=0)),
    }  # fmt: skip


def quick_settings() -> dict[str, Any]:
    """A tiny model, few tokens, and a cache of some megabytes: shows that everything runs."""
    return {"shape": TINY_ENGINE, "new_tokens": 24, "enforce_eager": True, "kv_cache_memory_bytes": 4 << 20, "max_num_batched_tokens": 1024}


def told_by(record: dict[str, Any], rate: str = "rate") -> list[str]:
    """What `moa-lab bench generate` takes as --peer: NAME@PROMPT=TOKENS_PER_S. rate: "prefill_rate" for `moa-lab bench answering`."""
    return [f"{record['peer']}@{row['prompt']}={row[rate]:.1f}" for row in record["rows"]]


def _blocks(served: Plan | None, total: int, longest: int, block_tokens: int) -> int:
    """Blocks of the cache that a request of `total` tokens takes."""
    if served is None:
        return -(-total // block_tokens)
    tokens = page_shape(served, block_tokens, torch.bfloat16).tokens
    pages = request_pages(served, bucket_lengths(longest, block_tokens), longest, block_tokens, tokens)
    return pages.layouts[pages.bucket(total)].pages_for(total)


def _rates(engine: Any, llm: Any, shape: ModelShape, batch: int, prompt: int, new_tokens: int) -> dict[str, float]:
    """Seconds of a batch that answers one token, and `new_tokens` more, and the two rates."""
    rng = np.random.default_rng(prompt)
    # Kernels are compiled when they first run, some of them after the first new token.
    _seconds(engine, llm, rng.integers(shape.vocabulary, size=(batch, prompt)), 1 + WARM_UP_TOKENS)
    first = _seconds(engine, llm, rng.integers(shape.vocabulary, size=(batch, prompt)), 1)
    with _full_steps(llm, batch) as steps:
        whole = _seconds(engine, llm, rng.integers(shape.vocabulary, size=(batch, prompt)), 1 + new_tokens)
    if not steps:
        raise RuntimeError(f"no step had one token of each of {batch} requests: {new_tokens} new tokens are too few")
    step = sum(steps) / len(steps)
    return {
        "first_s": first, "whole_s": whole, "prefill_rate": batch * prompt / first, "rate": batch / step, "ms": step * 1e3,
        "steps": len(steps), "answer_rate": batch * new_tokens / (whole - first),
    }  # fmt: skip


@contextlib.contextmanager
def _full_steps(llm: Any, batch: int) -> Iterator[list[float]]:
    """Seconds from one step to the next, where both have one token of each of `batch` requests: the scheduler says what a step has.

    The step before must have them too: where an engine schedules a step while another runs, what passes until the next one is that one's.
    """
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    own, ticks, found = scheduler.schedule, list[tuple[float, bool]](), list[float]()

    def schedule(*arguments: Any, **settings: Any) -> Any:
        step = own(*arguments, **settings)
        tokens = step.num_scheduled_tokens
        ticks.append((clock(torch.device("cpu")), len(tokens) == batch and set(tokens.values()) == {1}))
        return step

    scheduler.schedule = schedule
    try:
        yield found
    finally:
        scheduler.schedule = own
        threes = zip(ticks, ticks[1:], ticks[2:], strict=False)
        found += [after - before for (_, last), (before, full), (after, next_full) in threes if last and full and next_full]


def _seconds(engine: Any, llm: Any, tokens: np.ndarray, new_tokens: int) -> float:
    asked = engine.SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    began = clock(torch.device("cpu"))
    answers = llm.generate([{"prompt_token_ids": row.tolist()} for row in tokens], asked, use_tqdm=False)
    seconds = clock(torch.device("cpu")) - began
    short = sum(len(answer.outputs[0].token_ids) != new_tokens for answer in answers)
    if short or len(answers) != len(tokens):
        raise RuntimeError(f"the engine answered {len(answers)} of {len(tokens)} requests, {short} of them not with {new_tokens} tokens")
    return seconds
