"""Capped, power and logarithmic rules (left open by arXiv 2406.14909) against linear ones, also at lengths that were not profiled.

A family of rules is a grid to choose from; all hold whole heads and the floor. One plan per family is solved for the same goal and
densities; a family that keeps less is also compared with linear rules limited to what it keeps. At a given length any rule is a number
of tokens, so a plan of constant spans is measured there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product

import numpy as np
import pandas as pd

from moa_lab.pipeline import Run
from moa_lab.plan import DENSE, EQUAL_BYTES, MIN_SPAN, Plan, SpanRule, dense_plan
from moa_lab.records import InfluenceProfile, LossTable, Measurement
from moa_lab.search import BudgetAnswer, InfeasibleError, limit_lengths, loss_table, rule_grid, solve_budget
from moa_lab.studies.gains import NATS_SAVED, NEEDLES_GAINED, Gain, gains, marked, overall, unequal
from moa_lab.studies.plans import DOCUMENTS, NEEDLES, SUMMARIES, record_of
from moa_lab.studies.record import StudyRecord
from moa_lab.studies.scale import Scale

LINEAR = "linear"
FAMILIES = ("capped", "power", "logarithmic")
"""Families that are compared with linear rules."""
EXPONENTS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
STEPS = 8
"""Spans at the longest profiled length from which a power's coefficient is made, per exponent."""
LOGARITHMS = 40
"""The same for logarithms, which have no exponent to vary."""
CAPS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
"""Shares of the longest profiled length."""


@dataclass(frozen=True)
class Curve(SpanRule):
    """A rule that is any function of the input length N: `clip(tokens(N), min_span, N)`; alpha and beta are its linear part.

    For loss tables only: config cards and plan identities hold alpha and beta alone. Save it as constant spans (`at_length`).
    """

    alpha: float = 0.0
    beta: float = 0.0

    def tokens(self, n_tokens: int) -> float:
        """The span before it is clipped."""
        raise NotImplementedError

    def uncapped_tokens(self, n_tokens: int, min_span: int = MIN_SPAN, multiple: int = 1) -> int:
        """As for any rule: rounded down to a token, or up to `multiple` of them."""
        return SpanRule(float(self.tokens(n_tokens)), 0.0).uncapped_tokens(n_tokens, min_span, multiple)

    @property
    def keeps_everything(self) -> bool:
        """False: a whole head is `DENSE` in every family."""
        return False


@dataclass(frozen=True)
class CappedRule(Curve):
    """`min(cap, alpha + beta * N)`."""

    cap: float = math.inf

    def tokens(self, n_tokens: int) -> float:
        """The span before it is clipped."""
        return min(self.cap, self.alpha + self.beta * n_tokens)


@dataclass(frozen=True)
class PowerRule(Curve):
    """`coefficient * N ** exponent`."""

    coefficient: float = 0.0
    exponent: float = 1.0

    def tokens(self, n_tokens: int) -> float:
        """The span before it is clipped."""
        return self.coefficient * float(n_tokens) ** self.exponent


@dataclass(frozen=True)
class LogarithmicRule(Curve):
    """`coefficient * log2(N)`."""

    coefficient: float = 0.0

    def tokens(self, n_tokens: int) -> float:
        """The span before it is clipped."""
        return self.coefficient * math.log2(n_tokens)


def rules(run: Run, scale: Scale) -> StudyRecord:
    """A plan per family, on needles, documents and own answers at the profiled lengths and the longest tested one."""
    longest = max(run.test_lengths)
    lengths = tuple(sorted({*run.lengths, longest}))
    limits = dict.fromkeys(sorted({*limit_lengths(run.table()), *lengths}), scale.density)
    tables = family_tables(run.profile(), lengths)
    rows: list[Measurement] = run.measure([dense_plan(run.geometry)], lengths=lengths, tasks=(NEEDLES, DOCUMENTS, SUMMARIES))
    solved, twins, left_out = solved_families(tables, limits)
    tables |= dict.fromkeys(twins.values(), tables[LINEAR])
    for name, answer in solved.items():
        for length in lengths:
            plan = at_length(tables[name], answer.choice, length, name)
            rows += run.measure([plan], lengths=[length], tasks=(NEEDLES, DOCUMENTS, SUMMARIES))
    others = [name for name in FAMILIES if name in solved] if LINEAR in solved else []
    found = gains(rows, [(name, LINEAR) for name in others] + list(twins.items()), lengths)
    return record_of(
        run, "rules", "Do bounded or bending rules extrapolate better than linear ones?",
        rules_answer(found, longest, max(run.lengths)), [*rows, *(one.row() for one in found)],
        density=scale.density, limit_lengths=list(limits), left_out=left_out,
        families={name: _described(tables[name], answer) for name, answer in solved.items()},
    )  # fmt: skip


def solved_families(
    tables: Mapping[str, LossTable], limits: Mapping[int, float]
) -> tuple[dict[str, BudgetAnswer], dict[str, str], dict[str, str]]:
    """Answers by family within `limits` (density by length); for a family that keeps less than linear rules, the name of a linear answer
    that keeps no more than it does; and why a family has no answer."""
    solved: dict[str, BudgetAnswer] = {}
    left_out: dict[str, str] = {}
    for name, table in tables.items():
        try:
            solved[name] = solve_budget(table, limits)
        except InfeasibleError as error:
            left_out[name] = str(error)
    twins: dict[str, str] = {}
    if LINEAR in solved:
        for name in (name for name in FAMILIES if name in solved):
            kept = solved[name].density
            if any(solved[LINEAR].density[n] > share * (1 + EQUAL_BYTES) for n, share in kept.items()):
                twins[name] = f"{LINEAR} as {name}"
                solved[twins[name]] = solve_budget(tables[LINEAR], kept)
    return solved, twins, left_out


def families(lengths: Sequence[int], longest: int, min_span: int = MIN_SPAN) -> dict[str, tuple[SpanRule, ...]]:
    """Grids of rules by family, all with the floor and whole heads. lengths: profiled, in tokens; longest: where they are tested.

    Rules of a family with the same span at every one of these lengths and at twice the longest profiled one are one rule.
    """
    reference, at = max(lengths), sorted({*lengths, 2 * max(lengths), longest})
    linear = rule_grid(lengths, min_span=min_span)
    powers = product(EXPONENTS, np.geomspace(min_span, reference, STEPS))
    grids: dict[str, Iterable[SpanRule]] = {
        # Linear rules are those whose cap lies beyond every length.
        "capped": [*linear, *(CappedRule(rule.alpha, rule.beta, share * reference) for share in CAPS for rule in linear if rule.beta > 0)],
        "power": (PowerRule(coefficient=float(span) / reference**exponent, exponent=exponent) for exponent, span in powers),
        "logarithmic": (
            LogarithmicRule(coefficient=float(span) / math.log2(reference)) for span in np.geomspace(min_span, reference, LOGARITHMS)
        ),
    }
    return {LINEAR: linear, **{name: _distinct(grid, at, min_span) for name, grid in grids.items()}}


def family_tables(profile: InfluenceProfile, lengths: Sequence[int]) -> dict[str, LossTable]:
    """A loss table per family; `lengths`: the measured ones. The floor scales the losses of all, so that the goal is the same."""
    grids = families(profile.lengths, max(lengths))
    return {name: loss_table(profile, grid) for name, grid in grids.items()}


def at_length(table: LossTable, choice: np.ndarray, length: int, name: str) -> Plan:
    """The plan that keeps at `length` tokens what `choice` (layers, kv_heads) does: constant spans, and whole heads where all is kept."""
    spans = np.take_along_axis(table.span_tokens(length), choice, axis=1)
    dense = [table.geometry.dense_span_tokens(layer, length) for layer in range(table.geometry.layers)]
    rows = tuple(
        tuple(DENSE if span >= most else SpanRule(float(span), 0.0) for span in row) for row, most in zip(spans, dense, strict=True)
    )
    return Plan(
        geometry=table.geometry, rules=rows, sink_tokens=table.sink_tokens, min_span=table.min_span, name=name, lengths=(length,),
        search={"origin": name}, provenance=table.provenance,
    )  # fmt: skip


def rules_answer(found: Sequence[Gain], longest: int, profiled: int) -> str:
    """Whether a family beats linear rules at `longest` tokens, and what it keeps there; at equal bytes where that was measured."""
    all_there = overall(found, (longest,))
    if not all_there:
        return "No family of rules could be compared with linear ones."
    names = list(dict.fromkeys(one.plan for one in all_there))
    there = [one for name in names for one in _fairest([each for each in all_there if each.plan == name])]
    scores = {name: [one.verdict for one in there if one.plan == name] for name in names}
    wins = [name for name in names if "better" in scores[name] and "worse" not in scores[name]]
    mixed = [name for name in names if "better" in scores[name] and "worse" in scores[name]]
    if wins:
        of = ", ".join(f"{name} ({scores[name].count('better')} of {len(scores[name])} comparisons won, none lost)" for name in wins)
        verdict = f"Better than linear rules: {of}"
    elif mixed:
        verdict = f"No family is better than linear rules throughout ({', '.join(mixed)}: won in one thing, lost in another)"
    else:
        verdict = "No family is shown to beat linear rules"
    beyond = f" ({longest / profiled:g} times the longest profiled length)" if longest > profiled else " (no longer than the profiled)"
    kept = {one.plan: one.density for one in there}
    told = "; ".join(
        f"{name} ({kept[name]:.1%} kept): {', '.join(f'{one.task} {one.verdict} ({one.numbers})' for one in there if one.plan == name)}"
        for name in names
    )
    fair = " and equal bytes" if all(one.equal for one in there) else ""
    return " ".join(filter(None, [f"{verdict}, at {longest:,} tokens{beyond}{fair}. {told[:1].upper()}{told[1:]}.", unequal(there)]))


def _fairest(found: Sequence[Gain]) -> Sequence[Gain]:
    """Those at equal bytes, or all where there are none."""
    return [one for one in found if one.equal] or found


def _distinct(grid: Iterable[SpanRule], lengths: Sequence[int], min_span: int) -> tuple[SpanRule, ...]:
    """The floor and whole heads first: they stay where another rule has their spans."""
    kept: dict[tuple[int, ...], SpanRule] = {}
    for rule in (SpanRule(float(min_span), 0.0), DENSE, *grid):
        kept.setdefault(tuple(rule.span_tokens(n, min_span) for n in lengths), rule)
    return tuple(kept.values())


def _described(table: LossTable, answer: BudgetAnswer) -> Mapping[str, object]:
    """What was chosen, in full: a rule for every head, by its place in the list of rules that are used."""
    used = sorted(set(answer.choice.ravel().tolist()))
    return {
        "rules": [{"kind": type(table.rules[index]).__name__, **asdict(table.rules[index])} for index in used],
        "choice": np.searchsorted(used, answer.choice).tolist(),
        "candidates": len(table.rules), "predicted": answer.value, "gap": answer.gap,
        "density": {str(n): kept for n, kept in answer.density.items()},
    }  # fmt: skip


def against_linear(record: StudyRecord) -> pd.DataFrame:
    """Gains of the families over linear rules, with what the two keep: at a profiled length over linear rules of the same goal, beyond
    over linear rules of the same bytes.
    """
    profiled, table = record.settings["profiled_lengths"], dict[tuple[str, str, str], dict[str, str]]()
    for row in record.rows:
        if row.metric not in (NEEDLES_GAINED, NATS_SAVED) or not row.length:
            continue
        against = row.detail["against"]
        if against == (LINEAR if row.length in profiled else f"{LINEAR} as {row.plan}"):
            kept = {"kept by the two": f"{row.density:.1%} / {row.detail['against_density']:.1%}"}
            table.setdefault((f"{row.length:,}", row.plan, against), kept)[row.task] = marked(row)
    return pd.DataFrame(table).T
