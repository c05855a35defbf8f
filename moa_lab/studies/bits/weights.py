"""Open question 3 of the paper: does the influence that chooses spans also choose bit widths, of KV values and of weights?

Like that of a span, the influence of a bit width is first order: the gradient of the loss times the change by quantisation, summed
with signs inside a sample, absolute across samples. Widths are chosen by it under a byte budget and compared with one width everywhere.
Weights unpacked from 4-bit blocks of 32 (the embedded model, any .gguf) already lie on a 4-bit grid: quantising them again to 4 bits,
in groups of 64, costs less than it would for weights trained in 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from moa_lab.evaluate.compare import row_of
from moa_lab.models import is_gguf
from moa_lab.pipeline import Run
from moa_lab.plan import UNTOUCHED, Plan, dense_plan
from moa_lab.plan.bits import GRID_BYTES
from moa_lab.records import Measurement
from moa_lab.search import InfeasibleError
from moa_lab.studies.bits.effects import bit_effects
from moa_lab.studies.bits.quantise import WEIGHT_GROUP, linear_modules
from moa_lab.studies.bits.scores import Side, Variant, difference_rows, rank_rows, untouched, variant_rows
from moa_lab.studies.bits.widths import ERROR, FIRST_ORDER, PREDICTORS, Effects, kv_costs, weight_costs
from moa_lab.studies.plans import DOCUMENTS, NEEDLES, SUMMARIES, chosen_plans, record_of
from moa_lab.studies.record import StudyRecord
from moa_lab.studies.scale import Scale
from moa_lab.text import interval_text

KV_WIDTHS = (2, 3, 4, 6, 8, UNTOUCHED)
WEIGHT_WIDTHS = (2, 3, 4, 8)
BUDGETS = (4, 3)
"""Mixed widths get the bytes of these uniform widths."""
RANKED_AT = 4
"""Random widths get the bytes of this uniform width."""
EFFECT_TOKENS, PLAN_EFFECT_TOKENS, RANK_TOKENS = 131_072, 32_768, 32_768
"""Calibration tokens: for the dense model's effects, for those under a plan, and for every random choice that is measured."""
HALF, QUARTER = 0.5, 0.25
QUARTER_16 = "25% spans in 16 bits"
TASKS = (NEEDLES, DOCUMENTS, SUMMARIES)
NOUNS = {"kv": "KV values", "weights": "weights"}


class Pair(NamedTuple):
    """Two variants to compare, by name. label: their name in the answer, empty to leave them out."""

    plan: str
    against: str
    label: str = ""


def weights(run: Run, scale: Scale) -> StudyRecord:
    """Mixed bit widths against uniform ones of equal bytes, for KV values and weights; spans and bits together at equal KV bytes."""
    dense, samples = dense_plan(run.geometry), run.samples()
    kv_effects, weight_effects = bit_effects(
        run.model, samples.limited(EFFECT_TOKENS).samples, KV_WIDTHS, WEIGHT_WIDTHS, progress=_steps(run, "effects of bits")
    )
    sides = (kv_side(dense, run.lengths, kv_effects.paired()), weight_side(run, weight_effects))
    ranks, best = [], {}
    for side in sides:
        choices = side.random(RANKED_AT, max(3, scale.random_plans // 2), run.settings.seed)
        steps = _steps(run, f"random bits of {side.label}")
        ranks += rank_rows(run.model, side, choices, samples.limited(RANK_TOKENS).samples, PREDICTORS, steps)
        best[side.label] = best_predictor(ranks, side.label)

    variants, pairs = [Variant("dense", dense, untouched(dense))], []
    for side in (*sides, kv_side(dense, run.lengths, kv_effects, "kv, K and V apart")):
        for bits in BUDGETS:
            made, compared = mixed_and_uniform(side, bits, best[side.label.partition(",")[0]])
            variants += made
            pairs += compared
    with_spans, spans_pairs, left_out = spans_and_bits(run, kv_effects, best["kv"])
    # Some variants are in both comparisons.
    variants = list({variant.name: variant for variant in [*variants, *with_spans]}.values())

    rows = _measured(run, variants)
    differences = {pair: difference_rows(rows, pair.plan, pair.against) for pair in [*pairs, *spans_pairs]}
    return record_of(
        run, "weights", "Does influence also choose bit widths, of KV values and of weights, and are more spans in fewer bits better?",
        weights_answer(
            {pair: differences[pair] for pair in pairs}, {pair: differences[pair] for pair in spans_pairs}, ranks, best, left_out,
            unpacked=is_unpacked(run.settings.model),
        ),
        [*rows, *ranks, *(row for found in differences.values() for row in found)], left_out=left_out, predictors=best,
        kv_widths=KV_WIDTHS, weight_widths=WEIGHT_WIDTHS, ranked_at=RANKED_AT, effect_tokens=EFFECT_TOKENS,
        plan_effect_tokens=PLAN_EFFECT_TOKENS, rank_tokens=RANK_TOKENS, weight_group=WEIGHT_GROUP, group_bytes=GRID_BYTES,
        variants={variant.name: variant.told() for variant in variants},
    )  # fmt: skip


def kv_side(plan: Plan, lengths: Sequence[int], effects: Effects, label: str = "kv") -> Side:
    """Bit widths of the heads' KV values under `plan`, within bytes at each of `lengths`.

    The items of `effects` are heads (one width for K and V), or K and V apart.
    """
    shape = (plan.geometry.layers, plan.geometry.kv_heads, 2)
    items = effects.signed.shape[1]
    costs = kv_costs(plan, lengths, effects.widths)
    of_items = costs.reshape(len(costs), items, -1, costs.shape[-1]).sum(axis=2)

    def make(name: str, widths: np.ndarray) -> Variant:
        return Variant(name, plan, np.repeat(widths, np.prod(shape) // items).reshape(shape))

    return Side(label, effects, of_items, make)


def weight_side(run: Run, effects: Effects) -> Side:
    """Bit widths of the weights of the decoder's linear modules."""
    modules, plan = linear_modules(run.model), dense_plan(run.geometry)
    costs = weight_costs([(module.out_features, module.in_features) for module in modules.values()], effects.widths)

    def make(name: str, widths: np.ndarray) -> Variant:
        return Variant(name, plan, untouched(plan), dict(zip(modules, map(int, widths), strict=True)))

    return Side("weights", effects, costs, make)


def mixed_and_uniform(side: Side, bits: int, predictor: str) -> tuple[list[Variant], list[Pair]]:
    """Uniform `bits`, mixed widths of the same bytes by `predictor`, and by first order where that is another predictor."""
    label, _, how = side.label.partition(", ")
    uniform, mixed = f"{label} uniform {bits} bits", f"{label} mixed {bits} bits" + (f", {how}" if how else "")
    budgets = side.cost(side.uniform(bits))
    told = f"{NOUNS[label]} at {bits} bits" + (f" ({how})" if how else "")
    variants = [side.variant(uniform, side.uniform(bits)), side.variant(mixed, side.mixed(budgets, predictor))]
    pairs = [Pair(mixed, uniform, told)]
    if predictor != FIRST_ORDER and not how:
        name = f"{mixed}, {FIRST_ORDER}"
        variants.append(side.variant(name, side.mixed(budgets, FIRST_ORDER)))
        pairs.append(Pair(name, uniform))
    return variants, pairs


def best_predictor(ranks: Sequence[Measurement], label: str) -> str:
    """The gradient-based predictor that ranks best on calibration samples; of equals the first."""
    found = {row.plan: row.value for row in ranks if row.task == label and row.plan != ERROR}
    return max(found, key=found.__getitem__)


def weights_answer(
    pairs: Mapping[Pair, Sequence[Measurement]],
    spans_pairs: Mapping[Pair, Sequence[Measurement]],
    ranks: Sequence[Measurement],
    best: Mapping[str, str],
    left_out: Mapping[str, str],
    *,
    unpacked: bool = False,
) -> str:
    """Two sentences. pairs, spans_pairs: the differences of every comparison, one row per task (`difference_rows`)."""
    note = " (flattered: unpacked from 4-bit blocks)"
    by_outcome: dict[str, list[str]] = {}
    for pair, rows in pairs.items():
        if pair.label:
            label = pair.label + (note if unpacked and pair.against == "weights uniform 4 bits" else "")
            by_outcome.setdefault(outcome(rows), []).append(label)
    trusted = "; ".join(_correlation(ranks, label, predictor) for label, predictor in best.items())
    found = "; ".join(f"{verdict} for {_listed(labels)}" for verdict, labels in by_outcome.items())
    answer = f"Bit widths chosen by influence ({trusted}), against one width everywhere at equal bytes: {found}."
    if spans_pairs:
        against = next(iter(spans_pairs.values()))[0].detail["density_against"]
        clauses = [f"{pair.label} ({rows[0].density:.1%}): {outcome(rows)}" for pair, rows in spans_pairs.items()]
        answer += f" Against {QUARTER_16} ({against:.1%} of the dense KV bytes): {'; '.join(clauses)}."
    elif left_out:
        answer += f" Spans and bits together were not compared: {'; '.join(left_out.values())}."
    return answer


def outcome(rows: Sequence[Measurement]) -> str:
    """For instance "better on documents and summaries, not decided on needles": a difference is decided if its interval leaves out 0.

    A single sample has no interval and decides nothing.
    """
    groups: dict[str, list[str]] = {"better": [], "worse": [], "not decided": []}
    for row in rows:
        sign = 1 if row.metric.startswith("retrieval") else -1
        ends = sorted((sign * row.low, sign * row.high))
        groups["not decided" if row.n < 2 or ends[0] <= 0 <= ends[1] else "better" if ends[0] > 0 else "worse"].append(row.task)
    told = {verdict: tasks for verdict, tasks in groups.items() if tasks}
    if list(told) == ["not decided"]:
        return "not decided"
    return ", ".join(f"{verdict} on {_listed(tasks)}" for verdict, tasks in told.items())


def is_unpacked(model: str) -> bool:
    """Whether a model of this name comes from a GGUF file, whose weights have few bits before they are unpacked."""
    return is_gguf(model)


def _correlation(ranks: Sequence[Measurement], label: str, predictor: str) -> str:
    found, alone = (row_of(ranks, name, label, 0) for name in (predictor, ERROR))
    return (
        f"random ones of {NOUNS[label]}: rank correlation with the measured loss {found.value:.2f} "
        f"{interval_text(found.low, found.high, '.2f')} by {predictor}, {alone.value:.2f} by the error alone"
    )


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def spans_and_bits(run: Run, dense_effects: Effects, predictor: str) -> tuple[list[Variant], list[Pair], dict[str, str]]:
    """Variants with about the KV bytes of 25% spans in 16 bits (mixed bits never more, at any profiled length), and what is left out."""
    plans, left_out = chosen_plans(run, (HALF, QUARTER))
    if left_out:
        return [], [], left_out
    half, quarter, dense = plans[HALF], plans[QUARTER], dense_plan(run.geometry)
    samples = run.samples().limited(PLAN_EFFECT_TOKENS).samples
    half_effects, _ = bit_effects(run.model, samples, KV_WIDTHS, plan=half, progress=_steps(run, "effects of bits under a plan"))
    budgets = np.array([quarter.kv_bytes(length) for length in run.lengths])
    variants = [Variant(QUARTER_16, quarter, untouched(quarter))]
    pairs = []
    for share, bits, uniform, side in (
        ("50%", 8, "50% spans in 8 bits", kv_side(half, run.lengths, half_effects.paired())),
        ("100%", 4, "kv uniform 4 bits", kv_side(dense, run.lengths, dense_effects.paired())),
    ):
        variants.append(side.variant(uniform, side.uniform(bits)))
        pairs.append(Pair(uniform, QUARTER_16, f"{share} spans in {bits} bits"))
        mixed = f"{share} spans in mixed bits"
        try:
            variants.append(side.variant(mixed, side.mixed(budgets, predictor)))
        except InfeasibleError as error:
            left_out[mixed] = str(error)
        else:
            pairs.append(Pair(mixed, QUARTER_16, mixed))
    return variants, pairs, left_out


def _measured(run: Run, variants: Sequence[Variant]) -> list[Measurement]:
    sets = [found for length in run.lengths for found in run.suites.test(length, TASKS)]
    rows: list[Measurement] = []
    steps = _steps(run, "measure bits")
    for done, variant in enumerate(variants):
        steps(done, len(variants))
        rows += variant_rows(run.model, variant, sets)
    steps(len(variants), len(variants))
    return rows


def _steps(run: Run, stage: str) -> Callable[[int, int], None]:
    return lambda done, total: run.progress(stage, done, total)
