"""The KV cache of a plan: every head keeps its sink and its window, and nothing else is allocated."""

from moa_lab.cache.layout import LayerLayout, layer_layouts
from moa_lab.cache.ring import RingLayer, allocated_kv_bytes

__all__ = ["LayerLayout", "RingLayer", "allocated_kv_bytes", "layer_layouts"]
