"""One self-contained HTML page from records: it opens from a file, needs no network, and shows only numbers that it read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from moa_lab.plan import Plan, PlanOrPath, as_plan, check_names, dense_plan
from moa_lab.records import Front, FrontPoint, InfluenceProfile, Measurements
from moa_lab.report import sections
from moa_lab.report.page import page
from moa_lab.storage import write_text

__all__ = ["build_report", "save_report"]


def build_report(
    plan: PlanOrPath,
    profile: InfluenceProfile | None = None,
    front: Front | None = None,
    measurements: Measurements | None = None,
    *,
    title: str = "Mixture of attention spans",
    baselines: Iterable[PlanOrPath] = (),
    reference: Iterable[FrontPoint] = (),
    density: float | None = None,
    validation: Measurements | None = None,
) -> str:
    """Return the page about `plan` as HTML.

    Scores are found by plan name: `plan.name` and the names of `baselines` (the dense plan is added when it is missing and was
    measured). `reference` holds predicted goals of plans outside the front, drawn beside it. density: the one all are compared at;
    plans that do not keep it are named below the scores. validation: what the plan was chosen by; it is left out where that chose
    another plan. What is None or empty is left out of the page, whose first lines say where the plan is decidedly worse than a simple
    one of `baselines`. Raises ValueError when `profile` or a baseline has another geometry than the plan, or
    where different plans have one name.
    """
    plan, rivals = as_plan(plan), tuple(as_plan(other) for other in baselines)
    for other in (profile, *rivals):
        if other is not None:
            plan.check_model(other.geometry)
    measured = measurements or Measurements(())
    shown = _rivals(plan, rivals, measured)
    check_names([plan, *rivals, *shown])
    facts = sections.Facts(
        plan, shown, profile, front or Front((), ()), measured, tuple(reference), density, validation
    )  # fmt: skip
    return page(title, sections.opening(facts), sections.all_sections(facts), facts.warnings())


def save_report(
    path: str | Path,
    plan: PlanOrPath,
    profile: InfluenceProfile | None = None,
    front: Front | None = None,
    measurements: Measurements | None = None,
    *,
    title: str = "Mixture of attention spans",
    baselines: Iterable[PlanOrPath] = (),
    reference: Iterable[FrontPoint] = (),
    density: float | None = None,
    validation: Measurements | None = None,
) -> Path:
    """Write `build_report(...)` to `path`, atomically, and return the path."""
    made = build_report(
        plan, profile, front, measurements,
        title=title, baselines=baselines, reference=reference, density=density, validation=validation,
    )  # fmt: skip
    return write_text(path, made)


def _rivals(plan: Plan, baselines: tuple[Plan, ...], measurements: Measurements) -> tuple[Plan, ...]:
    others = [other for other in baselines if other.name != plan.name]
    has_dense = any(other.is_dense for other in (plan, *others))
    if not has_dense and measurements.select(plan="dense"):
        others.insert(0, dense_plan(plan.geometry))
    # Dense first: the others are compared with it.
    return tuple(sorted(others, key=lambda other: not other.is_dense))
