"""SpanRule: how a span grows with the input length; and grids of rules, as cards and the authors' files write them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from moa_lab.geometry import MAX_TOKENS, ModelGeometry
from moa_lab.storage import HAND_CURE, RecordError, parse, read_plain

MIN_SPAN = 128
PUBLISHED_MULTIPLE = 64
"""The authors round spans up to so many tokens."""
GRIDS = ("alphas", "betas")
"""The fields of a card, or of one of the authors' files, that hold the rules: numbers, layers x heads."""

Grid = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, order=True)
class SpanRule:
    """How a span grows with the input length N: `clip(alpha + beta * N, min_span, N)` tokens (arXiv 2406.14909, eq. 2)."""

    alpha: float
    beta: float

    def __post_init__(self) -> None:
        for value in (self.alpha, self.beta):
            if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
                raise ValueError(f"alpha and beta must be finite numbers, got {self.alpha} and {self.beta}")
            # Within them, alpha + beta * N fits in 64 bits at every length.
            if abs(value) > MAX_TOKENS:
                raise ValueError(f"alpha and beta must lie within {MAX_TOKENS} tokens of 0, got {self.alpha:g} and {self.beta:g}")

    def span_tokens(self, n_tokens: int, min_span: int = MIN_SPAN, multiple: int = 1) -> int:
        """Span in tokens at length `n_tokens`: rounded down to a token, or up to `multiple` tokens when that is above 1."""
        return min(self.uncapped_tokens(n_tokens, min_span, multiple), n_tokens)

    def uncapped_tokens(self, n_tokens: int, min_span: int = MIN_SPAN, multiple: int = 1) -> int:
        """The same without the cap at N: what the rule still keeps when tokens are generated beyond N."""
        raw = self.alpha + self.beta * n_tokens
        # 1e-6: alpha + beta * N of a rule made from a ratio must not lose a token to binary fractions.
        tokens = math.floor(raw + 1e-6) if multiple == 1 else math.ceil(raw / multiple - 1e-9) * multiple
        return max(tokens, min_span)

    @property
    def keeps_everything(self) -> bool:
        """True when the span is N at every length N."""
        return self.beta >= 1 and self.alpha >= 0


DENSE = SpanRule(alpha=0.0, beta=1.0)

Rules = tuple[tuple[SpanRule, ...], ...]
"""`rules[layer][head]`."""


def is_published(data: object) -> bool:
    """Whether JSON data is a plan in the authors' format: two grids and no schema."""
    return isinstance(data, dict) and "schema" not in data and set(GRIDS) <= set(data)


def published_rules(path: str | Path) -> Rules:
    """The rules of one of the authors' files, layers x heads, whatever model it is for. Raises RecordError for another file."""
    form = 'expected JSON {"alphas": [[...]], "betas": [[...]]}'
    try:
        data = read_plain(path, "alphas and betas", HAND_CURE)
    except RecordError as error:
        raise RecordError(f"{path}: not a published plan; {form} ({error})") from error
    if not is_published(data):
        raise RecordError(f"{path}: not a published plan; {form}")
    return read_rules(data["alphas"], data["betas"], path)


def read_rules(alphas: Any, betas: Any, path: str | Path) -> Rules:
    """Rules of two grids in JSON data, layers x heads; `path` is named in the RecordError that all else raises."""
    needed = "alphas and betas must be two equal grids of numbers, layers x heads"
    try:
        read = [parse(Grid, grid, path) for grid in (alphas, betas)]
    except RecordError as error:
        raise RecordError(f"{path}: {needed} ({error})") from error
    shapes = [[len(row) for row in grid] for grid in read]
    if shapes[0] != shapes[1] or not sum(shapes[0]):
        raise RecordError(f"{path}: {needed}")
    return tuple(
        tuple(_rule(a, b, path, f"layer {layer}, head {head}") for head, (a, b) in enumerate(zip(row_a, row_b, strict=True)))
        for layer, (row_a, row_b) in enumerate(zip(*read, strict=True))
    )


def fitted(rules: Rules, geometry: ModelGeometry, path: str | Path) -> Rules:
    """Rules of query heads pooled to KV heads: of a group, the rule with the largest span at the maximum length; those of KV heads as
    they are. Raises RecordError, naming `path`, for another shape."""
    heads = {len(row) for row in rules}
    if len(rules) != geometry.layers or heads not in ({geometry.kv_heads}, {geometry.query_heads}):
        raise RecordError(f"{path}: plan has {len(rules)} layers of {sorted(heads)} heads; model has {geometry}")
    if heads == {geometry.kv_heads}:
        return rules

    def longest(group: tuple[SpanRule, ...]) -> SpanRule:
        return max(group, key=lambda rule: (rule.span_tokens(geometry.max_length), rule.beta))

    size = geometry.group_size
    return tuple(tuple(longest(row[start : start + size]) for start in range(0, len(row), size)) for row in rules)


def _rule(alpha: float, beta: float, path: str | Path, where: str) -> SpanRule:
    try:
        return SpanRule(alpha, beta)
    except ValueError as error:
        raise RecordError(f"{path}: {where}: {error}") from error
