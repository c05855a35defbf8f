"""The KV cache of a plan: every head keeps its sink and its window, in the bits that the plan says, and nothing else is allocated."""

from moa_lab.cache.allocation import allocated_kv_bytes, ring_layer
from moa_lab.cache.layout import LayerLayout, layer_layouts
from moa_lab.cache.packed import PackedRing
from moa_lab.cache.ring import RingLayer

__all__ = ["LayerLayout", "PackedRing", "RingLayer", "allocated_kv_bytes", "layer_layouts", "ring_layer"]
