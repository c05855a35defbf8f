"""Plans of few whole heads over a floor: how many are enough, how many fit a density, and the loss when one is cut."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from moa_lab.calibration.samples import Sample
from moa_lab.evaluate.compare import difference, ratio, row_of
from moa_lab.geometry import ModelGeometry
from moa_lab.plan import DENSE, SINK_TOKENS, Plan, SpanRule, full_or_floor_plan
from moa_lab.records import LossTable, Measurement
from moa_lab.search import InfeasibleError, head_scores
from moa_lab.studies.gains import pooled

NEAR = 0.95
"""A plan that finds this share of the dense model's needles counts as equally good."""
COUNTED = (0, 1, 2, 3, 4, 6, 8)
COUNTED_PER_STEP = 22
"""A step is the number of heads divided by this: 4 of 90 heads."""

Head = tuple[int, int]
"""(layer, KV head)."""


@dataclass(frozen=True)
class Cliff:
    """The fewest whole heads over a floor that find as many needles as the dense model.

    enough: the first count that does at every length (None: none of those tried), its density at the shortest; short: the count before it.
    decided: whether the intervals confirm both.
    """

    floor: int
    enough: int | None
    short: int | None
    density: float
    decided: bool


def ranked_heads(table: LossTable) -> list[Head]:
    """Heads by the influence they lose at the floor, the largest first."""
    order = np.argsort(-head_scores(table, floor_tokens=table.min_span), kind="stable")
    return [(int(head) // table.geometry.kv_heads, int(head) % table.geometry.kv_heads) for head in order]


def counts(heads: int) -> list[int]:
    """Numbers of whole heads to try: none, then in steps that widen, up to about a third of them."""
    step = max(1, heads // COUNTED_PER_STEP)
    return [step * many for many in COUNTED if step * many <= heads]


def floored(geometry: ModelGeometry, whole: Iterable[Head], floor: int, sink: int, name: str) -> Plan:
    """The heads of `whole` keep everything, the others `floor` tokens, of which `sink` are the first ones."""
    return replace(full_or_floor_plan(geometry, whole, floor, name), sink_tokens=sink, min_span=floor, search={"origin": "ranked"})


def fitted(geometry: ModelGeometry, ranking: Sequence[Head], density: float, length: int, *, floor: int, sink: int, name: str) -> Plan:
    """As many heads of `ranking` whole as fit `density` at `length`. Raises InfeasibleError where the floor alone exceeds it."""
    best: Plan | None = None
    for count in range(len(ranking) + 1):
        plan = floored(geometry, ranking[:count], floor, sink, name)
        kept = plan.density(length)
        if kept > density + 1e-9:
            if best is None:
                raise InfeasibleError(f"density {density:.4g} at length {length} is infeasible: a floor of {floor} tokens takes {kept:.4g}")
            break
        best = plan
    assert best is not None
    return best


def find_cliff(
    geometry: ModelGeometry, ranking: Sequence[Head], floor: int, lengths: Sequence[int], dense: Sequence[Measurement], task: str,
    measure: Callable[[Plan], list[Measurement]],
) -> tuple[Cliff, list[Measurement]]:  # fmt: skip
    """Measure plans of more and more whole heads until one is as good as the dense rows; the cliff, and all rows measured."""
    rows: list[Measurement] = []
    before: tuple[int, bool] | None = None
    for count in counts(len(ranking)):
        plan = floored(geometry, ranking[:count], floor, SINK_TOKENS, f"whole-{count}-floor-{floor}")
        found = measure(plan)
        rows += found
        ratios = [ratio(row_of(found, plan.name, task, n), row_of(dense, "dense", task, n)) for n in lengths]
        if all(one.value >= NEAR for one in ratios):
            sure = all(one.low >= NEAR for one in ratios) and (before is None or before[1])
            return Cliff(floor, count, before[0] if before else None, plan.density(min(lengths)), sure), rows
        before = (count, any(one.high < NEAR for one in ratios))
    assert before is not None
    return Cliff(floor, None, before[0], plan.density(min(lengths)), before[1]), rows


def whole_of(plan: Plan) -> list[Head]:
    """The heads that keep everything."""
    return [(layer, head) for layer, row in enumerate(plan.rules) for head, rule in enumerate(row) if rule.keeps_everything]


def cut(plan: Plan, head: Head, floor: int) -> Plan:
    """The plan with one head at a floor."""
    rules = [list(row) for row in plan.rules]
    rules[head[0]][head[1]] = SpanRule(float(floor), 0.0)
    return replace(plan, rules=tuple(map(tuple, rules)))


def floor_of(plan: Plan) -> int:
    """The span of the heads that are not whole, in tokens; the least span of the plan where all are."""
    return min((int(rule.alpha) for row in plan.rules for rule in row if rule != DENSE), default=plan.min_span)


def cut_changes(plan: Plan, samples: Sequence[Sample], losses: Callable[[Plan, Sequence[Sample]], list[Measurement]]) -> list[Measurement]:
    """The change of the loss, in nats per answer token, when each whole head alone is cut to the floor of the others.

    losses: rows of cross-entropy by (task, length). One row per head ("layer 3 head 1"), paired over all samples.
    """
    here, rows = pooled(losses(plan, samples)), []
    for layer, head in whole_of(plan):
        without = pooled(losses(cut(plan, (layer, head), floor_of(plan)), samples))
        value, n, low, high = difference(without, here)
        detail = {"layer": layer, "kv_head": head, "per_sample": without.detail["per_sample"], "uncut": here.detail["per_sample"]}
        rows.append(Measurement(plan.name, "loss_change", f"layer {layer} head {head}", 0, value, n, low, high, here.density, detail))
    return rows


def whole_count(row: Measurement) -> int | None:
    """How many whole heads a plan of the cliff has, by its name; None for the dense model."""
    return None if row.plan == "dense" else int(row.plan.split("-")[1])


def floor_text(row: Measurement) -> str:
    """The floor of a plan of the cliff in words."""
    return "dense" if row.plan == "dense" else f"floor of {row.plan.split('-')[3]} tokens"
