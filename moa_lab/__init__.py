"""moa_lab: how much of each head's attention can be dropped, what it costs, and how much is saved.

Importing this patches nothing, prints nothing, and loads neither torch nor transformers: names are looked up when used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "ModelGeometry": "moa_lab.geometry",
    "SpanRule": "moa_lab.plan",
    "Plan": "moa_lab.plan",
    "dense_plan": "moa_lab.plan",
    "uniform_plan": "moa_lab.plan",
    "full_or_floor_plan": "moa_lab.plan",
    "EngineLimits": "moa_lab.engines",
    "InfluenceProfile": "moa_lab.records",
    "LossTable": "moa_lab.records",
    "Front": "moa_lab.records",
    "Measurements": "moa_lab.records",
    "load_model": "moa_lab.models",
    "calibrate": "moa_lab.calibration",
    "SampleSet": "moa_lab.calibration",
    "profile": "moa_lab.profiling",
    "estimate_cost": "moa_lab.profiling",
    "loss_table": "moa_lab.search",
    "search": "moa_lab.search",
    "learn_spans": "moa_lab.learning",
    "refine": "moa_lab.refinement",
    "apply_plan": "moa_lab.runtime",
    "generate": "moa_lab.runtime",
    "Sampling": "moa_lab.runtime",
    "ring_cache": "moa_lab.runtime",
    "evaluate": "moa_lab.evaluate",
    "validate": "moa_lab.evaluate",
    "parity": "moa_lab.evaluate.parity",
    "trace": "moa_lab.trace",
    "figures": "moa_lab.figures",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'moa_lab' has no attribute {name!r}")
    module = import_module(home)
    # A home that is a package of the same name is what is asked for, unless it offers a function of that name.
    return getattr(module, name, module)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
