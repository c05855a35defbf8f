"""Engines by name, as they were at a version: what their own documents and sources say, in their default settings.

Only what decides how many tokens are allocated is modelled. Windows are fixed when an engine starts (`moa-lab-vllm` alone takes those of
each request), so a plan whose spans grow with the length is held as it is at one length. Engines change:
`dataclasses.replace(ENGINES["vllm"], block_tokens=32)` is another setting.

- `moa-lab`: this library's ring cache in transformers' `generate` (`moa_lab/cache/layout.py`): any window for any KV head.
- `moa-lab-vllm`: this library's plugin for vLLM (`moa_lab/serving/DESIGNS.md`, vLLM 0.32): pages of one KV head x 64 tokens. Where
  heads store other bits its pages are of one size and hold more tokens of some: up to a tenth of them may stay unused, not counted.
- `transformers`: as of 5.19, `DynamicCache(config=...)` gives a layer of type "sliding_attention" the config's one `sliding_window` and
  keeps everything in the others (`cache_utils.py`).
- `transformers-paged`: continuous batching, as of 5.19 (`generation/continuous_batching/cache_allocators/`): the same two kinds of
  layers, a ring of whole pages for the window; `page_size` 256 by default. Its sectors, which all requests share, are not counted.
- `vllm`: as of 0.11, `SlidingWindowSpec` beside `FullAttentionSpec` (`v1/kv_cache_interface.py`): a window per layer, blocks of 16 tokens,
  and one block more, since a window may begin inside a block. Groups of layers of unequal size are padded there, which is not counted
  here, nor what it reserves for the chunk of a prompt.
- `sglang`: as of 0.5, the hybrid pool for sliding windows (`mem_cache/allocator.py`): one window size and whole layers.
- `tensorrt-llm`: as of 1.0, `KvCacheConfig(max_attention_window=[...])`: a window per layer, blocks of `tokens_per_block` 32.
- `llama.cpp`: as of mid-2025, `llama_kv_cache_iswa` (`src/llama-kv-cache-iswa.cpp`): one window size and whole layers; a window's cache
  has room for a micro-batch (`-ub` 512) beside it, and is rounded up to 256 cells.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moa_lab.engines.limits import EngineLimits

NO_SINK = "windows have no sink"

ENGINES: Mapping[str, EngineLimits] = {
    engine.name: engine
    for engine in (
        EngineLimits("moa-lab", stores_bits=True, keeps_sink=True, needs="moa_lab.apply_plan, or moa_lab.generate"),
        EngineLimits("moa-lab-vllm", block_tokens=64, stores_bits=True, keeps_sink=True, needs="moa-lab serve"),
        EngineLimits("transformers", windows_per_model=1, windows_per_layer=1, needs=f"layer_types in the config; {NO_SINK}"),
        EngineLimits(
            "transformers-paged", windows_per_model=1, windows_per_layer=1, block_tokens=256, needs=f"layer_types in the config; {NO_SINK}",
        ),
        EngineLimits("vllm", windows_per_layer=1, block_tokens=16, tokens_in_flight=16, needs=f"windows in the model's code; {NO_SINK}"),
        EngineLimits("sglang", windows_per_model=1, windows_per_layer=1, needs=f"windows in the model's code; {NO_SINK}"),
        EngineLimits("tensorrt-llm", windows_per_layer=1, block_tokens=32, needs=f"max_attention_window; {NO_SINK}"),
        EngineLimits(
            "llama.cpp", windows_per_model=1, windows_per_layer=1, block_tokens=256, tokens_in_flight=512,
            needs=f"a model type with a window pattern; {NO_SINK}",
        ),
    )
}  # fmt: skip
"""Engines by name."""

Engine = EngineLimits | str
"""What functions that take an engine take: its limits, the name of one of `ENGINES`, or limits of one's own as `engine_of` reads them."""
LIMITS = ("windows_per_model", "windows_per_layer", "class_multiple", "block_tokens", "tokens_in_flight")
"""Fields of `EngineLimits` that are numbers."""


def engine_of(engine: Engine) -> EngineLimits:
    """The limits themselves, those of the engine of that name, or those of a text such as `windows_per_model=4,block_tokens=16`, by
    which the engine is then called.

    Raises ValueError for another name, and for limits that are unknown, named twice or no whole numbers.
    """
    if isinstance(engine, EngineLimits) or engine in ENGINES:
        return engine if isinstance(engine, EngineLimits) else ENGINES[engine]
    pairs = [part.partition("=") for part in engine.split(",")]
    found = {name.strip(): number.strip() for name, _, number in pairs}
    if len(found) < len(pairs) or not found.keys() <= set(LIMITS) or not all(number.isdecimal() for number in found.values()):
        raise ValueError(
            f"engine must be one of {', '.join(ENGINES)}, or whole numbers for some of {', '.join(LIMITS)} "
            f"such as windows_per_model=4,block_tokens=16; got {engine!r}"
        )
    numbers: dict[str, Any] = {name: int(number) for name, number in found.items()}
    return EngineLimits(engine, **numbers)
