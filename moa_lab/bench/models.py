"""Whole models to decode with: real geometry, random weights, plans as unequal as recorded ones; largest batch and roofline."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from moa_lab.bench.shapes import Spans, by_fraction, stretched
from moa_lab.geometry import ModelGeometry
from moa_lab.plan import Plan, SpanRule, bits_of
from moa_lab.storage import RecordError

STEP_BACK = 16
"""After a batch that did not fit, the next is smaller by 1/16, and by at least one row."""


@dataclass(frozen=True)
class ModelShape:
    """A decoder of the Llama family, without weights."""

    name: str
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return self.query_heads * self.head_dim


LLAMA2_7B = ModelShape("Llama-2-7B", 32, 32, 32, 128, 11008, 32000)
LLAMA3_8B = ModelShape("Llama-3-8B", 32, 32, 8, 128, 14336, 128256)
TINY = ModelShape("tiny", 2, 4, 2, 16, 96, 512)


def config_of(shape: ModelShape, max_length: int, **more: Any) -> LlamaConfig:
    """transformers' config of a shape. more: other fields."""
    return LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_hidden_layers=shape.layers,
        num_attention_heads=shape.query_heads, num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim,
        max_position_embeddings=max_length, tie_word_embeddings=False, **more,
    )  # fmt: skip


def random_model(
    shape: ModelShape, max_length: int, device: torch.device, dtype: torch.dtype, seed: int = 0, spread: float = 1.0
) -> PreTrainedModel:
    """A model with normal weights, made on the device itself; speed does not depend on their values.

    spread: approximate standard deviation of logits, and of queries and keys before attention.
    """
    config = config_of(shape, max_length, initializer_range=spread * shape.hidden**-0.5)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.device(device):
        torch.manual_seed(seed)
        model = LlamaForCausalLM._from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def stretched_plan(plan: Plan, geometry: ModelGeometry, n_tokens: int, seed: int = 0) -> Plan:
    """A plan for `geometry` with the density of `plan` at lengths near `n_tokens`, and heads as unequal as those of `plan`.

    As `stretched_spans`, over the heads of all layers together, shuffled. Where heads differ in bits, each is stored in those of the head
    of `plan` in the middle of its part.
    """
    heads = geometry.layers * geometry.kv_heads
    parts, sink = stretched(plan, heads, n_tokens)
    order = np.random.default_rng(seed).permutation(heads)
    shuffled = parts[order].reshape(geometry.layers, geometry.kv_heads)
    rules = tuple(tuple(SpanRule(0.0, min(float(part), 1.0)) for part in row) for row in shuffled)
    whole = Plan(geometry, rules, sink_tokens=sink, min_span=sink + 1, name=plan.name, lengths=(n_tokens,), search={"origin": "stretched"})
    widths = plan.widths().reshape(-1, 2)[by_fraction(plan)]
    middles = (2 * np.arange(heads) + 1) * len(widths) // (2 * heads)
    return whole.with_bits(widths[middles][order].reshape(geometry.layers, geometry.kv_heads, 2))


def plan_for(plan: Plan | str | Path, geometry: ModelGeometry, n_tokens: int) -> Plan:
    """The plan itself where its layers and KV heads are those of `geometry`, else stretched to it.

    A path leads to a config card or to a published plan; raises RecordError for another file.
    """
    loaded = plan if isinstance(plan, Plan) else _loaded(plan, geometry)
    if (loaded.geometry.layers, loaded.geometry.kv_heads) == (geometry.layers, geometry.kv_heads):
        return replace(loaded, geometry=geometry)
    return stretched_plan(loaded, geometry, n_tokens)


def _loaded(path: str | Path, geometry: ModelGeometry) -> Plan:
    try:
        return Plan.load(path)
    except RecordError:
        return Plan.from_published(path, geometry)


def described_plan(shape: ModelShape, plan: Plan, batch: int, n_tokens: int) -> dict[str, Any]:
    """The shape of a row as JSON data. density: of tokens; skew: longest over mean span, over all layers; bits, and the density of bytes,
    only where they are fewer than the dtype's."""
    spans = Spans(n_tokens, plan.sink_tokens, tuple(plan.spans(n_tokens).ravel().tolist()))
    return {
        "model": shape.name, "query_heads": shape.query_heads, "kv_heads": shape.kv_heads, "head_dim": shape.head_dim,
        "batch": batch, "n_tokens": n_tokens, "plan": plan.name, "sink_tokens": plan.sink_tokens,
        "density": round(spans.density, 4), "skew": round(spans.skew, 2),
        **({"bits": bits_of(plan), "bytes": round(plan.density(n_tokens), 4)} if plan.bits else {}),
    }  # fmt: skip


def largest_batch(free_bytes: int, reserve_bytes: int, row_bytes: int, at_most: int = 4096) -> int:
    """Rows of `row_bytes` each that fit beside a reserve; 0 where none does."""
    return max(0, min((free_bytes - reserve_bytes) // row_bytes, at_most))


def smaller_batch(batch: int) -> int:
    """The batch to try after one that did not fit."""
    return batch - max(1, batch // STEP_BACK)


def read_weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of weights that a decode step reads: all but the input embeddings, of which it reads one vector per row."""
    table = model.get_input_embeddings().weight
    return sum(parameter.nbytes for parameter in model.parameters() if parameter is not table)


def kept_bytes(plan: Plan, n_tokens: int, length: int, itemsize: int) -> int:
    """Bytes of K and V that heads hold of a row of `length` tokens, with spans for `n_tokens`. itemsize: of the model's dtype."""
    return int((np.minimum(plan.spans(n_tokens), length) * plan.token_bytes(itemsize)).sum())


def roofline_ms(weight_bytes: int, kv_bytes: int, bytes_per_s: float) -> float:
    """Milliseconds in which a device that copies `bytes_per_s` (read and written) can read weights and cache once."""
    return (weight_bytes + kv_bytes) / bytes_per_s * 1e3
