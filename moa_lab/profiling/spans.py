"""What every window of every head is worth while the model runs under a plan."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from moa_lab.calibration.samples import Sample, SampleSet, group_by_shape
from moa_lab.geometry import ModelGeometry
from moa_lab.models import geometry_of, weights_fingerprint
from moa_lab.plan import Plan
from moa_lab.profiling.backward import backward_pass, checkpointed
from moa_lab.profiling.estimate import estimate_cost
from moa_lab.profiling.influence import LayerInfluence
from moa_lab.profiling.profiler import Progress, batches
from moa_lab.records import ProfileKey
from moa_lab.storage import is_intact, read_tensors, write_tensors

PART_SCHEMA = "moa-lab/span-effects-part/1"


def span_effects(
    model: PreTrainedModel, samples: SampleSet, plan: Plan, *, parts_dir: str | Path | None = None, progress: Progress | None = None
) -> dict[ProfileKey, np.ndarray]:
    """Span effects under `plan`, float32 (samples, layers, query_heads, N/64) per (task, length): see `InfluenceProfile.span_effects`.

    Entry b is the first-order loss change between a window of 64 b tokens and the whole head while everything else is as in the
    plan: the difference of two entries says what moving a head's window is worth from there. Several times faster than a profile.
    parts_dir: finished samples are kept there and not computed again. Raises ValueError for a plan of another geometry.
    """
    geometry = geometry_of(model)
    plan.check_model(geometry)
    setting = f"{weights_fingerprint(model)}-{plan.identity()}"
    with contextlib.ExitStack() as stack:
        folder = Path(parts_dir) if parts_dir else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        paths = {sample.identity: folder / f"{sample.identity}-{setting}.safetensors" for sample in samples}
        missing = [sample for sample in samples if not is_intact(paths[sample.identity], _read)]
        done = len(samples) - len(missing)
        if missing:
            estimate = estimate_cost(model, missing, sink_tokens=plan.sink_tokens)
            for batch in batches(missing, None, estimate):
                for sample, effects in zip(batch, _computed(model, geometry, batch, plan, estimate.checkpoint), strict=True):
                    write_tensors(paths[sample.identity], {"span_effects": effects}, {"schema": PART_SCHEMA})
                done += len(batch)
                if progress:
                    progress(done, len(samples))
        return {key: np.stack([_read(paths[sample.identity]) for sample in group]) for key, group in group_by_shape(samples).items()}


def _computed(model: PreTrainedModel, geometry: ModelGeometry, batch: list[Sample], plan: Plan, checkpoint: bool) -> np.ndarray:
    layers: dict[int, LayerInfluence] = {}
    with checkpointed(model, checkpoint):
        backward_pass(model, batch, layers.__setitem__, plan.sink_tokens, plan.windows(batch[0].length), elements=False)
    stacked = torch.stack([layers[layer].span_effects for layer in range(geometry.layers)], dim=1)
    return np.asarray(stacked.float().cpu().numpy())


def _read(path: Path) -> np.ndarray:
    return read_tensors(path, PART_SCHEMA)[0]["span_effects"]
