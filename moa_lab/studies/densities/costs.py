"""Retrieval and loss of dense, uniform and searched plans at equal KV bytes, over lengths and densities.

Plans are searched and chosen on calibration and validation texts and wordings; the test samples measured here share none of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from moa_lab.evaluate.agreement import agreement_rows
from moa_lab.evaluate.compare import excess_over_dense, ratio, row_of, worst
from moa_lab.evaluate.intervals import Interval
from moa_lab.pipeline import Run
from moa_lab.records import Measurement
from moa_lab.studies.densities.eviction import eviction_rows
from moa_lab.studies.plans import (
    DOCUMENTS,
    LINES,
    NEEDLES,
    SUMMARIES,
    candidates_of,
    chosen_plans,
    dense_and_uniform,
    equal_uniform,
    name_of,
    record_of,
)
from moa_lab.studies.record import StudyGoal, StudyRecord
from moa_lab.studies.scale import Scale

EFFECTIVE = 0.9
"""A context is effective while retrieval is at least this (arXiv 2406.14909, sec. 5)."""
PUBLISHED_RETRIEVAL = {"dense": (1.00, 0.98, 0.62), "uniform": (0.43, 0.16, 0.08), "h2o": (0.86, 0.68, 0.35), "moa": (1.00, 0.97, 0.57)}
"""LongEval's lines found by Vicuna-7B at half of the cache, at 4k, 8k and 16k tokens (arXiv 2406.14909)."""
PUBLISHED_REACH = 3.9
"""Effective context over mean span in the paper."""
LONGEST_OF_GOALS = 4096
HALF = 0.5


def retrieval(run: Run, scale: Scale) -> StudyRecord:
    """Needles and lines found under plans of every density that is feasible, at the tested lengths of `run`."""
    plans, left_out = chosen_plans(run, scale.densities)
    tasks = (NEEDLES, LINES)
    rows = [*dense_and_uniform(run, plans.values(), tasks=tasks), *run.measure(list(plans.values()), tasks=tasks)]
    rows += eviction_rows(run, plans, tasks=tasks)
    reach = {name: effective_context(name, rows) for name in dict.fromkeys(row.plan for row in rows) if name != "dense"}
    answer = retrieval_answer(reach) + _peers(rows)
    return record_of(
        run, "retrieval", "How much can be dropped before what lies far back is not found any more?", answer, rows,
        retrieval_goals(rows, reach), densities=list(scale.densities), left_out=left_out, chosen=candidates_of(plans.values()),
    )  # fmt: skip


def retrieval_goals(rows: Sequence[Measurement], reach: Mapping[str, tuple[int, float]]) -> list[StudyGoal]:
    """The goals that `rows` have measurements for. reach: see `effective_context`."""
    half = [row for row in rows if (row.plan, row.task) == (name_of("moa", HALF), NEEDLES) and row.length <= LONGEST_OF_GOALS]
    found = [ratio(row, row_of(rows, "dense", NEEDLES, row.length)) for row in half]
    goals = []
    if found:
        goals.append(StudyGoal.of("50%: needles found, of those the dense model finds, worst length to 4k", worst(found), 0.95))
    searched = {name: found[1] for name, found in reach.items() if name.startswith("moa")}
    if searched:
        # Low: the whole interval is above the threshold; high: some of it is.
        low, high = (max(effective_context(name, rows, end)[1] for name in searched) for end in ("low", "high"))
        count = min(row.n for row in rows if row.task == NEEDLES and row.plan in searched)
        named = "effective context over mean span, best density"
        goals.append(StudyGoal(named, max(searched.values()), PUBLISHED_REACH, low=low, high=high, n=count))
    return goals


def retrieval_answer(reach: Mapping[str, tuple[int, float]]) -> str:
    """A sentence. reach: see `effective_context`."""
    searched = {name: found for name, found in reach.items() if name.startswith("moa")}
    if not searched:
        return "No density was feasible."
    best = max(searched, key=lambda name: searched[name][1])
    length, times = searched[best]
    if not length:
        return f"No plan finds {EFFECTIVE:.0%} of the needles at the shortest length."
    uniform = max((ratio for name, (_, ratio) in reach.items() if name.startswith("uniform")), default=0.0)
    others = f"reach {uniform:.1f} times theirs" if uniform else "do not at any length or density"
    return (
        f"{best} reaches furthest for what it keeps: {EFFECTIVE:.0%} of the needles are found up to {length:,} tokens, "
        f"{times:.1f} times its mean span there (the paper: {PUBLISHED_REACH}); uniform spans {others}."
    )


def _peers(rows: Sequence[Measurement]) -> str:
    """A sentence on SnapKV and H2O, which see the question before they evict; empty where no searched plan was measured."""
    length = max((row.length for row in rows), default=0)
    told = []
    for plan in dict.fromkeys(row.plan for row in rows if row.plan.startswith("moa")):
        _, _, density = plan.rpartition("-")
        names = (plan, f"snapkv-{density}", f"h2o-{density}", f"uniform-{density}")
        scores = [f"{row_of(rows, name, NEEDLES, length).value:.2f} ({name.partition('-')[0]})" for name in names]
        told.append(f"{density}% kept: {', '.join(scores)}")
    if not told:
        return ""
    return (
        f" At {length:,} tokens, against eviction that reads the question and the whole prompt densely before it drops: {'; '.join(told)}."
    )


def quality(run: Run, scale: Scale) -> StudyRecord:
    """Cross-entropy (nats per token) of held-out documents and of the dense model's own answers, under the same plans."""
    plans, left_out = chosen_plans(run, scale.densities)
    tasks = (DOCUMENTS, SUMMARIES)
    rows = [*dense_and_uniform(run, plans.values(), tasks=tasks), *run.measure(list(plans.values()), tasks=tasks)]

    def excess(plan: str, task: str, lengths: Iterable[int]) -> Interval:
        """Perplexity above the dense model's, as a fraction, at the worst length."""
        return worst((excess_over_dense(rows, plan, task, n) for n in lengths), at_most=True)

    for length in run.test_lengths:
        own = [sample for found in run.suites.test(length, (SUMMARIES,)) for sample in found]
        compared = [*plans.values(), *(equal_uniform(plan, length, f"uniform{plan.name.removeprefix('moa')}") for plan in plans.values())]
        rows += agreement_rows(run.model, compared, own)
    measured = [task for task in tasks if any(row.task == task for row in rows)]
    lengths = [n for n in run.test_lengths if n <= LONGEST_OF_GOALS]
    goals = []
    if HALF in plans and lengths:
        named = "50%: perplexity of {} above the dense model's, worst length to 4k"
        goals = [StudyGoal.of(named.format(task), excess(name_of("moa", HALF), task, lengths), 0.02, at_most=True) for task in measured]
    parts = []
    for density in plans:
        costs = [
            f"{100 * excess(name_of(kind, density), measured[0], run.test_lengths).value:+.1f}% ({kind})" for kind in ("moa", "uniform")
        ]
        parts.append(f"{density:.1%} kept: {' and '.join(costs)}")
    answer = (
        f"Perplexity of {measured[0]} at the worst length, against the dense model: {'; '.join(parts)}."
        if parts
        else "No density was feasible."
    )
    answer += _agreement(rows, max(run.test_lengths))
    return record_of(
        run, "quality", "What does a density cost where nothing particular is looked for?", answer, rows, goals,
        densities=list(scale.densities), left_out=left_out, chosen=candidates_of(plans.values()),
    )  # fmt: skip


def _agreement(rows: Sequence[Measurement], length: int) -> str:
    """A sentence on how often a plan's next token is the dense model's."""
    told = [f"{row.plan} {row.value:.1%}" for row in rows if row.metric == "token_match" and row.length == length]
    return f" Of the dense model's own answers at {length:,} tokens the same next token is likeliest for {', '.join(told)}." if told else ""


def effective_context(plan: str, rows: Sequence[Measurement], end: Literal["low", "value", "high"] = "value") -> tuple[int, float]:
    """The longest length up to which retrieval is effective at every tested one, and that length over the mean span; zeros for none.

    end: what is compared with the threshold, the score or an end of its interval.
    """
    longest = (0, 0.0)
    for row in sorted((row for row in rows if row.plan == plan and row.task == NEEDLES), key=lambda row: row.length):
        if getattr(row, end) < EFFECTIVE:
            break
        longest = (row.length, 1 / row.density)
    return longest
