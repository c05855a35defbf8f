"""Whether a plan is worse than a simple one on test samples, and which kind of plan won the validation, in words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from moa_lab.evaluate.compare import difference
from moa_lab.evaluate.options import TEXTS
from moa_lab.plan import Plan, told_mixes
from moa_lab.records import Measurement, kind_text
from moa_lab.search.plain import SIMPLE

HIGHER_IS_BETTER = {"retrieval": True, "cross_entropy": False}


def worse_than_simple(plan: Plan, others: Iterable[Plan], rows: Iterable[Measurement]) -> list[str]:
    """A sentence for every simple plan of `others` that is decidedly better than `plan` in some score (95%, paired), with what to try.

    Scores are retrieval and cross-entropy by task and length, of rows of the same samples.
    """
    rows = tuple(rows)
    told = []
    for simple in others:
        if simple.search.get("origin") not in SIMPLE or (simple.rules, simple.bits) == (plan.rules, plan.bits):
            continue
        lost = [(row.metric, clause) for row in rows if row.plan == plan.name and (clause := _lost(row, simple.name, rows))]
        if lost:
            what = "; ".join(clause for _, clause in lost)
            told.append(f"{plan.name} is worse than {simple.name} here: {what}. Try {_cure([metric for metric, _ in lost])}.")
    return told


def chosen_text(plan: Plan) -> str:
    """Which candidate won the validation, of which kind, by how much over the best simple one, and in which bits it is stored if not all
    in 16; empty for a plan that did not."""
    found = plan.search
    if "score" not in found or "candidate" not in found:
        return ""
    text = f"{plan.name} is {found['candidate']} ({kind_text(str(found.get('origin')))}), chosen by {_preferred(str(found['prefer']))}"
    stored = f" Keys and values are stored in {told_mixes(plan)}." if plan.bits else ""
    simple = found.get("best_simple")
    if not simple:
        return f"{text}.{stored}"
    if simple["candidate"] == found["candidate"]:
        return f"{text}: a simple plan lost least in validation.{stored}"
    return (
        f"{text}: in validation it loses {found['score']:.3f} of what uniform spans lose, "
        f"the best simple plan, {simple['candidate']} ({kind_text(simple['origin'])}), {simple['score']:.3f}.{stored}"
    )


def _preferred(prefer: str) -> str:
    return "needles and words" if prefer == "both" else prefer


def _lost(row: Measurement, against: str, rows: Sequence[Measurement]) -> str:
    """What `row` decidedly loses against another plan's row of the same samples; empty if nothing."""
    other = next((one for one in rows if (one.plan, one.metric, one.task, one.length) == (against, row.metric, row.task, row.length)), None)
    if row.metric not in HIGHER_IS_BETTER or other is None or not _paired(row, other):
        return ""
    found = difference(row, other)
    worse = found.high < 0 if HIGHER_IS_BETTER[row.metric] else found.low > 0
    unit = "" if row.metric == "retrieval" else " nats"
    return f"{TEXTS.get(row.task, row.task)} at {row.length:,} tokens {row.value:.3f} against {other.value:.3f}{unit}" if worse else ""


def _paired(row: Measurement, other: Measurement) -> bool:
    own, theirs = (one.detail.get("per_sample", ()) for one in (row, other))
    return len(own) == len(theirs) > 1 and row.detail.get("samples") == other.detail.get("samples")


def _cure(metrics: Sequence[Any]) -> str:
    kinds = [kind for metric, kind in (("retrieval", "needles"), ("cross_entropy", "words")) if metric in metrics]
    prefer = f"--prefer {kinds[0]}, " if len(kinds) == 1 else ""
    return f"{prefer}a higher --density, or a preset with more samples"
