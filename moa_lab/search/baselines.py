"""Baseline plans: the paper's objective, and heads ranked by the influence of single values."""

from __future__ import annotations

from collections.abc import Mapping

from moa_lab.plan import MIN_SPAN, Plan
from moa_lab.records import InfluenceProfile
from moa_lab.search.budget import solve_budget
from moa_lab.search.goals import mean_goal, paper_goals
from moa_lab.search.losses import loss_table
from moa_lab.search.problem import Density, InfeasibleError, judged_lengths
from moa_lab.search.ranked import ranked_plan

BASELINES = ("paper", "ranked")
RANKED_FLOOR = 192


def baseline_plan(name: str, profile: InfluenceProfile, density: Density, *, min_span: int = MIN_SPAN) -> Plan:
    """A baseline at `density`, from the influence of single values (the paper's estimator).

    "paper": least sum of lost influence over all tasks and lengths, solved to a proven gap (arXiv 2406.14909). "ranked": the heads
    with the most influence on questions beyond the floor are whole, the others at the floor: 192 tokens, or min_span where that is
    larger or 192 exceeds the density. Raises ValueError for another name.
    """
    used = judged_lengths(density, profile.lengths) if isinstance(density, Mapping) else None
    table = loss_table(profile, min_span=min_span, estimator="element", use_lengths=used)
    if name == "paper":
        answer = solve_budget(table, density, goal=mean_goal(paper_goals(table)))
        return table.plan(answer.choice, name, search={"origin": name, "gap": answer.gap})
    if name == "ranked":
        try:
            return ranked_plan(table, density, floor_tokens=max(RANKED_FLOOR, min_span), name=name)
        except InfeasibleError:
            return ranked_plan(table, density, floor_tokens=min_span, name=name)
    raise ValueError(f"baseline must be one of {', '.join(BASELINES)}, got {name!r}")
