"""Fronts of several mixes of bits under one budget of bytes: each buys spans of its own, heads may differ in theirs, and measuring
decides between them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from moa_lab.plan import PER_HEAD, WHOLE_BITS, Bits, name_of_bits, stored_plan, told_bits
from moa_lab.records import Front, InfluenceProfile, LossTable
from moa_lab.search.front import plan_point
from moa_lab.search.goals import Goal
from moa_lab.search.losses import loss_table
from moa_lab.search.problem import InfeasibleError
from moa_lab.search.rounding import check_rounding, has_rounding

logger = logging.getLogger(__name__)


def stored_front(front: Front, mix: Bits) -> Front:
    """The front with all plans stored in `mix`: densities count the bits, predicted losses do not know of the rounding."""
    points = []
    for point in front:
        plan = stored_plan(point.plan, mix)
        points.append(replace(point, plan=plan, density={n: plan.density(int(n)) for n in point.density}))
    return replace(front, points=tuple(points))


def bits_table(profile: InfluenceProfile, table: LossTable, mixes: Sequence[Bits]) -> LossTable:
    """`table`, of 16 bits, for plans whose heads differ in bits: all rules in each of `mixes`, with what rounding loses where the profile
    knows it. The same table where there is one mix."""
    if len(mixes) == 1:
        return table
    if not has_rounding(profile):
        return table.in_mixes(mixes)
    return loss_table(profile, table.rules, min_span=table.min_span, use_lengths=table.lengths, mixes=mixes)


def check_one_say(table: LossTable, mixes: Sequence[Bits]) -> None:
    """Raise ValueError where a table that says in which bits heads may be stored is asked for others, in `mixes`."""
    if table.stored and tuple(mixes) != (WHOLE_BITS,):
        raise ValueError(f"bits: the table says in which heads may be stored, {', '.join(map(told_bits, table.mixes))}; leave bits out")


def knows_rounding(given: InfluenceProfile | LossTable, mixes: Sequence[Bits]) -> bool:
    """Whether heads may differ in bits: there are several mixes, and the profile knows what each costs a head. Warns where it does not."""
    if len(mixes) == 1 or isinstance(given, LossTable):
        return False
    try:
        check_rounding(given)
    except ValueError as error:
        logger.warning("one mix of bits holds for all heads of each plan: %s", error)
        return False
    return True


def named_front(front: Front, mixes: Sequence[Bits]) -> Front:
    """The front of a table of `mixes`, whose plans' names say in which bits they are, or that heads differ in these."""
    points = (replace(point, plan=point.plan.renamed(name_of_bits(point.plan.name, mixes))) for point in front)
    return replace(front, points=tuple(points))


def with_rounding(front: Front, table: LossTable, goals: Sequence[Goal]) -> Front:
    """The front with all that `table`, which knows losses of bits, predicts of its plans, so that those of all mixes compare."""
    points = (
        replace(point, predicted=plan_point(table, point.plan, origin=point.origin, lengths=(), goals=goals).predicted) for point in front
    )
    return replace(front, points=tuple(points))


def over_mixes(make: Callable[[Bits], Front], mixes: Sequence[Bits], per_head: Callable[[], Front] | None = None) -> Front:
    """The union of the fronts that `make` gives for every mix, stored so, and of that of `per_head`, with the settings of the first.

    Mixes whose heads at the floor alone exceed the budget are left out; raises the InfeasibleError of the last, which takes the fewest
    bytes, where all do.
    """
    fronts: list[Front] = []
    refused: InfeasibleError | None = None
    makers = {told_bits(mix): partial(make, mix) for mix in mixes} | ({} if per_head is None else {PER_HEAD: per_head})
    for bits, found in makers.items():
        try:
            fronts.append(found())
        except InfeasibleError as error:
            logger.info("no plans stored in %s bits: %s", bits, error)
            refused = error
    if not fronts:
        assert refused is not None, "there is a mix"
        raise refused
    if len(makers) == 1:
        return fronts[0]
    points = tuple(point for front in fronts for point in front)
    return replace(fronts[0], points=points, settings={**fronts[0].settings, "bits": list(makers)})
