"""Refine a plan: change the rules, and the bits, of a few heads at a time, by their measured effect under the plan.

A profile of the dense model gives the effect of a head while all others are whole; under a plan, the heads that are left matter more. So
every round measures the heads under the plan itself, one at a time; solves for the best plans that differ in a few heads, assuming
that effects add up; measures those; and continues from the best (a trust region: Conn, Gould and Toint, 2000). One profile under the
plan would be cheaper, but led to no better plan of SmolLM2-135M at 2k and 4k tokens; `learning` takes slopes under many plans.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moa_lab import processes
from moa_lab.calibration.samples import SampleSet
from moa_lab.engines import Engine, check_stored, engine_of, fits, meets
from moa_lab.evaluate.effects import HeadEffects, MeasuredLosses, head_effects
from moa_lab.geometry.wrappers import plain_model
from moa_lab.plan import EQUAL_BYTES, Plan, PlanOrPath, as_plan, mixes_of, name_of_bits
from moa_lab.profiling.inputs import check_inputs
from moa_lab.records import Front, FrontPoint, LossTable, Objective, ProfileKey
from moa_lab.search.budget import BudgetSolver
from moa_lab.search.front import DENSITY, point, spent_point
from moa_lab.search.goals import Goal, default_goals
from moa_lab.search.holding import held_table, over_heads, told_front
from moa_lab.search.milp import solve_milp
from moa_lab.search.problem import Density, feasible, rules_in_a_layer

logger = logging.getLogger(__name__)

MOVES = (1, 2, 3, 4, 6, 8, 12, 16)
"""Numbers of heads that a step may move: one plan is solved and measured for each."""
BISECTIONS = 24

Progress = Callable[[int, int], None]
"""Called with (hundredths of rounds done, hundredths in all)."""


def refine(
    model: PreTrainedModel,
    plan: PlanOrPath,
    samples: SampleSet,
    table: LossTable,
    density: Density,
    *,
    rounds: int = 3,
    heads: int | None = None,
    moves: Sequence[int] = MOVES,
    max_rules_per_layer: int | None = None,
    engine: Engine | None = None,
    parts_dir: str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    any_model: bool = False,
    progress: Progress | None = None,
) -> Front:
    """The plan of every round that lowers the loss on `samples`, at most `rounds` of them; empty when none does.

    The loss is the mean over (task, length) of nats per answer token, as in validation. A round measures `heads` heads (None: all)
    and takes steps until none lowers the loss. samples: calibration samples; validation must choose among the start and the points,
    since these were chosen by `samples`. table: the rules to choose from; it also predicts which heads to measure and the points'
    losses. Of a table of several mixes of bits (see `loss_table`) heads may also move to other bits, for which the plan pays in bytes; with
    one of 16 bits alone they may move to those that the plan has. `density`, its lengths and `engine` are as in `search`; where the engine
    limits the windows of a model, plans keep to those of the start, and where it cuts whole layers, their heads move together. parts_dir
    stores measurements, so that the same call resumes after a kill. tokenizer, any_model: as in `profile`, of samples and table. Raises
    ValueError for samples or a table of another model, a plan of another geometry, of bits that the table lacks, or one that the engine
    does not hold or that keeps more than the density, and InfeasibleError as `search` does.
    """
    model = plain_model(model)
    plan = as_plan(plan)
    if rounds < 1 or not moves or min(moves) < 1 or (heads is not None and heads < 1):
        raise ValueError(f"rounds, heads and moves must be at least 1, got rounds {rounds}, heads {heads}, moves {tuple(moves)}")
    check_inputs(model, samples, table, tokenizer, any_model=any_model)
    plan.check_model(table.geometry)
    if (plan.sink_tokens, plan.min_span, plan.span_multiple) != (table.sink_tokens, table.min_span, 1):
        raise ValueError(
            f"plan {plan.name!r} has sink {plan.sink_tokens}, floor {plan.min_span} and spans in {plan.span_multiple}s, the table "
            f"{table.sink_tokens}, {table.min_span} and 1s: make the table with the plan's min_span"
        )
    if plan.bits and not table.stored:
        table = table.in_mixes(mixes_of(plan))
    # A plan whose leftover budget was spent has rules of its own.
    rules = dict.fromkeys(rule for row in plan.rules for rule in row)
    table = table.with_plans(plan).with_rules(rules)
    if limits := None if engine is None else engine_of(engine):
        for mix in table.mixes:
            check_stored(limits, mix)
        held = [at for at, (rule, _) in enumerate(table.choices) if limits.windows_per_model is None or rule in rules]
        table = replace(table.only(held), engine=limits)
        apart = limits.cuts_layers and any(len(set(row)) > 1 for row in plan.bits)
        if apart or not all(fits(plan, limits, n) for n in table.lengths):
            raise ValueError(f"engine {limits.name} does not hold plan {plan.name!r} as it is ({limits.told()}): search for it first")
    targets = feasible(table, density, max_rules_per_layer)
    _check_start(plan, targets)
    neighbours = _Neighbours(table, targets, max_rules_per_layer)
    choice = table.choice(plan)
    measured = MeasuredLosses(model, samples, parts_dir)

    def loss_of(candidate: np.ndarray) -> float:
        return float(np.mean(list(measured(table.plan(candidate, "near")).values())))

    def told(number: int) -> Progress | None:
        return (lambda done, total: progress(100 * (number - 1) + 100 * done // max(total, 1), 100 * rounds)) if progress else None

    loss = loss_of(choice)
    found: list[FrontPoint] = []
    for number in range(1, rounds + 1):
        chosen = _worth_measuring(table, choice, heads)
        change = _rule_changes(table, choice, head_effects(measured, table, choice, chosen, progress=told(number)))
        before, steps = choice, 0
        still = np.ones(choice.shape, dtype=bool)
        still[tuple(np.array(chosen).T)] = False
        while True:
            # The measured effect of a moved head no longer holds: it stays until it is measured again.
            near_by = processes.from_first(partial(neighbours.of, choice, change, moves, still))
            tried = [(loss_of(near), near) for near in near_by]
            best, near = min(tried, key=lambda pair: pair[0], default=(loss, choice))
            logger.info("refinement round %d: loss %.4f, best of %d neighbours %.4f", number, loss, len(tried), best)
            if best >= loss:
                break
            still |= near != choice
            loss, choice, steps = best, near, steps + 1
        if not steps:
            break
        search = {
            "start": plan.name,
            "round": number,
            "steps": steps,
            "moved_heads": int((before != choice).sum()),
            "calibration_loss": loss,
        }
        goals = default_goals(table)
        better = point(
            table,
            choice,
            name=name_of_bits(f"refined-{number}", table.mixes),
            origin="refined",
            lengths=targets,
            goals=goals,
            search=search,
        )
        found.append(spent_point(table, better, targets, goals))
    if progress:
        progress(100 * rounds, 100 * rounds)
    names = (*(objective.name for objective in table.objectives), DENSITY)
    settings = {
        "solver": "refine",
        "start": plan.name,
        "rounds": rounds,
        "heads": heads,
        "moves": list(moves),
        "density": {str(n): d for n, d in targets.items()},
    }
    front = Front(tuple(found), names, settings, table.provenance)
    if limits is None:
        return front
    return told_front(replace(front, points=tuple(one for one in front if meets(one.plan, limits, targets))), limits)


def _worth_measuring(table: LossTable, choice: np.ndarray, heads: int | None) -> list[tuple[int, int]]:
    """At most `heads` heads by predicted loss per token, or byte: half that gain most when made whole, half that lose least when cut."""
    every = [(int(layer), int(head)) for layer, head in np.ndindex(choice.shape)]
    if heads is None or heads >= len(every):
        return every
    spans = (np.stack([table.span_tokens(length) for length in table.lengths]).mean(axis=0) * table.token_cost)[:, None, :]
    lost = table.losses.mean(axis=0)
    held, now = (_chosen(of, choice)[..., 0] for of in (spans, lost))
    gain = (now - lost.min(axis=2)) / np.maximum(spans.max(axis=2) - held, 1)
    cost = np.where(held > spans.min(axis=2), (lost.max(axis=2) - now) / np.maximum(held - spans.min(axis=2), 1), np.inf)
    first = [every[index] for index in np.argsort(-gain, axis=None, kind="stable")]
    second = [every[index] for index in np.argsort(cost, axis=None, kind="stable")]
    return list(dict.fromkeys(head for pair in zip(first, second, strict=True) for head in pair))[:heads]


def _rule_changes(table: LossTable, choice: np.ndarray, effects: Mapping[ProfileKey, HeadEffects]) -> np.ndarray:
    """Loss change of every rule, (layers, kv_heads, rules): linear in tokens between a head's own, shortest and longest span, and what
    its bits change beside that.

    Linear, since a fact may lie at any distance: half the tokens hold half the facts.
    """
    changes = []
    place = [table.mixes.index(mix) for _, mix in table.choices]
    for (_, length), found in effects.items():
        cut, whole = found.spans
        spans = table.span_tokens(length)[:, None, :].astype(np.float64)
        held = _chosen(spans, choice)
        fewest, most = spans.min(axis=2, keepdims=True), spans.max(axis=2, keepdims=True)
        down = cut[..., None] * (held - spans) / np.maximum(held - fewest, 1)
        up = whole[..., None] * (spans - held) / np.maximum(most - held, 1)
        changes.append(np.where(spans < held, down, up) + np.moveaxis(found.bits, 0, -1)[..., place])
    return np.asarray(np.mean(changes, axis=0))


def _chosen(values: np.ndarray, choice: np.ndarray) -> np.ndarray:
    """`values` (layers, kv_heads or 1, rules) of the chosen rules: (layers, kv_heads, 1)."""
    return np.take_along_axis(np.broadcast_to(values, (*choice.shape, values.shape[2])), choice[:, :, None], axis=2)


def _check_start(plan: Plan, targets: Mapping[int, float]) -> None:
    # What it would have to give up to keep the density costs more than a few heads can better.
    for n, asked in targets.items():
        if plan.density(n) > asked * (1 + EQUAL_BYTES):
            raise ValueError(
                f"plan {plan.name!r} keeps {plan.density(n):.1%} at {n} tokens, more than the density {asked:.4g}: raise density, or "
                "search for a plan that keeps it first"
            )


class _Neighbours:
    """Plans near a choice that keep the density limits."""

    def __init__(self, table: LossTable, targets: dict[int, float], max_rules: int | None) -> None:
        self._table, self._targets, self._max_rules = table, targets, max_rules

    def of(self, choice: np.ndarray, change: np.ndarray, moves: Sequence[int], still: np.ndarray) -> list[np.ndarray]:
        """For each number in `moves` the best choice that differs from `choice` in at most so many heads, none twice.

        change: (layers, kv_heads, rules), the loss change of every rule. still: bool (layers, kv_heads), heads that do not move. A
        penalty per moved head (`toll`) is bisected until few enough move; where none would, the plan that moves the fewest is taken.
        """
        pinned = {(int(layer), int(head)): int(choice[layer, head]) for layer, head in np.argwhere(still)}
        highest = float(np.abs(change).max())
        # Cached: all bisections start with the same tolls.
        solved_at = cache(lambda toll: self._solved(change, choice, toll, pinned))
        found: dict[bytes, np.ndarray] = {}
        for most in moves:
            low, high = 0.0, highest
            fewest = within = None
            for _ in range(BISECTIONS):
                toll = (low + high) / 2
                solved = solved_at(toll)
                moved = int((solved != choice).sum())
                if moved > most:
                    low, fewest = toll, solved
                    continue
                high = toll
                within = solved if moved else within
                if moved == most:
                    break
            near = fewest if within is None else within
            if near is not None:
                found.setdefault(near.tobytes(), near)
        return list(found.values())

    def _solved(self, change: np.ndarray, choice: np.ndarray, toll: float, pinned: dict[tuple[int, int], int]) -> np.ndarray:
        costs = change + toll
        np.put_along_axis(costs, choice[:, :, None], 0.0, axis=2)
        objective = Objective("refined", self._table.lengths[-1], "sum", (0, 1))
        # Subtracting a head's least cost changes no choice and makes losses start at 0.
        table = replace(self._table, objectives=(objective,), losses=(costs - costs.min(axis=2, keepdims=True))[None])
        goal = Goal("refined", {objective.name: 1.0})
        table, heads = held_table(table, table.engine), table.geometry.kv_heads
        if table.geometry.kv_heads < heads:
            pinned = {(layer, 0): rule for (layer, _), rule in pinned.items()}
        most = rules_in_a_layer(table, self._max_rules)
        if most is None:
            return over_heads(BudgetSolver(table, goal, self._targets).solve(self._targets, pinned).choice, heads)
        return over_heads(solve_milp(table, self._targets, goal=goal, max_rules_per_layer=most, pinned=pinned).choice, heads)
