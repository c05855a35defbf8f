"""Candidate plans, with what the search predicts of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moa_lab.plan import Plan
from moa_lab.provenance import Provenance
from moa_lab.storage import parse, read_json, to_json, write_json

FRONT_SCHEMA = "moa-lab/front/1"


@dataclass(frozen=True)
class FrontPoint:
    """A plan with what the search says of it: predicted loss per objective name, density per length ("2048": 0.5),
    the solver that found it, and its proven optimality gap (None where the solver proves nothing)."""

    plan: Plan
    predicted: dict[str, float]
    density: dict[str, float]
    origin: str
    gap: float | None = None


@dataclass(frozen=True)
class Front:
    """Plans none of which is beaten in every front objective by another, and the settings of the search that found them.

    `objectives` are the names that span the front (keys of every point's `predicted`, or "density").
    """

    points: tuple[FrontPoint, ...]
    objectives: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    provenance: Provenance = field(default_factory=Provenance)

    def __len__(self) -> int:
        return len(self.points)

    def __iter__(self) -> Iterator[FrontPoint]:
        return iter(self.points)

    def save(self, path: str | Path) -> Path:
        """Write one JSON file; plans are stored as config cards."""
        points = [{**_without_plan(point), "plan": point.plan.card()} for point in self.points]
        data = {"schema": FRONT_SCHEMA, "objectives": list(self.objectives), "points": points, "settings": self.settings}
        return write_json(path, {**data, "provenance": to_json(self.provenance)})

    @classmethod
    def load(cls, path: str | Path) -> Front:
        """Read a front; raises RecordError for a broken or foreign file."""
        data = read_json(path, FRONT_SCHEMA)
        head = parse(_FrontHead, {name: value for name, value in data.items() if name != "schema"}, path)
        points = tuple(FrontPoint(**{**vars(point), "plan": Plan.from_card(point.plan, path)}) for point in head.points)
        return cls(points, head.objectives, head.settings, head.provenance)


@dataclass(frozen=True)
class _PointHead:
    """A point of a front whose plan is still a card."""

    plan: dict[str, Any]
    predicted: dict[str, float]
    density: dict[str, float]
    origin: str
    gap: float | None = None


@dataclass(frozen=True)
class _FrontHead:
    points: tuple[_PointHead, ...]
    objectives: tuple[str, ...]
    settings: dict[str, Any]
    provenance: Provenance


def _without_plan(point: FrontPoint) -> dict[str, Any]:
    return {"predicted": point.predicted, "density": point.density, "origin": point.origin, "gap": point.gap}
