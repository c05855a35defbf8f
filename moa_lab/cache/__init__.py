"""The KV cache of a plan: every head keeps its sink and its window, and nothing else is allocated."""

from moa_lab.cache.layout import LayerLayout
from moa_lab.cache.ring import RingLayer

__all__ = ["LayerLayout", "RingLayer"]
