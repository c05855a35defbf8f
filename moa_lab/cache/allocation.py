"""The ring of a layer, by what its heads store, and the bytes that the rings of a plan take."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moa_lab.cache.layout import LayerLayout, layer_layouts
from moa_lab.cache.packed import PackedRing
from moa_lab.cache.ring import RingLayer
from moa_lab.plan import Bits, Plan


def ring_layer(
    layout: LayerLayout, batch: int, head_dim: int, dtype: torch.dtype, device: torch.device, bits: Sequence[Bits] | None = None
) -> RingLayer:
    """An empty ring; bits: of every head's K and V (None: all untouched)."""
    if bits is None:
        return RingLayer(layout, batch, head_dim, dtype, device)
    return PackedRing(layout, batch, head_dim, dtype, device, bits)


def allocated_kv_bytes(plan: Plan, n_tokens: int, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu") -> int:
    """Bytes that the K and V of one sequence of `n_tokens` take under `plan`, found by allocating them, a layer at a time."""
    layouts, shape = layer_layouts(plan, n_tokens), (1, plan.geometry.head_dim, dtype, torch.device(device))
    return sum(ring_layer(layout, *shape, plan.bits_of(layer)).allocated_bytes for layer, layout in enumerate(layouts))
