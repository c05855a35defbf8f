"""What a profile measured: the influence of every head, by distance."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from moa_lab.geometry import ModelGeometry, check_whole
from moa_lab.plan import UNTOUCHED, WIDTHS
from moa_lab.provenance import Provenance
from moa_lab.storage import STAGE_CURE, RecordError, parse, read_tensors, to_json, write_tensors

PROFILE_SCHEMA = "moa-lab/profile/1"

BLOCK_TOKENS = 64
ROUNDED_BITS = tuple(bits for bits in WIDTHS if bits < UNTOUCHED)
"""The bits whose rounding a profile may hold the loss of."""
ProfileKey = tuple[str, int]
"""(calibration task, length in tokens)."""


@dataclass(frozen=True)
class InfluenceProfile:
    """Influence of every (layer, query head), per calibration task and length.

    `blocks[task, N]`: float32 (layers, query_heads, N/64, N/64), |influence| summed over each 64 x 64 block of
    (query, key), averaged over samples, in nats of the sample's loss (mean over answer tokens).
    `distances[task, N]`: float32 (samples, layers, query_heads, N/64), one histogram per sample: bin b sums |influence|
    of the keys beyond the sink whose distance i - j lies in [64 b, 64 b + 63].
    `span_effects[task, N]`: float32 (samples, layers, query_heads, N/64), signed: entry b is the loss change when the head
    loses all keys beyond the sink at distances >= 64 b at once. Empty for a profile of single values only.
    `rounding[task, N]`: float32 (samples, layers, kv_heads, widths, 2), the size of the loss change to expect when the head's K, or its V,
    is stored in each of `ROUNDED_BITS` at all positions. Empty where it was not asked for.
    """

    geometry: ModelGeometry
    sink_tokens: int
    blocks: dict[ProfileKey, np.ndarray]
    distances: dict[ProfileKey, np.ndarray]
    provenance: Provenance = field(default_factory=Provenance)
    span_effects: dict[ProfileKey, np.ndarray] = field(default_factory=dict)
    rounding: dict[ProfileKey, np.ndarray] = field(default_factory=dict)

    @property
    def keys(self) -> tuple[ProfileKey, ...]:
        """The profiled (task, length) pairs, sorted."""
        return tuple(sorted(self.distances))

    @property
    def lengths(self) -> tuple[int, ...]:
        """The profiled lengths in tokens, ascending."""
        return tuple(sorted({length for _, length in self.distances}))

    @property
    def tasks(self) -> tuple[str, ...]:
        """The calibration tasks, sorted."""
        return tuple(sorted({task for task, _ in self.distances}))

    def has_blocks(self, task: str, length: int) -> bool:
        """Whether it keeps where heads look there, block by block: a part of a profile, or a drawn one, may not."""
        return bool(self.blocks.get((task, length), np.empty(0)).size)

    def distance(self, task: str, length: int) -> np.ndarray:
        """Mean histogram over samples: float64 (layers, query_heads, length/64)."""
        return self.distances[task, length].astype(np.float64).mean(axis=0)

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file."""
        tensors = {}
        for task, length in self.keys:
            tensors[f"blocks/{task}/{length}"] = self.blocks[task, length]
            tensors[f"distances/{task}/{length}"] = self.distances[task, length]
        for kind, found in (("span_effects", self.span_effects), ("rounding", self.rounding)):
            for (task, length), array in found.items():
                tensors[f"{kind}/{task}/{length}"] = array
        description = {
            "schema": PROFILE_SCHEMA,
            "geometry": to_json(self.geometry),
            "sink_tokens": self.sink_tokens,
            "provenance": to_json(self.provenance),
        }
        return write_tensors(path, tensors, description)

    @classmethod
    def load(cls, path: str | Path) -> InfluenceProfile:
        """Read a profile; raises RecordError for a broken or foreign file."""
        tensors, data = read_tensors(path, PROFILE_SCHEMA)
        grids: dict[str, dict[ProfileKey, np.ndarray]] = {"blocks": {}, "distances": {}, "span_effects": {}, "rounding": {}}
        for name, array in tensors.items():
            # A task may have a "/" in its name: what stands first and last is ours.
            kind, _, key = name.partition("/")
            task, _, length = key.rpartition("/")
            if kind not in grids or not length.isdigit():
                raise RecordError(f"{path}: tensor {name!r} does not belong in a profile; run its stage again")
            grids[kind][task, int(length)] = array
        if set(grids["blocks"]) != set(grids["distances"]) or (set(grids["span_effects"]) | set(grids["rounding"])) - set(
            grids["distances"]
        ):
            raise RecordError(f"{path}: blocks, distances and span effects cover different (task, length) pairs; run its stage again")
        head = parse(_ProfileHead, {name: value for name, value in data.items() if name != "schema"}, path)
        for kind, arrays in grids.items():
            for pair, array in arrays.items():
                _check_grid(path, head.geometry, kind, pair, array)
        return cls(head.geometry, head.sink_tokens, provenance=head.provenance, **grids)


@dataclass(frozen=True)
class _ProfileHead:
    geometry: ModelGeometry
    sink_tokens: int
    provenance: Provenance

    def __post_init__(self) -> None:
        check_whole("sink_tokens", self.sink_tokens, 0)


def _check_grid(path: str | Path, geometry: ModelGeometry, kind: str, key: ProfileKey, array: np.ndarray) -> None:
    """Refuse a tensor of a profile that is not of the profile's model or length, or holds what is no number."""
    heads, bins = (geometry.layers, geometry.query_heads), -(-key[1] // BLOCK_TOKENS)
    expected = (*heads, bins, bins) if kind == "blocks" else (*array.shape[:1], *heads, bins)
    if kind == "rounding":
        expected = (*array.shape[:1], geometry.layers, geometry.kv_heads, len(ROUNDED_BITS), 2)
    if array.shape != expected or not array.size:
        raise RecordError(f"{path}: {kind} of {key[0]}@{key[1]} must be {expected}, got {array.shape}; {STAGE_CURE}")
    if array.dtype.kind != "f" or not np.isfinite(array).all():
        raise RecordError(f"{path}: {kind} of {key[0]}@{key[1]} must be finite numbers, got {array.dtype}; {STAGE_CURE}")
