"""One decode step of a whole model, timed for every side, over caches filled with random keys and values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.utils import counters
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

from moa_lab.bench.filling import fill_ring
from moa_lab.clock import clock
from moa_lab.models import geometry_of
from moa_lab.plan import Plan
from moa_lab.runtime import RingCache, Sampling, apply_plan, ring_cache
from moa_lab.runtime.decoding import WARM_UP, Decoder

SETTLED = WARM_UP + 3
"""Untimed steps: compilation, graph capture, and the first replays."""

FIRST_TOKENS = 8
"""Tokens that are run through the model to create our cache; random keys and values fill the rest."""

FILL_TOKENS = 1024
"""Tokens written to a StaticCache at once."""


def transformers_step(model: PreTrainedModel, static: bool, batch: int, prompt: int, new_tokens: int) -> dict[str, Any]:
    """Milliseconds (ms) of a step of transformers' own model after `prompt` tokens.

    static: over a StaticCache, on a GPU compiled with mode="reduce-overhead"; else over a DynamicCache, as it is.
    """
    device, compiled = model.device, static and model.device.type == "cuda"
    cache = StaticCache(config=model.config, max_cache_len=prompt + new_tokens) if static else DynamicCache(config=model.config)
    # In one chunk: a DynamicCache copies itself with every chunk.
    fill_cache(cache, model, batch, prompt, FILL_TOKENS if static else prompt)
    forward = torch.compile(model, mode="reduce-overhead", dynamic=False) if compiled else model
    tokens = torch.randint(model.config.vocab_size, (batch, 1), device=device)
    positions = torch.full_like(tokens, prompt)
    counters.clear()
    for step in range(new_tokens - 1):
        if step == SETTLED:
            began = clock(device)
        if compiled:
            torch.compiler.cudagraph_mark_step_begin()
        logits = forward(input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=True).logits
        tokens.copy_(logits[:, -1].argmax(dim=-1, keepdim=True))
        positions += 1
    ms = (clock(device) - began) * 1e3 / (new_tokens - 1 - SETTLED)
    if not compiled:
        return {"ms": ms, "compiled": False}
    skips, breaks = counters["inductor"]["cudagraph_skips"], sum(counters["graph_break"].values())
    return {"ms": ms, "compiled": True, "graphs": counters["stats"]["unique_graphs"], "graph_breaks": breaks, "graph_skips": skips}


def fill_cache(cache: Cache, model: PreTrainedModel, batch: int, prompt: int, chunk: int) -> None:
    """Put `prompt` random tokens, the same in every layer, into a cache of transformers, `chunk` at a time."""
    geometry = geometry_of(model)
    for start in range(0, prompt, chunk):
        size = (batch, geometry.kv_heads, min(chunk, prompt - start), geometry.head_dim)
        key, value = (torch.randn(size, dtype=model.dtype, device=model.device) for _ in range(2))
        for layer in range(geometry.layers):
            cache.update(key, value, layer)


def our_step(model: PreTrainedModel, plan: Plan, batch: int, prompt: int, new_tokens: int, compiled: bool = False) -> dict[str, Any]:
    """Milliseconds (ms) of a step of our loop after `prompt` tokens; on a GPU a CUDA graph, `compiled` by torch.compile if asked."""
    compiled = compiled and model.device.type == "cuda"
    with apply_plan(model, plan, prompt + new_tokens):
        cache = ring_cache(model, prompt + new_tokens)
        tokens = torch.randint(model.config.vocab_size, (batch, FIRST_TOKENS), device=model.device)
        logits = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        fill_rings(cache, prompt)
        forward = torch.compile(model, fullgraph=True) if compiled else model
        lengths = torch.full((batch,), prompt, device=model.device)
        decoder = TimedDecoder(forward, cache, lengths, Sampling(), [], new_tokens)
        decoder.first(logits[:, -1])
        decoder.run()
        ms = (clock(model.device) - decoder.began) * 1e3 / (decoder.steps - SETTLED)
        return {"ms": ms, "compiled": compiled, "captured": decoder.captured, "allocated_bytes": cache.allocated_bytes}


def fill_rings(cache: RingCache, prompt: int) -> None:
    """Bring a cache that holds a few tokens to `prompt` tokens, with random keys and values in all slots."""
    for ring in cache.rings:
        fill_ring(ring)
    cache.lengths.fill_(prompt)
    cache.came(prompt - cache.get_seq_length())


class TimedDecoder(Decoder):
    """A decoder that reads the clock after `SETTLED` steps. began: seconds."""

    began = 0.0

    def _step(self) -> None:
        self._look()
        super()._step()

    def _captured(self) -> Callable[[], None] | None:
        replay = super()._captured()
        if replay is None:
            return None

        def step() -> None:
            self._look()
            replay()

        return step

    def _look(self) -> None:
        # Never during graph capture, which comes earlier: reading the clock synchronises with the GPU.
        if self.steps == SETTLED:
            self.began = clock(self._tokens.device)
