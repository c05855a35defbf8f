"""Memory that the rings of a model allocate, against the plan's prediction (M1)."""

from __future__ import annotations

import torch

from moa_lab.bench.lab import Lab
from moa_lab.bench.record import GOALS, BenchRow, judged
from moa_lab.bench.shapes import MEMORY_LAYERS, Shape, described, kv_bytes
from moa_lab.cache import LayerLayout, RingLayer

MEBI = 2**20


def memory_row(shape: Shape, lab: Lab, layers: int = MEMORY_LAYERS) -> BenchRow:
    """M1: MiB that `layers` full rings allocate, against density times the MiB of their dense cache.

    On a GPU as counted by torch's allocator, rounding included; without one, the bytes of the tensors.
    """
    spans = lab.spans(shape)
    layout = LayerLayout(spans.sink_tokens, spans.windows, None, shape.n_tokens)
    before = _allocated(lab)
    rings = [RingLayer(layout, shape.batch, shape.head_dim, lab.dtype, lab.device) for _ in range(layers)]
    own = sum(ring.allocated_bytes for ring in rings)
    ours = _allocated(lab) - before if lab.is_gpu else own
    dense = layers * kv_bytes(shape, shape.kv_heads * shape.n_tokens, lab.dtype.itemsize)
    detail = {"layers": layers, "tensor_bytes": own, "dense_bytes": dense, "counted_by": "torch.cuda" if lab.is_gpu else "tensors"}
    return judged(
        "M1", GOALS["M1"], described(shape, spans), ours / MEBI, spans.density * dense / MEBI, "density x dense", "MiB", lab.is_gpu, detail
    )  # fmt: skip


def _allocated(lab: Lab) -> int:
    return torch.cuda.memory_allocated(lab.device) if lab.is_gpu else 0
