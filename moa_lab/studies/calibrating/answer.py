"""The answer of the calibration ablation: its comparisons, in the order of the paper's table, and its sentences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from moa_lab.records import Measurement
from moa_lab.studies.gains import NATS_SAVED, NEEDLES_GAINED, RETRIEVAL, Gain, gain, listed, overall, unequal
from moa_lab.studies.plans import DOCUMENTS, NEEDLES, SUMMARIES
from moa_lab.studies.record import StudyRecord

HUMAN, MODEL, WHOLE_TEXT = "human", "model", "whole-text"
TEXT, LONG_RANGE = "text", "long-range"
PAPER = "/paper"
"""Suffix of plans that were solved in the paper's way."""
PUBLISHED = {TEXT: (0.25, 4.95), WHOLE_TEXT: (0.27, 4.62), HUMAN: (0.87, 3.97), MODEL: (0.95, 3.96)}
"""Retrieval and perplexity at 8k with 25% kept, Vicuna-7B: general text, and MultiNews with three kinds of supervision."""

ORDER = ((MODEL, HUMAN), (HUMAN, WHOLE_TEXT), (MODEL, WHOLE_TEXT), (LONG_RANGE, TEXT))
"""(better, worse) pairs in the paper; the first pair is nearly equal there."""
NEARLY_EQUAL = {(MODEL, HUMAN)}
WAYS = (PAPER, "")
SUPERVISIONS = (MODEL, HUMAN, WHOLE_TEXT)
WORDS = {
    MODEL: "the model's own words", HUMAN: "a human's", WHOLE_TEXT: "whole text", LONG_RANGE: "long-range tasks", TEXT: "general text",
}  # fmt: skip


def compared(rows: Sequence[Measurement], lengths: Sequence[int]) -> list[Gain]:
    """Gains of the pairs of `ORDER` in both ways, and of all samples and lengths over fewer; at each of `lengths` and over all."""
    names = {row.plan for row in rows}
    pairs = [(better + way, worse + way) for way in WAYS for better, worse in ORDER]
    pairs += [(LONG_RANGE, name) for name in dict.fromkeys(row.plan for row in rows) if name.startswith(("samples-", "length-"))]
    groups = [(n,) for n in lengths] + ([tuple(lengths)] if len(lengths) > 1 else [])
    tasks = list(dict.fromkeys(row.task for row in rows))
    return [gain(rows, *pair, task, group) for pair in pairs if names.issuperset(pair) for task in tasks for group in groups]


def calibration_answer(rows: Sequence[Measurement], found: Iterable[Gain], lengths: Sequence[int], density: float) -> str:
    """Needles found with each supervision, whether the paper's order is reproduced (its way and ours), and what fewer samples lose."""
    every = list(found)
    pooled = overall(every, lengths)
    if not any(one.plan == MODEL + PAPER for one in pooled):
        return f"No plan is feasible at {density:.1%}."
    published = ", ".join(f"{PUBLISHED[name][0]:.2f}" for name in SUPERVISIONS)
    ours = [one for one in pooled if not one.plan.endswith(PAPER) and (one.plan, one.against) in ORDER]
    papers = [one for one in pooled if one.plan.endswith(PAPER)]
    sentences = [
        f"At {density:.1%} kept and in the paper's way, supervision by {', '.join(WORDS[name] for name in SUPERVISIONS)} finds "
        f"{_scores(rows, PAPER)} of the needles (the paper: {published}); the paper's order is {_verdicts(papers)}.",
        f"Needles, {'; '.join(_pair(one) for one in papers if one.task == NEEDLES)}.",
        f"With this project's objectives they find {_scores(rows, '')}; the order is {_verdicts(ours)}.",
    ]
    fewer = [one for one in every if one.plan == LONG_RANGE and one.against.startswith(("samples-", "length-"))]
    if fewer:
        decided = [
            f"{one.verdict} than {one.against} in {one.task} ({one.numbers}{_where(one, lengths)})"
            for one in fair(fewer, lengths)
            if one.decided
        ]
        sentences.append(
            f"All samples and lengths of the long-range tasks are {'; '.join(decided) or 'not decided to be better than fewer'}."
        )
    return " ".join(filter(None, [*sentences, unequal(fewer)]))


def over_fewer(record: StudyRecord) -> dict[str, dict[str, Measurement]]:
    """By task, what all samples and lengths of the long-range tasks gain over fewer of them; above 0 is better.

    A profile of 2,048 tokens leaves half of the bytes at 4,096: it is compared where it leaves none.
    """
    found: dict[str, dict[str, Measurement]] = {NEEDLES: {}, DOCUMENTS: {}, SUMMARIES: {}}
    for task, rows in found.items():
        for row in record.select(metric=NEEDLES_GAINED if task == NEEDLES else NATS_SAVED, task=task, plan=LONG_RANGE):
            against = row.detail["against"]
            if against.startswith(("samples-", "length-")) and row.length == (2048 if against == "length-2048" else 0):
                rows[f"all over {against}"] = row
    return found


def fair(found: Iterable[Gain], lengths: Sequence[int]) -> list[Gain]:
    """Gains at equal density: over all `lengths` for pairs that keep the same at each, for others at the single lengths where they do.

    A plan profiled at one length may leave most of the budget unused at another.
    """
    every = list(found)
    unlike = {(one.plan, one.against) for one in every if len(one.lengths) == 1 and not one.equal}

    def fits(one: Gain) -> bool:
        if (one.plan, one.against) in unlike:
            return len(one.lengths) == 1 and one.equal
        return one.lengths == tuple(lengths)

    return [one for one in every if fits(one)]


def verdict(found: Sequence[Gain]) -> str:
    """ "reproduced" where every pair of the paper's order is better (the nearly equal ones at least not worse), "not reproduced" where one
    is worse, otherwise "not decided". found: the pairs of one task."""
    told = [one.verdict for one in found if (_plain(one.plan), _plain(one.against)) not in NEARLY_EQUAL]
    if not found:
        return "not measured"
    if any(one.verdict == "worse" for one in found):
        return "not reproduced"
    return "reproduced" if all(each == "better" for each in told) else "not decided"


def _verdicts(found: Sequence[Gain]) -> str:
    tasks = (NEEDLES, DOCUMENTS, SUMMARIES)
    return ", ".join(f"{verdict([one for one in found if one.task == task])} in {task}" for task in tasks)


def _where(one: Gain, lengths: Sequence[int]) -> str:
    return "" if one.lengths == tuple(lengths) else f", at {listed(one.lengths)}"


def _pair(one: Gain) -> str:
    return f"{WORDS[_plain(one.plan)]} over {WORDS[_plain(one.against)]}: {one.verdict} ({one.numbers})"


def _plain(name: str) -> str:
    return name.removesuffix(PAPER)


def _scores(rows: Sequence[Measurement], way: str) -> str:
    """Share of needles found over all samples of all lengths, by supervision."""
    found = {name: [row.detail["per_sample"] for row in rows if (row.plan, row.metric, row.task) == (name + way, RETRIEVAL, NEEDLES)]
             for name in SUPERVISIONS}  # fmt: skip
    return ", ".join(f"{np.concatenate(hits).mean():.2f}" if hits else "-" for hits in found.values())
