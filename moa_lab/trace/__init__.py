"""Tracing an answer: each token dense against plan, the heads that brought it and from where, and why it was lost."""

from moa_lab.trace.answer import Answer, answer, say
from moa_lab.trace.case import Case
from moa_lab.trace.cases import Lost, drawn_cases, first_lost, prompt_case, sample_cases
from moa_lab.trace.heads import HeadShare, TokenTrace, Tracer
from moa_lab.trace.pieces import folded, label, piece
from moa_lab.trace.why import MATTERS, carrier, culprit, culprits, named_head, why

__all__ = [
    "MATTERS",
    "Answer",
    "Case",
    "HeadShare",
    "Lost",
    "TokenTrace",
    "Tracer",
    "answer",
    "carrier",
    "culprit",
    "culprits",
    "drawn_cases",
    "first_lost",
    "folded",
    "label",
    "named_head",
    "piece",
    "prompt_case",
    "sample_cases",
    "say",
    "why",
]
