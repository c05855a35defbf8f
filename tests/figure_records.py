"""Made-up but lifelike records for the tests of figures and report: most heads look nearby, a few look far."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from moa_lab.evaluate.intervals import Interval
from moa_lab.geometry import ModelGeometry
from moa_lab.plan import DENSE, Plan, SpanRule, dense_plan, uniform_plan
from moa_lab.provenance import Provenance
from moa_lab.records import BLOCK_TOKENS, Front, FrontPoint, InfluenceProfile, Measurement, Measurements

SMOL = ModelGeometry(layers=30, query_heads=9, kv_heads=3, head_dim=64, max_length=8192)
LENGTHS = (1024, 2048, 4096)
DEPTHS = ("0.1", "0.3", "0.5", "0.7", "0.9")
ORIGIN = Provenance(
    model="smollm2", weights="0123456789abcdef", tokenizer="fedcba9876543210", calibration="00ff00ff00ff00ff", seed=0, device="x86_64",
    versions={"python": "3.12.1", "torch": "2.13.0"}, command="moa-lab run --density 0.5", created="2026-01-02T03:04:05+00:00",
)  # fmt: skip


def make_profile(
    geometry: ModelGeometry = SMOL, lengths: Iterable[int] = LENGTHS, tasks: Iterable[str] = ("questions", "summaries"), samples: int = 6
) -> InfluenceProfile:
    """A profile in which about one query head in ten carries most of the long-range influence."""
    random = np.random.default_rng(0)
    heads = (geometry.layers, geometry.query_heads)
    far = np.where(random.random(heads) < 0.1, random.lognormal(-1, 0.8, heads), random.lognormal(-6, 1, heads))
    blocks, distances = {}, {}
    for task in tasks:
        for length in lengths:
            size = max(length // BLOCK_TOKENS, 1)
            back = np.arange(size)
            local = 2.0 * np.exp(-1.2 * back) + 0.01 / (1 + back) ** 1.3
            bump = np.exp(-(((back - 0.7 * size) / (0.15 * size + 1)) ** 2)) / size
            curve = local * 0.3 + far[..., None] * (bump + 0.1 / size)
            distances[task, length] = (curve * random.lognormal(0, 0.35, (samples, *heads, size))).astype(np.float32)
            lag = back[:, None] - back[None, :]
            grid = np.where(lag >= 0, curve[..., np.maximum(lag, 0)], 0.0) / size
            grid[..., 0] = np.maximum(grid[..., 0], 0.02) * (back >= 0)
            blocks[task, length] = (grid * random.lognormal(0, 0.6, grid.shape)).astype(np.float32)
    return InfluenceProfile(geometry, 64, blocks, distances, ORIGIN)


def make_plan(geometry: ModelGeometry = SMOL, name: str = "moa", whole: float = 0.4, seed: int = 0) -> Plan:
    """A plan with whole heads, partial spans and floored heads."""
    random = np.random.default_rng(seed)
    kinds = (DENSE, SpanRule(256.0, 0.25), SpanRule(192.0, 0.0), SpanRule(-512.0, 0.5))
    share = (whole, 0.2, 0.35 * (1 - whole) + 0.05, 0)
    weights = np.array([*share[:3], max(1 - sum(share[:3]), 0.01)])
    picks = random.choice(len(kinds), size=(geometry.layers, geometry.kv_heads), p=weights / weights.sum())
    rules = tuple(tuple(kinds[index] for index in row) for row in picks)
    return Plan(geometry, rules, name=name, lengths=LENGTHS, search={"density": 0.5, "solver": "milp"}, provenance=ORIGIN)


def make_front(geometry: ModelGeometry = SMOL, count: int = 14) -> Front:
    """A front over two predicted losses and the density."""
    random = np.random.default_rng(1)
    points = []
    for index in range(count):
        plan = make_plan(geometry, f"{('milp', 'evolve', 'budget')[index % 3]}-{index:02d}", whole=0.15 + 0.5 * index / count, seed=index)
        density = {str(length): plan.density(length) for length in LENGTHS}
        loss = 0.3 * (1 - density["4096"]) ** 2
        predicted = {
            "questions@2048/all_or_nothing": float(loss * random.uniform(0.9, 1.3) + 0.02 * index / count),
            "summaries@2048/sum": float(0.1 * random.uniform(0.9, 1.2) - 0.004 * index),
        }
        points.append(FrontPoint(plan, predicted, density, ("milp", "evolve", "budget")[index % 3], 0.001 if index % 3 == 0 else None))
    return Front(tuple(points), tuple(points[0].predicted), {"intervals": 5, "time_limit_s": 30}, ORIGIN)


def make_baselines(geometry: ModelGeometry = SMOL) -> tuple[Plan, ...]:
    """The dense and the uniform plan at half the cache."""
    return dense_plan(geometry), uniform_plan(geometry, 0.5)


def make_measurements(
    scores: dict[str, float] | None = None, lengths: Iterable[int] = LENGTHS, n: int = 64, front: Front | None = None
) -> Measurements:
    """Retrieval (with depths) and cross-entropy per plan and length; of a front's plans only retrieval at 2048."""
    scores = {"dense": 0.97, "uniform": 0.47, "moa": 0.94} if scores is None else scores
    rows = []
    for plan, share in scores.items():
        for length in lengths:
            rows.append(_share_row(plan, length, share - 0.02 * (length > 2048), n))
            rows.append(_loss_row(plan, length, 0.95 - 0.3 * share - 0.03 * math.log2(length / 1024), n))
    for index, point in enumerate(front or ()):
        rows.append(_share_row(point.plan.name, 2048, max(0.95 - 0.035 * (index * 5 % 14), 0), n))
    return Measurements(tuple(rows), {"needles": n, "depths": list(DEPTHS)}, ORIGIN)


LOST = {
    "uniform": ("uniform", 2.0, 0.06, 0.6), "layers": ("layers", 0.6, 0.07, 0.5), "ranked-128": ("ranked", 0.13, 0.12, 0.2),
    "far-5": ("far", 0.7, 0.08, 0.3), "milp-00": ("milp", 0.2, 0.05, 0.25), "learned": ("learned", 0.003, 0.057, 0.01),
    "refined-1": ("refined", 0.07, 0.034, 0.125),
}  # fmt: skip
"""By candidate: origin; needles and words lost, in nats; share of facts lost. None beats the last two in both."""


def make_validation(lost: dict[str, tuple[str, float, float, float]] | None = None, chosen: str = "refined-1") -> Measurements:
    """A validation of a candidate of every kind; a score is the mean of the shares of uniform's losses."""
    lost = LOST if lost is None else lost
    settings = {
        "prefer": "both", "chosen": chosen,
        "scores": {name: needles / 4.0 + words / 0.12 for name, (_, needles, words, _) in lost.items()},
        "losses": {name: {"nats": {"needles": one[1], "words": one[2]}, "facts": one[3]} for name, one in lost.items()},
        "origins": {name: origin for name, (origin, *_) in lost.items()},
    }  # fmt: skip
    return Measurements((), settings, ORIGIN)


def make_chosen(name: str = "moa") -> Plan:
    """The plan that `make_validation` chose, with what its card says of that."""
    told = {"candidate": "refined-1", "origin": "refined", "prefer": "both", "score": 0.07 / 4.0 + 0.034 / 0.12}
    simple = {"candidate": "layers", "origin": "layers", "score": 0.6 / 4.0 + 0.07 / 0.12}
    plan = make_plan(name=name)
    return plan.renamed(name, search={**plan.search, **told, "best_simple": simple})


def _share_row(plan: str, length: int, share: float, n: int) -> Measurement:
    error = 1.96 * math.sqrt(max(share * (1 - share), 0.01) / n)
    shift = 0.0 if plan != "uniform" else 0.4
    by_depth = {d: {"value": min(max(share + shift * (float(d) - 0.5) * 2.2, 0.0), 1.0), "n": n // len(DEPTHS) + 1} for d in DEPTHS}
    low, high = max(share - error, 0), min(share + error, 1)
    return Measurement(plan, "retrieval", "needle", length, share, n, low, high, 1.0 if plan == "dense" else 0.5, {"by_depth": by_depth})


def _loss_row(plan: str, length: int, value: float, n: int) -> Measurement:
    return Measurement(plan, "cross_entropy", "summaries", length, value, n, value - 0.012, value + 0.012, 1.0 if plan == "dense" else 0.5)


def score_row(
    plan: str, value: float, *, metric: str = "retrieval", task: str = "needles", density: float = 0.25, n: int = 64, **more: Any
) -> Measurement:
    length = more.pop("length", 4096)
    return Measurement(plan, metric, task, length, value, n, 0.9 * value, 1.2 * value, density, more)


def rate_row(plan: str, value: float, density: float, length: int = 4096) -> Measurement:
    return score_row(plan, value, metric="tokens_per_s", task="decode", density=density, length=length, batch=512)


SPEEDS = [
    score_row("dense", 0.8, density=1.0), score_row("moa-25", 0.7), score_row("moa-50", 0.75, density=0.5), score_row("uniform-25", 0.1),
    score_row("moa-15", 0.2, density=0.15),
    rate_row("moa-50", 2000, 0.5), rate_row("moa-25", 4000, 0.25), rate_row("dense", 1000, 1.0), rate_row("uniform-25", 4100, 0.25),
    rate_row("transformers dense", 400, 1.0), rate_row("moa-25", 9000, 0.25, length=1024), score_row("moa-25", 0.9, length=1024),
]  # fmt: skip

DIFFERENCES = {"better": Interval(0.2, 64, 0.1, 0.3), "unclear": Interval(0.05, 64, -0.1, 0.2), "worse": Interval(-0.3, 64, -0.4, -0.2)}
