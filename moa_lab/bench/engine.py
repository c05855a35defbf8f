"""Decoding and prefill by vLLM with random weights, at its largest batch: the peer of rows E5 to E7, in a process of its own."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import torch

from moa_lab.bench.models import LLAMA2_7B, ModelShape, config_of
from moa_lab.clock import clock
from moa_lab.provenance import provenance

ENGINE_SCHEMA = "moa-lab/engine/1"
STORES = {"vLLM-bf16": "auto", "vLLM-fp8": "fp8"}
"""kv_cache_dtype of each peer."""
MEMORY = 0.95
"""Share of the GPU's memory that the engine may use."""
NEW_TOKENS = 192
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
) -> dict[str, Any]:
    """Tokens/s of `peer` (of `STORES`) for prompts of each length, as JSON data; vLLM must be installed.

    All requests of a batch start together, as many as the engine's cache holds. prefill_rate: prompt tokens/s until each has its first new
    token; rate: new tokens/s after that, from the difference between answers of `new_tokens` more tokens and of one. engine: the
    module, None for vllm. Raises ValueError for another peer, ModuleNotFoundError without vLLM.
    """
    if peer not in STORES:
        raise ValueError(f"peer must be among {', '.join(STORES)}, got {peer}")
    engine = engine or importlib.import_module("vllm")
    longest = max(prompts) + 1 + new_tokens
    config = config_of(shape, longest, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        llm = engine.LLM(
            model=folder, load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", kv_cache_dtype=STORES[peer],
            max_model_len=longest, max_num_seqs=AT_MOST, gpu_memory_utilization=memory, enable_prefix_caching=False,
        )  # fmt: skip
        cache = llm.llm_engine.vllm_config.cache_config
        rows = []
        for done, prompt in enumerate(prompts):
            blocks = -(-(prompt + 1 + new_tokens) // cache.block_size)
            batch = min(cache.num_gpu_blocks // blocks, AT_MOST)
            rows.append({"prompt": prompt, "batch": batch, **_rates(engine, llm, shape, batch, prompt, new_tokens)})
            if progress is not None:
                progress(done + 1, len(prompts))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "schema": ENGINE_SCHEMA, "peer": peer, "model": shape.name, "vllm": engine.__version__,
        "torch": torch.__version__, "device": device, "memory": memory, "cache_tokens": cache.num_gpu_blocks * cache.block_size,
        "new_tokens": new_tokens, "rows": rows,
        "provenance": vars(provenance(device=device, seed=0)),
    }  # fmt: skip


def told_by(record: dict[str, Any], rate: str = "rate") -> list[str]:
    """What `moa-lab bench generate` takes as --peer: NAME@PROMPT=TOKENS_PER_S. rate: "prefill_rate" for `moa-lab bench answering`."""
    return [f"{record['peer']}@{row['prompt']}={row[rate]:.1f}" for row in record["rows"]]


def _rates(engine: Any, llm: Any, shape: ModelShape, batch: int, prompt: int, new_tokens: int) -> dict[str, float]:
    """Seconds of a batch that answers one token, and `new_tokens` more, and the two rates."""
    rng = np.random.default_rng(prompt)
    first = _seconds(engine, llm, rng.integers(shape.vocabulary, size=(batch, prompt)), 1)
    whole = _seconds(engine, llm, rng.integers(shape.vocabulary, size=(batch, prompt)), 1 + new_tokens)
    return {
        "first_s": first, "whole_s": whole, "prefill_rate": batch * prompt / first, "rate": batch * new_tokens / (whole - first),
        "ms": (whole - first) / new_tokens * 1e3,
    }  # fmt: skip


def _seconds(engine: Any, llm: Any, tokens: np.ndarray, new_tokens: int) -> float:
    asked = engine.SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    began = clock(torch.device("cpu"))
    answers = llm.generate([{"prompt_token_ids": row.tolist()} for row in tokens], asked, use_tqdm=False)
    seconds = clock(torch.device("cpu")) - began
    short = sum(len(answer.outputs[0].token_ids) != new_tokens for answer in answers)
    if short or len(answers) != len(tokens):
        raise RuntimeError(f"the engine answered {len(answers)} of {len(tokens)} requests, {short} of them not with {new_tokens} tokens")
    return seconds
