"""Sizes of the studies, beside those of their run's preset."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """Sizes of the studies.

    densities: shares of the KV cache at which plans are measured. density: the one at which variants of a method are compared; low:
    densities below what the paper tried. samples: numbers of calibration samples a length that are compared. random_plans: random
    plans of equal density to test predictors on. refine_rounds, refine_heads: of a refinement (0 rounds: none).
    search_seconds: time limit of every solver of a comparison. new_tokens: tokens of a timed generation.
    """

    densities: tuple[float, ...]
    density: float
    low: tuple[float, ...]
    samples: tuple[int, ...]
    random_plans: int
    refine_rounds: int
    refine_heads: int
    search_seconds: float
    new_tokens: int


FULL = Scale(
    densities=(0.125, 0.15, 0.2, 0.25, 0.35, 0.5, 0.75), density=0.25, low=(0.08, 0.1, 0.125, 0.15), samples=(4, 16),
    random_plans=80, refine_rounds=1, refine_heads=32, search_seconds=20.0, new_tokens=64,
)  # fmt: skip
SKETCH = Scale(
    densities=(0.5,), density=0.5, low=(0.4,), samples=(1, 2),
    random_plans=4, refine_rounds=1, refine_heads=2, search_seconds=1.0, new_tokens=12,
)  # fmt: skip

SCALES: Mapping[str, Scale] = {"sketch": SKETCH}
"""Scales by preset; any other preset has `FULL`."""


def scale_of(preset: str) -> Scale:
    """The scale that goes with a preset of `moa_lab.presets`."""
    return SCALES.get(preset, FULL)
