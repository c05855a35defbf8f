"""Gains of one plan over another: paired differences over the same samples, as rows of a record and as text for its answer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from moa_lab.evaluate.compare import difference, row_of
from moa_lab.evaluate.equal_bytes import keeps
from moa_lab.evaluate.intervals import Interval
from moa_lab.records import Measurement
from moa_lab.text import interval_text

RETRIEVAL = "retrieval"
NEEDLES_GAINED, NATS_SAVED = "needles_gained", "nats_saved"
NO_DIFFERENCE = 0.01
"""Plans whose interval of hits lies within this of 0 count as equal."""


@dataclass(frozen=True)
class Gain:
    """`plan` against `against` on one task: more answers found (a share), or fewer nats per token. Above 0 is better.

    density, against_density: what the two keep, the mean over `lengths`.
    """

    plan: str
    against: str
    metric: str
    task: str
    lengths: tuple[int, ...]
    found: Interval
    density: float
    against_density: float

    @property
    def verdict(self) -> str:
        """better or worse where the whole 95% interval is on one side of 0; no difference where the mean difference is 0 and the interval
        lies within `NO_DIFFERENCE`; else not decided, as for a single pair, which has no interval.
        """
        if self.found.n < 2:
            return "not decided"
        if self.found.value == 0 and -NO_DIFFERENCE <= self.found.low <= self.found.high <= NO_DIFFERENCE:
            return "no difference"
        if self.found.low > 0:
            return "better"
        return "worse" if self.found.high < 0 else "not decided"

    @property
    def decided(self) -> bool:
        """Whether one of the two is shown to be better."""
        return self.verdict in ("better", "worse")

    @property
    def equal(self) -> bool:
        """Whether the two keep the same bytes, to one in a hundred."""
        return keeps(self.density, self.against_density)

    @property
    def numbers(self) -> str:
        """Value and interval, for instance `+0.031 [0.010, 0.052]`, with their unit where it is not a share of needles."""
        unit = " nats saved" if self.metric == NATS_SAVED else ""
        interval = interval_text(self.found.low, self.found.high) if self.found.n > 1 else "[one sample]"
        return f"{self.found.value:+.3f} {interval}{unit}"

    def row(self) -> Measurement:
        """A row of the record; length 0 where several lengths are taken together."""
        length = self.lengths[0] if len(self.lengths) == 1 else 0
        detail = {"against": self.against, "against_density": self.against_density, "lengths": list(self.lengths)}
        value, n, low, high = self.found
        return Measurement(self.plan, self.metric, self.task, length, value, n, low, high, self.density, detail)


def gain(rows: Sequence[Measurement], plan: str, against: str, task: str, lengths: Iterable[int]) -> Gain:
    """Paired over all samples of `lengths`, all of equal weight. Raises KeyError for what was not measured."""
    chosen = tuple(dict.fromkeys(lengths))
    ours, theirs = (pooled([row_of(rows, name, task, n) for n in chosen]) for name in (plan, against))
    better = ours.metric == RETRIEVAL
    found = difference(ours, theirs) if better else difference(theirs, ours)
    return Gain(plan, against, NEEDLES_GAINED if better else NATS_SAVED, task, chosen, found, ours.density, theirs.density)


def gains(rows: Sequence[Measurement], pairs: Iterable[tuple[str, str]], lengths: Sequence[int]) -> list[Gain]:
    """Every (plan, against) of `pairs` on every task, at each length and, where there are several, over all of them."""
    tasks = list(dict.fromkeys(row.task for row in rows))
    groups = [(n,) for n in lengths] + ([tuple(lengths)] if len(lengths) > 1 else [])
    return [gain(rows, plan, against, task, group) for plan, against in pairs for task in tasks for group in groups]


def gains_by_density(
    rows: Sequence[Measurement], plan: str, against: str, task: str, lengths: Iterable[Sequence[int]], densities: Iterable[float]
) -> dict[str, Gain]:
    """The gains of PLAN-25 over AGAINST-25 and so on, by "25%", or "25%, 1,024 tokens" where one length is compared alone."""
    found = [(f"{p:g}", gain(rows, f"{plan}-{p:g}", f"{against}-{p:g}", task, group)) for p in densities for group in lengths]
    return {f"{p}%" + (f", {one.lengths[0]:,} tokens" if len(one.lengths) == 1 else ""): one for p, one in found}


def verdicts(rows: Sequence[Measurement], plan: str, against: str, tasks: Iterable[str], lengths: Sequence[int]) -> list[str]:
    """The verdict of `plan` against `against` on every task."""
    return [gain(rows, plan, against, task, lengths).verdict for task in tasks]


def side(found: Measurement) -> str:
    """Of a row that is a difference: better or worse where its whole interval is on one side of 0, else "?"."""
    low, high = (-np.inf if found.low is None else found.low), (np.inf if found.high is None else found.high)
    return "better" if low > 0 else "worse" if high < 0 else "?"


def marked(found: Interval | Measurement) -> str:
    """A difference with its interval, and a star where that leaves out 0: `+0.031 [+0.010, +0.052] *`."""
    if found.low is None or found.high is None:
        return f"{found.value:+.3f}"
    return f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]{'' if found.low <= 0 <= found.high else ' *'}"


def pooled(rows: Sequence[Measurement]) -> Measurement:
    """Rows of one plan and task as one: their samples one after the other, the mean density."""
    samples = [value for row in rows for value in row.detail["per_sample"]]
    which = [row.detail["samples"] for row in rows if "samples" in row.detail]
    detail = {"per_sample": samples, **({"samples": "+".join(which)} if which else {})}
    return replace(rows[0], length=0, density=float(np.mean([row.density for row in rows])), detail=detail)


def overall(found: Iterable[Gain], lengths: Sequence[int]) -> list[Gain]:
    """The gains over all of `lengths` together."""
    return [one for one in found if one.lengths == tuple(lengths)]


def unequal(found: Iterable[Gain]) -> str:
    """A sentence that names the plans compared at one length that do not keep the same there; empty where all do."""
    told: dict[str, None] = {}
    for one in found:
        if len(one.lengths) == 1 and not one.equal:
            told[f"{one.plan} {one.density:.1%} and {one.against} {one.against_density:.1%} at {one.lengths[0]:,} tokens"] = None
    return f"Not all keep the same: {'; '.join(told)}." if told else ""


def counted(count: int, noun: str) -> str:
    """For instance `1 comparison` and `2 comparisons`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def listed(lengths: Sequence[int]) -> str:
    """For instance `1,024, 2,048 and 4,096 tokens`."""
    *others, last = [f"{n:,}" for n in lengths]
    return f"{', '.join(others)} and {last} tokens" if others else f"{last} tokens"
