"""Below the densities that the paper tried (it stops at 15%): where retrieval fails, on which heads it depends, and what helps.

Plans here keep the heads that the profile ranks first whole, the others at a constant floor. They are compared with learned spans.
"""

from __future__ import annotations

from collections.abc import Sequence

from moa_lab.evaluate.scoring import loss_rows, score_samples
from moa_lab.pipeline import Run
from moa_lab.plan import MIN_SPAN, SINK_TOKENS, Plan, dense_plan
from moa_lab.records import Measurement
from moa_lab.search import InfeasibleError, ranked_plan
from moa_lab.search.goals import QUESTIONS
from moa_lab.studies.densities.whole_heads import NEAR, Cliff, cut_changes, find_cliff, fitted, ranked_heads
from moa_lab.studies.gains import Gain, counted, gain, listed
from moa_lab.studies.plans import DOCUMENTS, NEEDLES, SUMMARIES, chosen_among, name_of, record_of
from moa_lab.studies.record import StudyRecord
from moa_lab.studies.scale import Scale
from moa_lab.text import interval_text

CLIFF_FLOORS = (128, 256)
FLOORS = (96, 128, 192, 256)
SINKS = (4, 16, 64)
SINK_FLOORS = (128,)
"""Floors at which the sink is varied; at all others it is the usual one."""
TASKS = (NEEDLES, DOCUMENTS, SUMMARIES)


def low_density(run: Run, scale: Scale) -> StudyRecord:
    """The retrieval cliff, floors and sinks at equal bytes, learned spans, and the loss when each whole head is cut."""
    lengths = tuple(sorted({run.lengths[0], run.lengths[-1]}))
    dense = run.measure([dense_plan(run.geometry)], lengths=lengths, tasks=TASKS)
    ranking, left_out = ranked_heads(run.table()), dict[str, str]()
    cliffs, rows = [], list(dense)
    for floor in CLIFF_FLOORS:
        cliff, found = find_cliff(
            run.geometry, ranking, floor, lengths, dense, NEEDLES,
            lambda plan: run.measure([plan], lengths=lengths, tasks=(NEEDLES, SUMMARIES)),
        )  # fmt: skip
        cliffs.append(cliff)
        rows += found
    rows += _floors_and_sinks(run, scale, ranking, lengths, left_out)
    density = max(scale.low)
    ranked, found = _ranked_and_learned(run, density, lengths, left_out)
    rows += found
    changes = _cuts(run, ranked) if ranked else []
    # Where the dense model finds no needles, there is no cliff to see.
    seen = cliffs if all(row.value > 0 for row in dense if row.task == NEEDLES) else []
    compared = comparisons(rows, scale.low, lengths)
    return record_of(
        run, "low_density", "Below 15% of the cache: where does it break, on which heads, and what helps?",
        low_density_answer(seen, compared, changes, density, len(ranking), lengths),
        [*rows, *(one.row() for one in compared), *changes],
        densities=list(scale.low), lengths=list(lengths), left_out=left_out,
        cliffs=[vars(cliff) for cliff in cliffs], ranking=[list(head) for head in ranking],
    )  # fmt: skip


def variant(density: float, floor: int, sink: int) -> str:
    """The name of a plan, for instance `ranked-15-floor-128-sink-64`."""
    return f"{name_of('ranked', density)}-floor-{floor}-sink-{sink}"


def settings_at(density: float, low: Sequence[float]) -> list[tuple[int, int]]:
    """(floor, sink) pairs in tokens: every floor with the usual sink, and at the highest density other sinks at `SINK_FLOORS`."""
    sinks = [(floor, sink) for floor in SINK_FLOORS for sink in SINKS if sink != SINK_TOKENS] if density == max(low) else []
    return [*((floor, SINK_TOKENS) for floor in FLOORS), *sinks]


def comparisons(rows: Sequence[Measurement], low: Sequence[float], lengths: Sequence[int]) -> list[Gain]:
    """Floors against the usual floor, sinks against the usual sink, learned spans against both usual; at lengths that both have."""
    pairs = []
    for density in low:
        for floor, sink in settings_at(density, low):
            usual = (floor, SINK_TOKENS) if sink != SINK_TOKENS else (MIN_SPAN, SINK_TOKENS)
            if (floor, sink) != usual:
                pairs.append((variant(density, floor, sink), variant(density, *usual)))
    pairs.append((name_of("learned", max(low)), variant(max(low), MIN_SPAN, SINK_TOKENS)))
    found = []
    for plan, against in pairs:
        for task in TASKS:
            measured = [{row.length for row in rows if (row.plan, row.task) == (name, task)} for name in (plan, against)]
            shared = [n for n in lengths if all(n in each for each in measured)]
            found += [gain(rows, plan, against, task, shared)] if shared else []
    return found


def low_density_answer(
    cliffs: Sequence[Cliff], compared: Sequence[Gain], changes: Sequence[Measurement], density: float, heads: int, lengths: Sequence[int]
) -> str:
    """Where the cliff is; what a floor, a sink and learned spans change at `density`; how much few heads carry."""
    shown = [one for one in compared if one.plan.startswith((f"{name_of('ranked', density)}-", name_of("learned", density)))]
    parts = [
        f"To find {NEAR:.0%} of the dense model's needles at {listed(lengths)}: {'; '.join(_cliff(one, heads) for one in cliffs)}."
        if cliffs
        else "The dense model does not find needles at every length, so no cliff can be seen."
    ]
    for kind, told in (
        ("floor", f"a floor other than {MIN_SPAN} tokens"), ("sink", f"a sink other than {SINK_TOKENS} tokens"),
        ("learned", "learning all spans by descent, instead of whole heads over a floor,"),
    ):  # fmt: skip
        of = [one for one in shown if _kind(one) == kind]
        parts.append(f"At {100 * density:g}%, {told} {_moves(of)}.")
    return " ".join([*parts, _concentrated(changes)])


def _cliff(cliff: Cliff, heads: int) -> str:
    sure = "" if cliff.decided else " (not decided)"
    over = f"over a floor of {cliff.floor} tokens"
    if cliff.enough is None:
        return f"{over} {counted(cliff.short or 0, 'whole head')} of {heads} {_are(cliff.short)} not enough{sure}"
    before = f", {cliff.short} {_are(cliff.short)} not" if cliff.short is not None else ""
    kept = f"{counted(cliff.enough, 'whole head')} of {heads} ({cliff.density:.1%} kept)"
    return f"{over} {kept} {_are(cliff.enough)} enough{before}{sure}"


def _are(count: int | None) -> str:
    return "is" if count == 1 else "are"


def _kind(one: Gain) -> str:
    if one.plan.startswith("learned"):
        return "learned"
    return "floor" if one.plan.endswith(f"-sink-{SINK_TOKENS}") else "sink"


def _moves(found: Sequence[Gain]) -> str:
    if not found:
        return "could not be compared"
    decided = [f"{one.task} {one.verdict} with {one.plan} ({one.numbers})" for one in found if one.decided]
    if not decided:
        return f"changes nothing that these samples decide ({counted(len(found), 'comparison')})"
    return f"changes this ({len(decided)} of {len(found)} comparisons decided): {'; '.join(decided)}"


def _concentrated(changes: Sequence[Measurement]) -> str:
    if not changes:
        return "No plan had whole heads to cut one by one."
    sure = [row for row in changes if row.low > 0]
    worst = max(changes, key=lambda row: row.value)
    rises = sum(max(row.value, 0.0) for row in changes)
    share = f", {worst.value / rises:.0%} of all increases together" if rises > 0 else ""
    raising = "raises" if len(sure) == 1 else "raise"
    return (
        f"Cut to the floor one at a time, {len(sure)} of the {counted(len(changes), 'whole head')} of {worst.plan} {raising} the loss of "
        f"calibration questions (intervals above 0); most of all {worst.task}, {worst.value:+.3f} nats "
        f"{interval_text(worst.low, worst.high)}{share}."
    )


def _floors_and_sinks(
    run: Run, scale: Scale, ranking: Sequence[tuple[int, int]], lengths: Sequence[int], left_out: dict[str, str]
) -> list[Measurement]:
    """Rows of a plan per length that fills the density there: equal bytes, whatever the floor."""
    rows = []
    for density in scale.low:
        for floor, sink in settings_at(density, scale.low):
            name = variant(density, floor, sink)
            for length in lengths:
                try:
                    plan = fitted(run.geometry, ranking, density, length, floor=floor, sink=sink, name=name)
                except InfeasibleError as error:
                    left_out[f"{name} at {length}"] = str(error)
                else:
                    rows += run.measure([plan], lengths=[length], tasks=TASKS)
    return rows


def _ranked_and_learned(
    run: Run, density: float, lengths: Sequence[int], left_out: dict[str, str]
) -> tuple[Plan | None, list[Measurement]]:
    """The ranked plan for all lengths (None where infeasible), and the rows of it and of the learned plan."""
    try:
        ranked = ranked_plan(run.table(), dict.fromkeys(lengths, density), floor_tokens=MIN_SPAN, name=name_of("ranked", density))
    except ValueError as error:
        left_out[name_of("ranked", density)] = str(error)
        return None, []
    plans = [ranked]
    try:
        at = run.at(density)
        if len(learned := at.learned()):
            plans.append(chosen_among(at, learned, "learned", density))
    except InfeasibleError as error:
        left_out[name_of("learned", density)] = str(error)
    return ranked, run.measure(plans, lengths=lengths, tasks=TASKS)


def _cuts(run: Run, plan: Plan) -> list[Measurement]:
    samples = run.samples().select(task=QUESTIONS) or run.samples().samples
    return cut_changes(plan, samples, lambda one, asked: loss_rows(one, asked, score_samples(run.model, one, asked)))


def variant_text(row: Measurement) -> str:
    """What a ranked plan varies, and whether it was compared at one length alone: `15%: sink 4`, `8%: floor 192, 4,096 tokens only`."""
    density, floor, sink = row.plan.split("-")[1::2]
    varied = f"floor {floor}" if sink == f"{SINK_TOKENS}" else f"sink {sink}"
    return f"{density}%: {varied}" + (f", {row.length:,} tokens only" if row.length else "")
