"""What the script of a desk page reads: every plan's spans, bytes and scores, and the heads' influence, as compact JSON."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np

from moa_lab.evaluate.options import TEXTS
from moa_lab.figures import long_range_influence
from moa_lab.figures.measurements import metric_label
from moa_lab.figures.theme import byte_size
from moa_lab.records import ALLOCATED, InfluenceProfile, Measurement
from moa_lab.report.desk.stops import MEAN, Stop
from moa_lab.text import interval_text

BEYOND_TOKENS = 128
"""Distance from which on influence counts as long-range."""
MAX_CODES = 2**16
"""Different rules of all plans together, at most: a head's rule is two bytes."""


def stops_data(stops: Sequence[Stop], lengths: Sequence[int]) -> dict[str, Any]:
    """Plans as the script reads them.

    lengths: in tokens. `spans[code]` holds one span per length; a stop's `codes` is base64 of little-endian uint16 (layers, kv_heads),
    row by row. Raises ValueError for plans of more different spans than two bytes can tell apart.
    """
    heads = np.stack([np.stack([stop.plan.spans(n) for n in lengths], axis=-1) for stop in stops])
    distinct, codes = np.unique(heads.reshape(-1, len(lengths)), axis=0, return_inverse=True)
    if len(distinct) > MAX_CODES:
        raise ValueError(f"the plans have {len(distinct):,} different spans, at most {MAX_CODES:,} fit the page: take a longer step")
    rows = codes.reshape(len(stops), -1).astype("<u2")
    goals = goal_names(stops)
    return {
        "lengths": list(lengths),
        "spans": distinct.tolist(),
        "goals": list(goals),
        "stops": [_stop(stop, encoded(row), lengths, goals) for stop, row in zip(stops, rows, strict=True)],
    }


def goal_names(stops: Sequence[Stop]) -> tuple[str, ...]:
    """Goals that all plans with predictions have a value of: their mean first, whole tasks, then those of single lengths."""
    told = [set(stop.predicted) for stop in stops if stop.predicted]
    return tuple(sorted(set.intersection(*told) if told else (), key=lambda name: (name != MEAN, "@" in name, name)))


def influence_data(profile: InfluenceProfile | None) -> list[dict[str, Any]]:
    """Long-range influence of every KV head by task and length, summed over its query heads: base64 of float32 (layers, kv_heads), nats."""
    if profile is None:
        return []
    return [
        {
            "task": task, "length": length,
            "values": encoded(long_range_influence(profile, task, length, min(BEYOND_TOKENS, length - 1), "sum").astype("<f4")),
        }
        for task, length in profile.keys
    ]  # fmt: skip


def encoded(values: np.ndarray) -> str:
    """The bytes of an array, row by row, in base64."""
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()


def _stop(stop: Stop, codes: str, lengths: Sequence[int], goals: Sequence[str]) -> dict[str, Any]:
    plan = stop.plan
    return {
        "name": plan.name,
        "kind": stop.kind,
        "identity": plan.identity(),
        "codes": codes,
        "density": [plan.density(n) for n in lengths],
        "kv_bytes": [byte_size(plan.kv_bytes(n)) for n in lengths],
        "predicted": {name: stop.predicted[name] for name in goals if name in stop.predicted},
        "measured": [_measured(row) for row in stop.rows],
    }


def _measured(row: Measurement) -> dict[str, Any]:
    """A score in words, and its value for figures."""
    if row.metric == ALLOCATED:
        return {"what": f"KV allocated, {row.length:,} tokens", "said": byte_size(row.value)}
    unit = metric_label(row.metric)[1]
    told = f"{row.value:.3f}" if unit == "%" else f"{row.value:.3f} {unit}"
    what = f"{TEXTS.get(row.task, row.task)}, {row.length:,} tokens"
    return {"what": what, "said": f"{told} {interval_text(row.low, row.high)}, n = {row.n:,}"}
