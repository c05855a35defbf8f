"""Why a token was lost, in one sentence."""

from __future__ import annotations

import math

from transformers import PreTrainedTokenizerBase

from moa_lab.trace.answer import Answer
from moa_lab.trace.heads import LEAST_NATS, HeadShare, TokenTrace
from moa_lab.trace.pieces import label, piece, words

MATTERS = 0.1
"""Of what the head that matters most lost or would regain: with less, a head does not matter."""


def culprit(trace: TokenTrace) -> HeadShare | None:
    """The head whose source the plan hides and that would give the token most back; None where no head would."""
    return next((share for share in trace.shares if share.is_cut and share.regained >= LEAST_NATS), None)


def culprits(trace: TokenTrace) -> tuple[HeadShare, ...]:
    """All heads whose source the plan hides and to which that matters, `culprit` first: late heads hand on what earlier ones found, so one
    alone may bring nothing back.
    """
    first = culprit(trace)
    cut = [share for share in trace.shares if share.is_cut]
    most = max((max(share.lost, share.regained) for share in cut), default=0.0)
    rest = [share for share in cut if max(share.lost, share.regained) >= MATTERS * most and share != first]
    return (*(() if first is None else (first,)), *rest)


def carrier(trace: TokenTrace) -> HeadShare | None:
    """The head that brought most of the token from its far past, in the dense model; None where none brought anything."""
    share = max(trace.shares, key=lambda one: one.brought)
    return share if share.source >= 0 and share.brought >= LEAST_NATS else None


def named_head(trace: TokenTrace, answer: Answer, whole: Answer | None = None) -> HeadShare | None:
    """The head that `why` names: the culprit where the token was lost or became less likely, or else its carrier."""
    return culprit(trace) if not trace.plan.is_dense and (_is_lost(trace, answer, whole) or _fell(trace)) else carrier(trace)


def _is_lost(trace: TokenTrace, answer: Answer, whole: Answer | None) -> bool:
    said = whole is None or whole.likeliest[trace.index] == whole.wanted[trace.index]
    return bool(said and answer.likeliest[trace.index] != answer.wanted[trace.index])


def _fell(trace: TokenTrace) -> bool:
    return trace.dense.probability - trace.cut.probability >= 0.01 or trace.dense.log_odds - trace.cut.log_odds >= 0.1


def why(tokenizer: PreTrainedTokenizerBase, trace: TokenTrace, answer: Answer, whole: Answer | None = None) -> str:
    """What became of a token under the plan of `answer`, in words: the head that carried it, how far, and what span it has instead; or,
    where it is not lost, the head that brought most of it.

    whole: the dense model's answer; None: one that says the token. A token that the dense model would not say either is not lost.
    """
    named = f"“{label(piece(tokenizer, trace.case.tokens, trace.position))}”"
    dense, cut = trace.dense.probability, trace.cut.probability
    digits = 1 if _percent(dense) == _percent(cut) and dense != cut else 0
    change = f"{_percent(dense, digits)} in the dense model, {_percent(cut, digits)} under the plan"
    if trace.plan.is_dense:
        kept = f"Nothing is lost: the plan keeps every token in every head ({named} has {_percent(dense)})."
        return f"{kept}{_carried(tokenizer, trace)}"
    lost = _is_lost(trace, answer, whole)
    if not lost and not _fell(trace):
        return f"{named} is not lost: {change}.{_carried(tokenizer, trace)}"
    share = culprit(trace)
    begin = f"{named} was lost" if lost else f"{named} became less likely"
    if share is None:
        return f"{begin} ({change}), but no single head would bring it back: it was lost in many heads, or before the question was read."
    return f"{begin} ({change}) because {_because(tokenizer, trace, share)}."


def _carried(tokenizer: PreTrainedTokenizerBase, trace: TokenTrace) -> str:
    share = carrier(trace)
    if share is None:
        return ""
    text = words(tokenizer, trace.case.tokens, share.source)
    sees = "hides it from that head" if share.is_cut else "lets that head see it"
    return (
        f" Layer {share.layer}, KV head {share.kv_head} brought most of it: it read it {share.distance:,} tokens back (“{text}”), "
        f"and the plan {sees}, with a span of {share.span:,} tokens."
    )


def _because(tokenizer: PreTrainedTokenizerBase, trace: TokenTrace, share: HeadShare) -> str:
    after = 1 / (1 + math.exp(-(trace.cut.log_odds + share.regained)))
    text = words(tokenizer, trace.case.tokens, share.source)
    return (
        f"layer {share.layer}, KV head {share.kv_head} read it {share.distance:,} tokens back (“{text}”) "
        f"and keeps a span of {share.span:,} tokens, which ends {share.misses:,} tokens short of it; "
        f"seeing all, that head alone should bring it to about {_percent(after)}"
    )


def _percent(share: float, digits: int = 0) -> str:
    return "under 1%" if share < 0.01 else "over 99%" if 0.99 < share < 1 else f"{share:.{digits}%}"
