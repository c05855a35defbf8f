"""Plans as a caller gives them: as they are or by a file, and several of different names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from moa_lab.plan.card import Plan

PlanOrPath = Plan | str | Path
"""What functions that take a plan take: the plan, or the path of its config card."""


def as_plan(plan: PlanOrPath) -> Plan:
    """The plan itself, or the one whose config card is at that path.

    Raises RecordError for a file that is no config card, ValueError for another kind of value.
    """
    if isinstance(plan, str | Path):
        return Plan.load(plan)
    if not isinstance(plan, Plan):
        raise ValueError(f"plan must be a Plan or the path of a config card, got {type(plan).__name__}")
    return plan


def check_names(plans: Iterable[Plan]) -> None:
    """Raise ValueError where two different plans have one name, by which their scores are told apart."""
    known: dict[str, str] = {}
    for plan in plans:
        # All dense plans do the same, whatever their sink and floor.
        found = "dense" if plan.is_dense else plan.identity()
        if known.setdefault(plan.name, found) != found:
            raise ValueError(f"two different plans are named {plan.name!r}, and scores are kept by name: plan.renamed(name) gives another")


def named_apart(plans: Sequence[Plan]) -> list[Plan]:
    """The plans, those of one name with their density (at the longest length that they name) behind it: runs name their plans alike.

    Raises ValueError where that does not tell them apart.
    """
    counts = Counter(plan.name for plan in plans)

    def named(plan: Plan) -> Plan:
        return plan.renamed(f"{plan.name}-{plan.density(plan.longest):.0%}")

    found = [named(plan) if counts[plan.name] > 1 else plan for plan in plans]
    if len({plan.name for plan in found}) < len(found):
        raise ValueError(f"plans need names of their own, got {', '.join(plan.name for plan in found)}: plan.renamed(name) gives another")
    return found
