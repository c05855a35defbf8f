"""Which measured plan to take: the one of fewest bytes that meets a wish, where what it promises holds with 95% confidence.

Plans are tried in an order that no score decides, from the most bytes to the fewest, of as many those with most test samples first, and
last those with few (`FEW`), up to the first whose quality is not sure. So, however many plans there are, the chance that the one named
does not hold what is promised is some 2.5% at most for every kind of score that is asked for (a fixed sequence of tests, each at the level
of a 95% interval's end; at several lengths all must pass).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moa_lab.capacity import plan_capacity
from moa_lab.evaluate.compare import excess_over_dense, row_of, share_of_hits
from moa_lab.evaluate.options import NEEDLES, TEXTS, Option, Wish
from moa_lab.plan import Plan
from moa_lab.records import Measurement
from moa_lab.records.intervals import Interval
from moa_lab.text import interval_text

FEW = 0.25
"""Samples, as a share of those of the plan that has most, below which a plan is tried after all others: chance may fail it."""
MORE = " (more test samples may decide)"


@dataclass(frozen=True)
class Judged:
    """An option held against a wish. short: the first thing it does not hold, in words, or empty; sure: what it holds.
    is_affordable: it holds what is counted and not sampled: bytes, sequences and speed."""

    option: Option
    density: float
    short: str
    sure: str
    is_affordable: bool


@dataclass(frozen=True)
class Advice:
    """The plan to take (None: none), why, and what the next ones would cost, in sentences; all options, most bytes first. beside: what else
    is known of the plan, or is not."""

    plan: Plan | None
    reason: str
    next_one: str
    judged: tuple[Judged, ...]
    beside: str = ""

    def __str__(self) -> str:
        return " ".join(part for part in (self.reason, self.beside, self.next_one) if part)


def recommend(options: Sequence[Option], wish: Wish) -> Advice:
    """The plan of fewest bytes that meets the wish.

    What was not measured where the wish must hold is left out, and told. Raises ValueError without options, and where all are left out.
    """
    if not options:
        raise ValueError("there is no measured plan to choose from")
    judged, missing = [], []
    for option in options:
        try:
            judged.append(_judged(option, wish))
        except ValueError as error:
            missing.append(str(error))
    if not judged:
        raise ValueError(missing[0])
    judged.sort(key=lambda one: -one.density)
    taken: Judged | None = None
    stop: Judged | None = None
    enough = FEW * max(one.option.samples(wish) for one in judged)
    for one in sorted(judged, key=lambda one: (one.option.samples(wish) < enough, -one.density, -one.option.samples(wish))):
        if not one.is_affordable:
            # Too many bytes, or too slow: no matter of chance, so it ends nothing.
            continue
        if one.short:
            stop = one
            break
        taken = one if taken is None or one.density < taken.density else taken
    told = [_beside(taken, wish)] if taken else []
    told += [f"Left out: {'; '.join(missing)}."] if missing else []
    plan, beside = taken.option.plan if taken else None, " ".join(filter(None, told))
    return Advice(plan, _reason(taken, stop, judged), _next(taken, stop, wish), tuple(judged), beside)


def _judged(option: Option, wish: Wish) -> Judged:
    short, sure = "", []
    counted = _counted(option, wish)
    for text, holds in (*counted, *_quality(option, wish)):
        if holds:
            sure.append(text)
        elif not short:
            short = text
    return Judged(option, option.density(wish), short, "; ".join(sure), all(holds for _, holds in counted))


def _counted(option: Option, wish: Wish) -> list[tuple[str, bool]]:
    """Bytes, sequences and speed."""
    told = []
    if wish.density is not None:
        kept = option.density(wish)
        told.append((f"at most {wish.density:.1%} are asked", kept <= wish.density + 1e-9))
    if wish.is_served and wish.gpu and wish.weights_bytes and wish.n_tokens:
        found = plan_capacity(option.plan, wish.gpu, wish.weights_bytes, wish.n_tokens)
        if wish.sequences is not None:
            held = f"{found.batch:,} sequences of {wish.n_tokens:,} tokens at once on {wish.gpu.name}, {wish.sequences:,} asked"
            told.append((held, found.batch >= wish.sequences))
        if wish.tokens_s is not None:
            told.append((f"{found.tokens_s:,.0f} tokens/s foretold, {wish.tokens_s:,.0f} asked", found.tokens_s >= wish.tokens_s))
    return told


def _quality(option: Option, wish: Wish) -> list[tuple[str, bool]]:
    """What is sampled: for every kind the length where it is least sure."""
    told = []
    lengths = option.lengths(wish)
    if wish.needles is not None:
        text, at = _needles(option, lengths)
        if math.isinf(at.value):
            told.append((text, False))
        else:
            told.append((f"{text}, {wish.needles:g} asked" + (MORE if at.low < wish.needles <= at.value else ""), at.low >= wish.needles))
    if wish.perplexity is not None:
        tasks = _texts(option)
        if not tasks:
            raise ValueError(f"{option.name}: no running text was measured, so nothing is known of perplexity")
        for task in tasks:
            text, at = _perplexity(option, task, lengths)
            text += f", {wish.perplexity:+.1%} asked"
            told.append((text + (MORE if at.value <= wish.perplexity < at.high else ""), at.high <= wish.perplexity))
    return told


def _needles(option: Option, lengths: Sequence[int]) -> tuple[str, Interval]:
    """The share of the dense model's needles, in words and numbers, at the length where it is least sure."""
    name = option.plan.name
    shares = {n: share_of_hits(_row(option, name, NEEDLES, n), _row(option, "dense", NEEDLES, n)) for n in lengths}
    n, at = min(shares.items(), key=lambda found: found[1].low)
    if math.isinf(at.value):
        return f"the dense model finds no needle at {n:,} tokens, so that nothing can be said of a share of them", at
    return f"needles {at.value:.3f} {interval_text(at.low, at.high)} of dense at {n:,} tokens", at


def _perplexity(option: Option, task: str, lengths: Sequence[int]) -> tuple[str, Interval]:
    """What a text's perplexity is above the dense model's, in words and numbers, at the length where it is least sure."""
    excess = {n: excess_over_dense(option.rows, option.plan.name, task, n) for n in lengths}
    n, at = max(excess.items(), key=lambda found: found[1].high)
    return f"perplexity of {TEXTS[task]} {at.value:+.1%} {interval_text(at.low, at.high, '+.1%')} at {n:,} tokens", at


def _texts(option: Option) -> list[str]:
    return [task for task in TEXTS if any(row.task == task for row in option.rows)]


def _row(option: Option, plan: str, task: str, length: int) -> Measurement:
    try:
        return row_of(option.rows, plan, task, length, "retrieval")
    except KeyError as error:
        raise ValueError(f"{option.name}: {error.args[0]}") from None


def _reason(taken: Judged | None, stop: Judged | None, judged: Sequence[Judged]) -> str:
    if taken is None:
        near = stop or judged[-1]
        return f"No measured plan meets the wish: {near.option.name} keeps {near.density:.1%} of the bytes; {near.short}."
    others = f" (of {len(judged)} measured plans the one of fewest that holds, with 95% confidence)" if len(judged) > 1 else ""
    return f"Take {taken.option.name}: it keeps {taken.density:.1%} of the bytes{others}; {taken.sure}."


def _beside(taken: Judged, wish: Wish) -> str:
    """What the plan loses of that which the wish does not name, as far as it was measured, and at which lengths nothing was."""
    option, lengths, told = taken.option, taken.option.lengths(wish), []
    tasks = ([NEEDLES] if wish.needles is None else []) + (_texts(option) if wish.perplexity is None else [])
    for task in tasks:
        # A score that is not there, or not at every length, is not told.
        with contextlib.suppress(ValueError, KeyError):
            told.append((_needles(option, lengths) if task == NEEDLES else _perplexity(option, task, lengths))[0])
    said = [f"Not asked for, but measured: {'; '.join(told)}."] if told else []
    if wish.n_tokens is not None and wish.n_tokens > max(lengths):
        said.append(f"It was measured to {max(lengths):,} tokens; at {wish.n_tokens:,} nobody knows what it loses.")
    return " ".join(said)


def _next(taken: Judged | None, stop: Judged | None, wish: Wish) -> str:
    if taken is None:
        wants_less = wish.density is not None or wish.is_served
        return f"What remains is {'a lower wish' if wants_less else 'the dense model'}, or a run at another density."
    if stop is None:
        return "Nothing with fewer bytes was measured: a run at a lower density may find it."
    return f"The next, {stop.option.name}, keeps {stop.density:.1%}, but is not sure to hold: {stop.short}."


def advice_table(advice: Advice) -> list[Mapping[str, str]]:
    """All options as rows of a table, most bytes first."""
    return [
        {
            "plan": one.option.name, "bytes": f"{one.density:.1%}",
            "verdict": "take" if one.option.plan is advice.plan else _verdict(one), "why": one.short or one.sure,
        }
        for one in advice.judged
    ]  # fmt: skip


def _verdict(judged: Judged) -> str:
    if not judged.short:
        return "holds"
    return "not sure" if judged.short.endswith(MORE) else "no"
