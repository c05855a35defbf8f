"""Fronts of several mixes of bits under one budget of bytes: each buys spans of its own, and measuring decides between them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

from moa_lab.plan import Bits, stored_plan, told_bits
from moa_lab.records import Front
from moa_lab.search.problem import InfeasibleError

logger = logging.getLogger(__name__)


def stored_front(front: Front, mix: Bits) -> Front:
    """The front with all plans stored in `mix`: densities count the bits, predicted losses do not know of the rounding."""
    points = []
    for point in front:
        plan = stored_plan(point.plan, mix)
        points.append(replace(point, plan=plan, density={n: plan.density(int(n)) for n in point.density}))
    return replace(front, points=tuple(points))


def over_mixes(make: Callable[[Bits], Front], mixes: Sequence[Bits]) -> Front:
    """The union of the fronts that `make` gives for every mix, stored so, with the settings of the first.

    Mixes whose heads at the floor alone exceed the budget are left out; raises the InfeasibleError of the last, which takes the fewest
    bytes, where all do.
    """
    fronts: list[Front] = []
    refused: InfeasibleError | None = None
    for mix in mixes:
        try:
            fronts.append(make(mix))
        except InfeasibleError as error:
            logger.info("no plans stored in %s bits: %s", told_bits(mix), error)
            refused = error
    if not fronts:
        assert refused is not None, "there is a mix"
        raise refused
    if len(mixes) == 1:
        return fronts[0]
    points = tuple(point for front in fronts for point in front)
    return replace(fronts[0], points=points, settings={**fronts[0].settings, "bits": [told_bits(mix) for mix in mixes]})
