"""The rules that a search may choose from: small grids of `clip(alpha + beta * N, min_span, N)`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product

import numpy as np

from moa_lab.plan import DENSE, MIN_SPAN, SpanRule

FLOORS = (16, 32, 48, 64, 96, 128, 192, 256, 320, 384, 448, 512, 640, 768, 1024, 1280, 1536, 2048, 3072)
RATIOS = tuple(step / 16 for step in range(1, 16))
MIXES = tuple(product((-1024, -512, -256, 256), (0.25, 0.5, 0.75, 1.0)))

PAPER_ALPHAS = tuple(float(alpha) for alpha in np.linspace(-2048, 8192, 6))
PAPER_BETAS = tuple(float(beta) for beta in np.linspace(0, 1, 9))


def rule_grid(
    lengths: Iterable[int],
    *,
    min_span: int = MIN_SPAN,
    alphas: Sequence[float] | None = None,
    betas: Sequence[float] | None = None,
) -> tuple[SpanRule, ...]:
    """Candidate rules for the given lengths (tokens), cheapest first.

    By default some 45 rules: constant spans, pure ratios and mixes of both; with `alphas` or `betas`, their product (the
    one left out is 0). The floor (`min_span` everywhere) and the dense rule are always in. Of rules with the same spans
    at every length and at twice the longest, the simplest stays. Raises ValueError for an empty or non-positive length.
    """
    if alphas is None and betas is None:
        candidates = [SpanRule(float(floor), 0.0) for floor in FLOORS]
        candidates += [SpanRule(0.0, ratio) for ratio in RATIOS]
        candidates += [SpanRule(float(alpha), beta) for alpha, beta in MIXES]
    else:
        pairs = product((0.0,) if alphas is None else alphas, (0.0,) if betas is None else betas)
        candidates = [SpanRule(float(alpha), float(beta)) for alpha, beta in pairs]
    return _distinct(candidates, lengths, min_span)


def paper_grid(lengths: Iterable[int], *, min_span: int = MIN_SPAN) -> tuple[SpanRule, ...]:
    """The paper's space (arXiv 2406.14909, sec. 4.2): 6 alphas in [-2048, 8192] x 9 betas in [0, 1], without duplicates."""
    return rule_grid(lengths, min_span=min_span, alphas=PAPER_ALPHAS, betas=PAPER_BETAS)


def _distinct(candidates: Iterable[SpanRule], lengths: Iterable[int], min_span: int) -> tuple[SpanRule, ...]:
    ordered = sorted(set(lengths))
    if not ordered or ordered[0] < 1:
        raise ValueError(f"lengths must name at least one length of at least 1 token, got {ordered}")
    at = (*ordered, 2 * ordered[-1])
    floor = SpanRule(float(min_span), 0.0)
    simplest: dict[tuple[int, ...], SpanRule] = {}
    # DENSE first, floor second: they stay even where another rule has the same spans at a very short length.
    for rule in (DENSE, floor, *sorted(set(candidates), key=_complexity)):
        simplest.setdefault(tuple(rule.span_tokens(n, min_span) for n in at), rule)
    return tuple(sorted(simplest.values(), key=lambda rule: (_cost(rule, at, min_span), _complexity(rule))))


def _complexity(rule: SpanRule) -> tuple[int, bool, float, float]:
    """Fewest terms first; then constants before ratios, small before large."""
    return (rule.alpha != 0) + (rule.beta != 0), rule.beta != 0, abs(rule.alpha), rule.beta


def _cost(rule: SpanRule, lengths: Iterable[int], min_span: int) -> float:
    return float(np.mean([rule.span_tokens(n, min_span) / n for n in lengths]))
