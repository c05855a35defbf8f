"""Mixes: one pair of bits for the K and V of all heads; fewer bits hold more tokens in the same bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from moa_lab.geometry import ModelGeometry
from moa_lab.plan.bits import UNTOUCHED, WIDTHS, Bits, vector_bytes
from moa_lab.plan.card import Plan

WHOLE_BITS: Bits = (UNTOUCHED, UNTOUCHED)

PER_HEAD = "per-head"
"""What the name of a plan ends with, behind an @, whose bits were chosen head by head."""


def read_mixes(bits: int | str) -> tuple[Bits, ...]:
    """Bits of K and V from `16`, `8`, `8+4` (K in 8, V in 4), `4`, or several with commas between them, each once, the most first.

    What comes last takes the fewest bytes.

    Raises ValueError for anything else.
    """
    found: set[Bits] = set()
    for part in str(bits).split(","):
        numbers = part.strip().split("+")
        if len(numbers) > 2 or not all(number.isdecimal() and int(number) in WIDTHS for number in numbers):
            raise ValueError(f"bits must be 16, 8, 4 or two of them for keys and values such as 8+4, or several with commas, got {bits!r}")
        found.add((int(numbers[0]), int(numbers[-1])))
    return tuple(sorted(found, key=lambda mix: (sum(mix), mix), reverse=True))


def read_mix(bits: int | str) -> Bits:
    """The one mix that `bits` names, as for `read_mixes`. Raises ValueError for several."""
    mix, *others = read_mixes(bits)
    if others:
        raise ValueError(f"one mix of bits holds here for all keys and values, got {bits!r}: ask for one after the other")
    return mix


def told_bits(mix: Bits) -> str:
    """As `read_mixes` reads it."""
    return f"{mix[0]}" if mix[0] == mix[1] else f"{mix[0]}+{mix[1]}"


def mixed_name(name: str, mix: Bits) -> str:
    """What a plan of that name is called where it is stored in `mix`."""
    return name if mix == WHOLE_BITS else f"{name}@{told_bits(mix)}"


def name_of_bits(name: str, mixes: Sequence[Bits]) -> str:
    """What a plan of that name is called whose heads are stored in any of `mixes`: as in `mixed_name` where there is one."""
    return mixed_name(name, mixes[0]) if len(mixes) == 1 else f"{name}@{PER_HEAD}"


def tokens_bought(targets: Mapping[int, float], mix: Bits, geometry: ModelGeometry) -> dict[int, float]:
    """The share of the tokens, by length, that the share `targets` of the bytes of a 16-bit cache holds in `mix`; at most all of them."""
    return {n: share_bought(share, mix, geometry) for n, share in targets.items()}


def share_bought(share: float, mix: Bits, geometry: ModelGeometry) -> float:
    """`tokens_bought` of one share."""
    return min(1.0, share / token_price(mix, geometry.head_dim))


def token_price(mix: Bits, head_dim: int) -> float:
    """The bytes of a token stored in `mix` as a share of those in 16 bits."""
    return sum(vector_bytes(head_dim, width) for width in mix) / (2 * vector_bytes(head_dim, UNTOUCHED))


def mixes_of(plan: Plan) -> dict[Bits, float]:
    """The share of the plan's heads that is stored in each mix, the most frequent first."""
    heads = Counter((k, v) for row in plan.widths().tolist() for k, v in row)
    return {mix: count / heads.total() for mix, count in heads.most_common()}


def bits_of(plan: Plan) -> str:
    """The bits of all heads, as `told_bits` has them; `PER_HEAD` where heads differ."""
    mix, *others = mixes_of(plan)
    return PER_HEAD if others else told_bits(mix)


def told_mixes(plan: Plan) -> str:
    """For instance `8 bits`, or `8 bits for 61% of heads, 8+4 for 39%`."""
    (first, share), *others = mixes_of(plan).items()
    if not others:
        return f"{told_bits(first)} bits"
    return ", ".join([f"{told_bits(first)} bits for {share:.0%} of heads", *(f"{told_bits(mix)} for {part:.0%}" for mix, part in others)])


def mix_of(plan: Plan) -> Bits:
    """The bits that all heads of the plan share. Raises ValueError where heads differ."""
    mix, *others = sorted(mixes_of(plan))
    if others:
        raise ValueError(f"all heads must be stored in one mix of bits, plan {plan.name!r} has {', '.join(map(told_bits, (mix, *others)))}")
    return mix


def stored_plan(plan: Plan, mix: Bits) -> Plan:
    """The plan with all heads stored in `mix`, under the name of `mixed_name`."""
    return plan if mix == WHOLE_BITS else plan.with_bits(np.array(mix), mixed_name(plan.name, mix))
