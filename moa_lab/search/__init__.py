"""One rule per (layer, KV head): loss tables, and four ways to search them (budget, milp, evolve, ranked).

`search(profile, density=0.5)` joins them into a small front of candidates; nothing here needs torch or a model.
"""

import sys
from types import ModuleType
from typing import Any

from moa_lab.search.baselines import BASELINES, baseline_plan
from moa_lab.search.budget import BudgetAnswer, BudgetSolver, solve_budget
from moa_lab.search.candidates import search
from moa_lab.search.evolve import PlanProblem, evolve
from moa_lab.search.front import epsilon_front, front_values, hypervolume, non_dominated
from moa_lab.search.goals import Goal, GoalSet, default_goals, goal_sets, mean_goal, paper_goals
from moa_lab.search.losses import loss_table
from moa_lab.search.milp import MilpAnswer, solve_milp
from moa_lab.search.problem import InfeasibleError, NoPlanError, feasible, limit_lengths, used_lengths
from moa_lab.search.ranked import WholeHeads, head_scores, ranked_plan
from moa_lab.search.space import paper_grid, rule_grid

__all__ = [
    "BASELINES",
    "BudgetAnswer",
    "BudgetSolver",
    "Goal",
    "GoalSet",
    "InfeasibleError",
    "MilpAnswer",
    "NoPlanError",
    "PlanProblem",
    "WholeHeads",
    "baseline_plan",
    "default_goals",
    "epsilon_front",
    "evolve",
    "feasible",
    "front_values",
    "goal_sets",
    "head_scores",
    "hypervolume",
    "limit_lengths",
    "loss_table",
    "mean_goal",
    "non_dominated",
    "paper_goals",
    "paper_grid",
    "ranked_plan",
    "rule_grid",
    "search",
    "solve_budget",
    "solve_milp",
    "used_lengths",
]


class _Callable(ModuleType):
    # `moa_lab.search` must be both this package and the function `search(...)`.
    def __call__(self, *args: Any, **settings: Any) -> Any:
        return search(*args, **settings)


sys.modules[__name__].__class__ = _Callable
