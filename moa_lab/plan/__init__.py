"""Plans: a rule for every KV head, the config card that holds them, and the plans that need no profile."""

from moa_lab.plan.bits import UNTOUCHED, WIDTHS, Bits
from moa_lab.plan.card import BITS_FIELDS, PLAN_SCHEMA, PLAN_WITH_BITS_SCHEMA, SINK_TOKENS, Plan
from moa_lab.plan.edits import with_span
from moa_lab.plan.given import PlanOrPath, as_plan, check_names, named_apart
from moa_lab.plan.mixes import (
    PER_HEAD,
    WHOLE_BITS,
    bits_of,
    mix_of,
    mixed_name,
    mixes_of,
    name_of_bits,
    read_mix,
    read_mixes,
    share_bought,
    stored_plan,
    token_price,
    tokens_bought,
    told_bits,
    told_mixes,
)
from moa_lab.plan.rules import DENSE, MIN_SPAN, SpanRule
from moa_lab.plan.simple import EQUAL_BYTES, check_density, dense_plan, full_or_floor_plan, uniform_plan

__all__ = [
    "BITS_FIELDS",
    "DENSE",
    "EQUAL_BYTES",
    "MIN_SPAN",
    "PER_HEAD",
    "PLAN_SCHEMA",
    "PLAN_WITH_BITS_SCHEMA",
    "SINK_TOKENS",
    "UNTOUCHED",
    "WHOLE_BITS",
    "WIDTHS",
    "Bits",
    "Plan",
    "PlanOrPath",
    "SpanRule",
    "as_plan",
    "bits_of",
    "check_density",
    "check_names",
    "dense_plan",
    "full_or_floor_plan",
    "mix_of",
    "mixed_name",
    "mixes_of",
    "name_of_bits",
    "named_apart",
    "read_mix",
    "read_mixes",
    "share_bought",
    "stored_plan",
    "token_price",
    "tokens_bought",
    "told_bits",
    "told_mixes",
    "uniform_plan",
    "with_span",
]
