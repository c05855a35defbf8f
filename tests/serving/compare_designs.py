"""Two ways to give a plan's heads their pages in vLLM, by vLLM's own scheduler: how many requests fit, and what a step costs it.

Where vLLM is installed: python tests/serving/compare_designs.py. A: a cache per KV head, grouped by window (`PerHead`); B: one pool and
a manager of its own, which is what moa_lab.serving does. No model runs.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from vllm import SamplingParams
from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups, get_kv_cache_groups, get_max_concurrency_for_kv_cache_config
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, SlidingWindowSpec
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.request import Request

from moa_lab.plan import Plan
from moa_lab.serving import PAGE_TOKENS, request_pages
from moa_lab.serving.vllm.specs import HeadPagesManager, HeadPagesSpec, register_specs

MEMORY_BYTES = 512 << 20
CHUNK = 2048
STEPS = 20
RUNS = Path(__file__).parents[2] / "data/runs"


@dataclass(frozen=True, kw_only=True)
class PerHead(SlidingWindowSpec):
    """A head with a window, of which the sink stays."""

    sink: int = 64

    def max_admission_blocks_per_request(self, max_in_flight_tokens: int, max_model_len: int) -> int:
        return super().max_admission_blocks_per_request(max_in_flight_tokens, max_model_len) + cdiv(self.sink, self.block_size)


class PerHeadManager(SlidingWindowManager):
    def remove_skipped_blocks(self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None) -> None:
        gone = self.get_num_skipped_tokens(processed_computed_tokens) // self.block_size
        self._remove_blocks_in_range(request_id, cdiv(self.kv_cache_spec.sink, self.block_size), gone)


def engine(n_tokens: int) -> Any:
    """What the scheduler reads of a VllmConfig."""
    cache = SimpleNamespace(
        num_gpu_blocks_override=None, prefix_cache_retention_interval=None, enable_prefix_caching=False,
        get_resolved_kv_cache_layout=lambda: KVCacheLayout.LBHNC,
    )  # fmt: skip
    return SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=n_tokens), cache_config=cache, max_in_flight_tokens=CHUNK, speculative_config=None,
        parallel_config=SimpleNamespace(decode_context_parallel_size=1), attention_config=SimpleNamespace(hisparse_config=None),
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
    )  # fmt: skip


def rounded(windows: np.ndarray, classes: int) -> np.ndarray:
    """Windows rounded up to so many different ones, with the fewest tokens added (dynamic programming)."""
    sizes, counts = np.unique(windows, return_counts=True)
    if len(sizes) <= classes:
        return windows
    least = np.full((classes + 1, len(sizes) + 1), np.inf)
    least[0, 0] = 0
    cut = np.zeros(least.shape, dtype=int)
    for used in range(1, classes + 1):
        for end in range(1, len(sizes) + 1):
            costs = [least[used - 1, start] + counts[start:end].sum() * sizes[end - 1] for start in range(end)]
            cut[used, end] = int(np.argmin(costs))
            least[used, end] = min(costs)
    found, end = {}, len(sizes)
    for used in range(classes, 0, -1):
        found |= dict.fromkeys(sizes[cut[used, end] : end].tolist(), int(sizes[end - 1]))
        end = cut[used, end]
    return np.array([found[window] for window in windows.tolist()])


def per_head(plan: Plan, n_tokens: int, classes: int) -> dict[str, KVCacheSpec]:
    windows = rounded(np.minimum(plan.windows(n_tokens).ravel(), n_tokens), classes)
    of_page: dict[str, Any] = {"block_size": PAGE_TOKENS, "num_kv_heads": 1, "head_size": plan.geometry.head_dim, "dtype": torch.bfloat16}
    return {
        f"head {at}": FullAttentionSpec(**of_page) if window >= n_tokens else PerHead(**of_page, sliding_window=int(window))
        for at, window in enumerate(windows)
    }


def measure(specs: dict[str, KVCacheSpec], n_tokens: int) -> str:
    """Fill the memory with requests of `n_tokens`, one after the other in chunks, then let half of them decode."""
    config = engine(n_tokens)
    groups = get_kv_cache_groups(config, specs)
    cache = get_kv_cache_config_from_groups(config, groups, MEMORY_BYTES)
    manager = KVCacheManager(cache, n_tokens, PAGE_TOKENS, PAGE_TOKENS, max_in_flight_tokens=CHUNK, enable_caching=False)
    held: list[Request] = []
    while True:
        one = Request(str(len(held)), prompt_token_ids=[1] * n_tokens, sampling_params=SamplingParams(max_tokens=1), pooling_params=None)
        for each in manager.coordinator.single_type_managers:
            if isinstance(each, HeadPagesManager):
                each.expect(one.request_id, n_tokens)
        starts = range(0, n_tokens, CHUNK)
        if not all(_goes_on(manager, one, start, min(CHUNK, n_tokens - start)) for start in starts):
            break
        manager.remove_skipped_blocks(one.request_id, n_tokens, n_tokens)
        held.append(one)
    live = held[: max(len(held) // 2, 1)]
    for one in held[len(live) :]:
        manager.free(one)
    started = time.perf_counter()
    for step in range(STEPS):
        for one in live:
            _goes_on(manager, one, n_tokens - 40 + step, 1)
    microseconds = 1e6 * (time.perf_counter() - started) / (STEPS * len(live))
    told = get_max_concurrency_for_kv_cache_config(config, cache)
    return f"{len(groups):3} groups, vLLM says {told:5.2f}, {len(held):3} fit, {microseconds:4.0f} us a step and request"


def _goes_on(manager: KVCacheManager, request: Request, computed: int, new: int) -> bool:
    request.num_computed_tokens = computed
    return manager.allocate_slots(request, new) is not None


def main() -> None:
    logging.disable(logging.CRITICAL)
    register_specs()
    KVCacheSpecRegistry.register(PerHead, PerHeadManager)
    for name in ("standard-25", "standard-50"):
        plan = Plan.load(RUNS / name / "plan.json")
        shape: dict[str, Any] = {"block_size": PAGE_TOKENS, "head_size": plan.geometry.head_dim, "dtype": torch.bfloat16}
        for n_tokens in (4096, 8192):
            dense = FullAttentionSpec(num_kv_heads=plan.geometry.kv_heads, **shape)
            print(f"{name} at {n_tokens} tokens, density {plan.density(n_tokens):.3f}")
            print("  dense        ", measure({f"layer {at}": dense for at in range(plan.geometry.layers)}, n_tokens))
            for classes in (4, 8, 90):
                print(f"  A, {classes:2} windows", measure(per_head(plan, n_tokens, classes), n_tokens))
            pool = HeadPagesSpec(num_kv_heads=1, shares=(request_pages(plan, (n_tokens,), n_tokens),), **shape)
            print("  B            ", measure({"pool": pool}, n_tokens))


if __name__ == "__main__":
    main()
