"""Tables of studies as notebooks show them: scores, gains and goals with their intervals, as text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from moa_lab.evaluate.compare import difference, row_of
from moa_lab.evaluate.intervals import Interval
from moa_lab.records import Measurement
from moa_lab.studies.gains import NATS_SAVED, Gain, gain, marked
from moa_lab.studies.record import StudyGoal
from moa_lab.text import interval_text

Names = Mapping[str, str] | Sequence[str]
"""Plans, or what they are called in a table with the plan of each."""


def scored(found: Interval | Measurement | StudyGoal, form: str = ".2f", *, interval: bool = True) -> str:
    """A score and its 95% interval: `0.84 [0.74, 0.91]`."""
    return f"{found.value:{form}}" + (f" {interval_text(found.low, found.high, form)}" if interval else "")


def score_table(
    rows: Sequence[Measurement], plans: Names, task: str, lengths: Iterable[int], form: str = ".0%", *, interval: bool = False
) -> pd.DataFrame:
    """Scores of one task: a row a plan, a column a length. Raises KeyError for what was not measured."""
    return pd.DataFrame(
        {
            f"{n:,}": {name: scored(row_of(rows, plan, task, n), form, interval=interval) for name, plan in _named(plans).items()}
            for n in lengths
        }
    )


def by_density(
    rows: Sequence[Measurement], kinds: Sequence[str], densities: Sequence[str], task: str, lengths: Iterable[int]
) -> pd.DataFrame:
    """Scores of KIND-25 and so on: a row a density, for every length a column a kind. Raises KeyError for what was not measured."""
    found = {
        (f"{n:,}", kind): {f"{p}%": scored(row_of(rows, f"{kind}-{p}", task, n), ".0%", interval=False) for p in densities}
        for n in lengths
        for kind in kinds
    }
    return pd.DataFrame(found)


def gain_table(
    rows: Sequence[Measurement], pairs: Mapping[Any, tuple[str, str]], tasks: Iterable[str], lengths: Iterable[int]
) -> pd.DataFrame:
    """Gains of one plan over another, over all lengths together: a row a pair, a column a task; above 0 is better, a star: decided.

    pairs: (plan, against) by what the pair is called. Raises KeyError for what was not measured.
    """
    over = tuple(lengths)
    found = {task: {name: gain(rows, *pair, task, over) for name, pair in pairs.items()} for task in tasks}
    return pd.DataFrame({_gained(task, of.values()): {name: marked(one.found) for name, one in of.items()} for task, of in found.items()})


def _gained(task: str, found: Iterable[Gain]) -> str:
    return f"{task}, nats saved" if any(one.metric == NATS_SAVED for one in found) else f"{task} gained"


def change_table(rows: Iterable[Measurement], tasks: Iterable[str]) -> pd.DataFrame:
    """Differences that a record keeps: a row a plan, a column a task; a star: decided."""
    found = {(row.plan, row.task): marked(row) for row in rows}
    plans = dict.fromkeys(plan for plan, _ in found)
    return pd.DataFrame({task: {plan: found[plan, task] for plan in plans if (plan, task) in found} for task in tasks})


def closer_table(rows: Sequence[Measurement], densities: Sequence[str], task: str, lengths: Sequence[int]) -> pd.DataFrame:
    """The lengths at which chosen spans, and at which uniform ones, are shown to be closer to the dense model: a row a density, for the
    divergence of the next token (kl, smaller is closer) and for how often the likeliest is the same (token_match) a column each.
    """
    return pd.DataFrame({f"{p}%": _closer(rows, p, task, lengths) for p in densities}).T


def _closer(rows: Sequence[Measurement], density: str, task: str, lengths: Sequence[int]) -> dict[str, str]:
    told = {}
    for metric, sign in (("kl", -1), ("token_match", 1)):
        found = {n: difference(*(row_of(rows, f"{kind}-{density}", task, n, metric) for kind in ("moa", "uniform"))) for n in lengths}
        for name, side in (("chosen", sign), ("uniform", -sign)):
            # The end of the interval that is nearer to 0 must be on the side of this one.
            decided = [f"{n:,}" for n, one in found.items() if min(side * one.low, side * one.high) > 0]
            told[f"{metric}: {name}"] = ", ".join(decided) or "-"
    return told


def goal_table(goals: Iterable[StudyGoal]) -> pd.DataFrame:
    """Goals: what was found, with its interval where it has one, what was aimed at, and whether that is met and decided."""
    return pd.DataFrame(
        {
            goal.name: {
                "value": scored(goal, ".3f", interval=goal.low is not None),
                "aimed at": f"{'≤' if goal.at_most else '≥'} {goal.goal:g}",
                "met": goal.meets,
                "decided": goal.decided,
            }
            for goal in goals
        }
    ).T


def _named(plans: Names) -> Mapping[str, str]:
    return plans if isinstance(plans, Mapping) else {plan: plan for plan in plans}
