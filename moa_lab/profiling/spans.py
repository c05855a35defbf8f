"""What every window of every head is worth while the model runs under a plan: one sample at a time, small enough to keep."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from moa_lab.calibration.samples import Sample
from moa_lab.geometry import ModelGeometry
from moa_lab.models import geometry_of, weights_fingerprint
from moa_lab.plan import Plan
from moa_lab.profiling.backward import backward_pass, checkpointed
from moa_lab.profiling.influence import LayerInfluence
from moa_lab.storage import is_intact, read_tensors, write_tensors

PART_SCHEMA = "moa-lab/span-effects-part/1"


def span_effects(
    model: PreTrainedModel, batch: list[Sample], plan: Plan, *, checkpoint: bool = False, parts_dir: Path | None = None
) -> np.ndarray:
    """Span effects under `plan`, float32 (samples, layers, query_heads, N/64): see `InfluenceProfile.span_effects`.

    Entry b is the first-order loss change between a window of 64 b tokens and the whole head, everything else as in the plan:
    the difference of two entries says what moving a head's window is worth from here. batch: samples of one length.
    checkpoint: recompute activations to save memory. parts_dir: finished samples are kept there and not computed again.
    Raises ValueError for a plan of another geometry.
    """
    geometry = geometry_of(model)
    plan.check_model(geometry)
    if parts_dir is None:
        return _computed(model, geometry, batch, plan, checkpoint)
    setting = f"{weights_fingerprint(model)}-{plan.identity()}"
    paths = [parts_dir / f"{sample.identity}-{setting}.safetensors" for sample in batch]
    missing = [(sample, path) for sample, path in zip(batch, paths, strict=True) if not is_intact(path, _read)]
    if missing:
        computed = _computed(model, geometry, [sample for sample, _ in missing], plan, checkpoint)
        for (_, path), effects in zip(missing, computed, strict=True):
            write_tensors(path, {"span_effects": effects}, {"schema": PART_SCHEMA})
    return np.stack([_read(path) for path in paths])


def _computed(model: PreTrainedModel, geometry: ModelGeometry, batch: list[Sample], plan: Plan, checkpoint: bool) -> np.ndarray:
    layers: dict[int, LayerInfluence] = {}
    with checkpointed(model, checkpoint):
        backward_pass(model, batch, layers.__setitem__, plan.sink_tokens, plan.windows(batch[0].length), elements=False)
    stacked = torch.stack([layers[layer].span_effects for layer in range(geometry.layers)], dim=1)
    return np.asarray(stacked.float().cpu().numpy())


def _read(path: Path) -> np.ndarray:
    return read_tensors(path, PART_SCHEMA)[0]["span_effects"]
