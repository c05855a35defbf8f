"""What the stages hand to one another: frozen dataclasses that save themselves and refuse files that are not theirs."""

from moa_lab.records.candidates import Candidate, candidates, kind_text
from moa_lab.records.front import FRONT_SCHEMA, Front, FrontPoint
from moa_lab.records.loss_table import FORMS, TABLE_SCHEMA, Form, LossTable, Objective
from moa_lab.records.measurements import ALLOCATED, EXACT, MEASUREMENTS_SCHEMA, Measurement, Measurements
from moa_lab.records.patterns import KINDS, LOCAL, MIXED, RETRIEVAL, SINK, UNKNOWN, Patterns, head_patterns
from moa_lab.records.profile import BLOCK_TOKENS, PROFILE_SCHEMA, ROUNDED_BITS, InfluenceProfile, ProfileKey

__all__ = [
    "ALLOCATED",
    "BLOCK_TOKENS",
    "EXACT",
    "FORMS",
    "FRONT_SCHEMA",
    "KINDS",
    "LOCAL",
    "MEASUREMENTS_SCHEMA",
    "MIXED",
    "PROFILE_SCHEMA",
    "RETRIEVAL",
    "ROUNDED_BITS",
    "SINK",
    "TABLE_SCHEMA",
    "UNKNOWN",
    "Candidate",
    "Form",
    "Front",
    "FrontPoint",
    "InfluenceProfile",
    "LossTable",
    "Measurement",
    "Measurements",
    "Objective",
    "Patterns",
    "ProfileKey",
    "candidates",
    "head_patterns",
    "kind_text",
]
