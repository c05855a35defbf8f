"""The search space, from uniform to elastic (arXiv 2406.14909, sec. 5.4), and other settings: rules per layer, pooling, min_span.

Every plan is solved from one profile, for the mean of the default goals and at the same density, without validation. All but
uniform are solved by mixed-integer programming, so that they differ by their space and not by how well it was searched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from moa_lab.pipeline import Run
from moa_lab.plan import DENSE, MIN_SPAN, Plan, SpanRule, dense_plan, uniform_plan
from moa_lab.records import InfluenceProfile, LossTable
from moa_lab.search import InfeasibleError, NoPlanError, loss_table, solve_milp
from moa_lab.search.losses import Pool
from moa_lab.search.space import RATIOS
from moa_lab.studies.gains import Gain, gains, listed, overall, unequal
from moa_lab.studies.plans import DOCUMENTS, NEEDLES, SUMMARIES, record_of
from moa_lab.studies.record import StudyRecord
from moa_lab.studies.scale import Scale

STEPS = {
    "uniform": "one ratio for all", "layers": "one ratio per layer", "heads": "one ratio per head", "elastic": "elastic rules per head",
}  # fmt: skip
ELASTIC = "elastic"
MOST_RULES = (1, 2, 3)
POOLS: tuple[Pool, ...] = ("sum", "mean")
"""Beside the default, max. As objectives are scaled, sum and mean should give the same plan."""
MIN_SPANS = (192, 256)
"""Tokens, beside the default."""
PUBLISHED = {"uniform": (0.25, 0.15), "layers": (0.31, 0.26), "heads": (0.95, 0.41), "elastic": (0.98, 0.43)}
"""Retrieval at 8k and 16k with 25% kept, Vicuna-7B (arXiv 2406.14909, the ablation of the search space)."""


def space(run: Run, scale: Scale) -> StudyRecord:
    """Needles, documents and own answers at the profiled lengths and the longest tested one, step by step and variant by variant."""
    lengths = measured_lengths(run)
    plans, same, left_out = space_plans(run.profile(), scale.density, scale.search_seconds)
    rows = run.measure([dense_plan(run.geometry), *plans.values()], lengths=lengths, tasks=(NEEDLES, DOCUMENTS, SUMMARIES))
    found = gains(rows, [*step_pairs(plans), *((name, ELASTIC) for name in variants(plans))], lengths)
    return record_of(
        run, "space", "Does every step from uniform spans to elastic rules per head help?",
        space_answer(found, lengths, same, scale.density), [*rows, *(one.row() for one in found)],
        density=scale.density, same_plan=same, left_out=left_out, search_seconds=scale.search_seconds,
        solved={name: plan.search for name, plan in plans.items()}, published={name: list(pair) for name, pair in PUBLISHED.items()},
    )  # fmt: skip


def measured_lengths(run: Run) -> tuple[int, ...]:
    """The profiled lengths and the longest tested one, to which rules extrapolate where it is longer."""
    return tuple(sorted({*run.lengths, max(run.test_lengths)}))


def space_plans(profile: InfluenceProfile, density: float, seconds: float) -> tuple[dict[str, Plan], dict[str, str], dict[str, str]]:
    """Plans by name; names whose plan equals that of another name; and why others are left out.

    seconds: time limit of each solve.
    """
    table, ratios, heads = loss_table(profile), ratio_table(profile), profile.geometry.kv_heads
    makers: dict[str, Callable[[], Plan]] = {
        "uniform": lambda: uniform_plan(table.geometry, density, profile.lengths, sink_tokens=table.sink_tokens, min_span=table.min_span),
        "layers": partial(_solved, ratios, density, seconds, "layers", 1),
        "heads": partial(_solved, ratios, density, seconds, "heads"),
        ELASTIC: partial(_solved, table, density, seconds, ELASTIC),
        # A limit of as many rules as heads is no limit.
        **{f"rules-{n}": partial(_solved, table, density, seconds, f"rules-{n}", n) for n in MOST_RULES if n < heads},
        **{f"pool-{pool}": partial(_solved, loss_table(profile, pool=pool), density, seconds, f"pool-{pool}") for pool in POOLS},
        **{f"min-span-{n}": partial(_solved, loss_table(profile, min_span=n), density, seconds, f"min-span-{n}") for n in MIN_SPANS},
    }
    plans: dict[str, Plan] = {}
    same = {"pool-max": ELASTIC, f"min-span-{MIN_SPAN}": ELASTIC, **{f"rules-{n}": ELASTIC for n in MOST_RULES if n >= heads}}
    left_out: dict[str, str] = {}
    for name, make in makers.items():
        try:
            plan = make()
        except (InfeasibleError, NoPlanError) as error:
            left_out[name] = str(error)
            continue
        twin = next((other for other in plans if plans[other].identity() == plan.identity()), None)
        if twin is None or name in STEPS:
            plans[name] = plan
        else:
            same[name] = twin
    return plans, same if ELASTIC in plans else {}, left_out


def ratio_table(profile: InfluenceProfile) -> LossTable:
    """The default loss table with pure ratios of the input length alone: `0 + beta N`, and N itself.

    Losses are scaled with the floor in the table, as they are with the default grid, so that the goal is the same one.
    """
    ratios = (*(SpanRule(0.0, beta) for beta in RATIOS), DENSE)
    table = loss_table(profile, (SpanRule(float(MIN_SPAN), 0.0), *ratios))
    return replace(table, rules=ratios, losses=table.losses[..., 1:])


def step_pairs(plans: Mapping[str, Plan]) -> list[tuple[str, str]]:
    """Every solved step with the one before it."""
    solved = [name for name in STEPS if name in plans]
    return list(zip(solved[1:], solved, strict=False))


def variants(plans: Mapping[str, Plan]) -> list[str]:
    """Names of the plans to compare with the elastic one: none where that could not be solved."""
    return [name for name in plans if name not in STEPS] if ELASTIC in plans else []


def space_answer(found: Sequence[Gain], lengths: Sequence[int], same: Mapping[str, str], density: float) -> str:
    """What each step changed over all lengths, and which variants of the elastic plan differ from it."""
    steps = [one for one in overall(found, lengths) if one.plan in STEPS]
    others = [one for one in overall(found, lengths) if one.plan not in STEPS]
    if not steps:
        return f"At a density of {density:.0%} there were no two steps to compare."
    told = [
        f"{STEPS[name]}: {', '.join(_step(one) for one in steps if one.plan == name)}" for name in dict.fromkeys(one.plan for one in steps)
    ]
    sentences = [f"At {density:.0%} kept, each step against the one before it, over {listed(lengths)}: {'; '.join(told)}."]
    decided = [one for one in others if one.decided]
    quiet = [name for name in dict.fromkeys(one.plan for one in others) if name not in {one.plan for one in decided}]
    parts = [f"{one.plan} is {one.verdict} ({one.task} {one.numbers})" for one in decided]
    parts += [f"nothing is decided for {', '.join(quiet)}"] if quiet else []
    parts += [
        f"the same plan as {other}: {', '.join(name for name, twin in same.items() if twin == other)}"
        for other in dict.fromkeys(same.values())
    ]
    if parts:
        sentences.append(f"Against the elastic plan: {'; '.join(parts)}.")
    return " ".join(filter(None, [*sentences, unequal(one for one in found if one.plan in STEPS)]))


def _step(one: Gain) -> str:
    said = {"better": f"helps {one.task}", "worse": f"harms {one.task}"}.get(one.verdict, f"{one.verdict} for {one.task}")
    return f"{said} ({one.numbers})"


def _solved(table: LossTable, density: float, seconds: float, name: str, most_rules: int | None = None) -> Plan:
    answer = solve_milp(table, density, max_rules_per_layer=most_rules, time_limit_s=seconds)
    return table.plan(answer.choice, name, search={"origin": name, "gap": answer.gap, "status": answer.status})
