"""The profiling loop: one forward and backward pass per sample, one file per finished sample."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moa_lab import processes
from moa_lab.calibration.dataset import Examiner, Keep
from moa_lab.calibration.origin import check_origin, check_vocabulary
from moa_lab.calibration.samples import Sample, SampleSet, group_by_shape
from moa_lab.geometry.wrappers import plain_model
from moa_lab.models import geometry_of, model_name, weights_fingerprint
from moa_lab.plan import SINK_TOKENS, Plan, PlanOrPath, as_plan
from moa_lab.profiling.backward import backward_pass, checkpointed
from moa_lab.profiling.estimate import Estimate, estimate_cost
from moa_lab.profiling.influence import LayerInfluence
from moa_lab.provenance import provenance
from moa_lab.records import BLOCK_TOKENS, InfluenceProfile, ProfileKey
from moa_lab.side_by_side import side_by_side
from moa_lab.storage import is_intact, read_tensors, write_tensors

logger = logging.getLogger(__name__)

PART_SCHEMA = "moa-lab/profile-part/1"
BY_SAMPLE = ("distances", "span_effects", "rounding")
"""What a profile keeps of every sample; of blocks it keeps the mean."""

Progress = Callable[[int, int], None]
"""Called with (samples done, samples in all)."""


def profile(
    model: PreTrainedModel,
    samples: SampleSet,
    *,
    plan: PlanOrPath | None = None,
    sink_tokens: int = SINK_TOKENS,
    parts_dir: str | Path | None = None,
    batch_size: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    any_model: bool = False,
    rounding: bool = False,
    progress: Progress | None = None,
) -> InfluenceProfile:
    """Influence of every (layer, query head) on the answers of `samples`, per (task, length).

    plan: the model runs under it, so that gradients are those of the plan's loss; None: dense.
    Each finished sample is written to `parts_dir`; the same call after a kill reads those and computes only the rest.
    batch_size: samples in one pass; None: as many as fit (on a CPU one, and a pass on every core). Sequences are neither padded nor cut.
    tokenizer: compared with the one that the samples name. any_model: accept samples of other weights or another tokenizer, whose
    answers are not the model's own. rounding: measure what storing K and V in fewer bits costs every head as well, which a search of bits
    for each head needs.
    Raises ValueError for samples of another model, a plan of another geometry, a model that cannot be routed, a length beyond the
    model's maximum, and (before it happens) a length that does not fit in memory.
    """
    model = plain_model(model)
    plan = None if plan is None else as_plan(plan)
    if not len(samples):
        raise ValueError("there are no calibration samples to profile")
    geometry = geometry_of(model)
    if not any_model:
        check_origin(samples.provenance, model, "samples", tokenizer)
    check_vocabulary(samples, model)
    if plan is not None:
        plan.check_model(geometry)
        plan.check_untouched("a profile")
    longest = max(sample.length for sample in samples)
    if longest > geometry.max_length:
        raise ValueError(f"a calibration sample has {longest} tokens, beyond the model's maximum of {geometry.max_length}")
    weights = weights_fingerprint(model)
    with contextlib.ExitStack() as stack:
        folder = Path(parts_dir) if parts_dir else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        paths = {sample.identity: _part(folder, sample, weights, sink_tokens, plan, rounding) for sample in samples}
        missing = processes.from_first(lambda: [sample for sample in samples if not is_intact(paths[sample.identity], _read_part)])
        done = len(samples) - len(missing)
        if progress:
            progress(done, len(samples))
        if missing:
            estimate = estimate_cost(model, missing, sink_tokens=sink_tokens)
            logger.info("profiling %d samples: %s", len(missing), estimate)
            estimate.require_fit()

            def work(batch: list[Sample]) -> tuple[list[Sample], list[dict[str, np.ndarray]]]:
                windows = plan.windows(batch[0].length) if plan else None
                layers: dict[int, LayerInfluence] = {}
                backward_pass(model, batch, layers.__setitem__, sink_tokens, windows, rounding=rounding)
                return batch, list(_parts(layers, geometry.layers))

            def take(found: tuple[list[Sample], list[dict[str, np.ndarray]]]) -> None:
                nonlocal done
                for sample, part in zip(*found, strict=True):
                    write_tensors(paths[sample.identity], part, {"schema": PART_SCHEMA})
                done += len(found[0])
                if progress:
                    progress(done, len(samples))

            batches = processes.from_first(lambda: list(_batches(missing, batch_size, estimate)))
            each = max(map(len, batches)) * estimate.bytes_in_flight
            with checkpointed(model, estimate.checkpoint):
                side_by_side(work, batches, model.device, bytes_each=each, after=take, first_only=True)
        merged = processes.from_first(lambda: _merge(samples, paths))
        return InfluenceProfile(
            geometry=geometry,
            sink_tokens=sink_tokens,
            **merged,
            provenance=provenance(
                model=model_name(model), weights=weights, calibration=samples.identity,
                tokenizer=samples.provenance.tokenizer, seed=samples.provenance.seed, device=str(model.device),
            ),
        )  # fmt: skip


def profiling_examiner(
    model: PreTrainedModel, lengths: Sequence[int], parts_dir: str | Path, *, sink_tokens: int = SINK_TOKENS, rounding: bool = False
) -> Examiner | None:
    """An examiner for `calibrate` that goes back through the forward pass of every draft it keeps: `profile` finds its part in `parts_dir`.
    rounding: as in `profile`.

    None where the forward pass is better made twice: on a GPU, which answers larger batches than it profiles, and where activations
    of one of the longest samples do not fit in memory.
    """
    model = plain_model(model)
    if model.device.type != "cpu":
        return None
    geometry, weights, folder = geometry_of(model), weights_fingerprint(model), Path(parts_dir)
    probes = [Sample("draft", np.zeros(n, np.int64), ((max(1, n - BLOCK_TOKENS), n),)) for n in lengths if n > 1]
    estimate = estimate_cost(model, probes, sink_tokens=sink_tokens)
    if estimate.checkpoint:
        return None

    def run(drafts: list[Sample], keep: Keep) -> list[Sample | None]:
        found: list[Sample | None] = []
        for draft in drafts:
            layers: dict[int, LayerInfluence] = {}
            (kept,) = backward_pass(model, [draft], layers.__setitem__, sink_tokens, keep=keep, rounding=rounding)
            if kept is not None:
                (part,) = _parts(layers, geometry.layers)
                write_tensors(_part(folder, kept, weights, sink_tokens, rounding=rounding), part, {"schema": PART_SCHEMA})
            found.append(kept)
        return found

    return Examiner(run, lambda length: estimate.needed_bytes)


def _part(folder: Path, sample: Sample, weights: str, sink_tokens: int, plan: Plan | None = None, rounding: bool = False) -> Path:
    """The file of a sample's influence."""
    under, more = f"-{plan.identity()}" if plan else "", "-rounding" if rounding else ""
    return folder / f"{sample.identity}-{weights}-{sink_tokens}{under}{more}.safetensors"


def _parts(found: Mapping[int, LayerInfluence], layers: int) -> Iterator[dict[str, np.ndarray]]:
    """Yield per sample, float32: blocks (layers, query_heads, N/64, N/64), distances and span_effects (layers, query_heads, N/64), and
    where it was asked for rounding (layers, kv_heads, widths, 2)."""
    names = [name for name in ("blocks", *BY_SAMPLE) if getattr(found[0], name) is not None]
    stacked = {name: torch.stack([getattr(found[layer], name) for layer in range(layers)], dim=1).float().cpu().numpy() for name in names}
    for parts in zip(*stacked.values(), strict=True):
        yield dict(zip(stacked, parts, strict=True))


def _batches(samples: list[Sample], batch_size: int | None, estimate: Estimate) -> Iterator[list[Sample]]:
    for (_, length), group in group_by_shape(samples).items():
        size = batch_size or estimate.samples_in_flight(length)
        for start in range(0, len(group), size):
            yield group[start : start + size]


def _read_part(path: Path) -> dict[str, np.ndarray]:
    return read_tensors(path, PART_SCHEMA)[0]


def _merge(samples: Iterable[Sample], paths: dict[str, Path]) -> dict[str, dict[ProfileKey, np.ndarray]]:
    merged: dict[str, dict[ProfileKey, np.ndarray]] = {name: {} for name in ("blocks", *BY_SAMPLE)}
    for key, group in group_by_shape(samples).items():
        parts = [_read_part(paths[sample.identity]) for sample in group]
        merged["blocks"][key] = np.asarray(sum(part["blocks"] / np.float32(len(group)) for part in parts))
        for name in (name for name in BY_SAMPLE if name in parts[0]):
            merged[name][key] = np.stack([part[name] for part in parts])
    return merged
