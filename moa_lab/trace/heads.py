"""Which heads brought a token of an answer, from where, and which of them a plan cuts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedModel

from moa_lab.geometry.wrappers import plain_model
from moa_lab.models import geometry_of
from moa_lab.plan import Plan
from moa_lab.profiling.token import Prefix, TokenInfluence, prefix_of, token_influence
from moa_lab.trace.answer import Progress, within
from moa_lab.trace.case import Case

QUESTION_TOKENS = 64
"""Tokens before the answer whose queries count as well: most of them ask the question."""
NEAR_TOKENS = 64
"""Tokens back that count as near, beside the sink: no plan with the usual floor cuts them."""
REAL_SOURCE = 0.2
"""A source counts where it brought at least this share of what the head's largest one did."""
LEAST_NATS = 0.01
"""What counts as something lost or regained."""


@dataclass(frozen=True)
class HeadShare:
    """What one KV head has to do with a token.

    brought: nats of log-odds that the token owes to what the head read beyond the nearest tokens and the sink, in the dense model; lost:
    those that it owes to what the plan hides from the head; regained: what it would get back under the plan if this head saw everything.
    All to first order, in the rows of `TokenTrace`. source: the position that brought most (of those that the plan hides, where it hides
    any; -1: none). distance: tokens from the query that read it back to the source. span: tokens that the head keeps; misses: by
    how many tokens its window ends short of the source, 0 where it is seen. room: the span that shows it all its sources to the
    answer's end, 0 where it sees them.
    """

    layer: int
    kv_head: int
    brought: float
    lost: float
    regained: float
    source: int
    distance: int
    span: int
    misses: int
    room: int

    @property
    def is_cut(self) -> bool:
        """Whether the plan hides a source from the head."""
        return self.misses > 0


@dataclass(frozen=True, eq=False)
class TokenTrace:
    """One token of a case's answer: `dense` and `cut`, its influences in the dense model and under the plan (`dense` twice where the plan
    keeps everything), and `shares`, all heads, first those that would give most back or, where nothing is cut, brought most.
    """

    case: Case
    plan: Plan
    index: int
    dense: TokenInfluence
    cut: TokenInfluence
    shares: tuple[HeadShare, ...]

    @property
    def position(self) -> int:
        """Of the token."""
        return self.dense.position

    def share(self, layer: int, kv_head: int) -> HeadShare:
        """The share of a head. Raises ValueError for an unknown one."""
        for share in self.shares:
            if (share.layer, share.kv_head) == (layer, kv_head):
                return share
        raise ValueError(f"there is no layer {layer}, KV head {kv_head}")

    def window_start(self, layer: int, kv_head: int) -> int:
        """The first position within the head's window when the token is said."""
        window = int(self.plan.windows(self.case.n_tokens)[layer, kv_head])
        own = self.plan.geometry.layer_windows[layer]
        return max(0, self.position - (window if own is None else min(window, own)))

    def sources(self, layer: int, kv_head: int) -> dict[int, float]:
        """Positions beyond the sink that the head read in the dense model, with what each brought in nats, largest first: the largest of
        all, and the largest of those that it misses under the plan.
        """
        read = _beyond_sink(self.dense, layer, kv_head, self.plan.sink_tokens)
        window = int(self.plan.windows(self.case.n_tokens)[layer, kv_head])
        missed = _real([one for one in read if one.distance >= window]) if self.share(layer, kv_head).is_cut else []
        shown = sorted({*_real(read), *missed}, key=lambda one: -one.brought)
        return {one.source: one.brought for one in shown}


class Tracer:
    """Traces the tokens of one case. What comes before the traced rows is run once in the dense model, and once for the latest plan."""

    def __init__(self, model: PreTrainedModel, case: Case) -> None:
        self.model, self.case = plain_model(model), case
        self._prefixes: dict[str, Prefix] = {}

    def token(self, index: int, plan: Plan, progress: Progress | None = None) -> TokenTrace:
        """Trace token `index` of the answer. Raises ValueError for one that it does not have, and a plan of another geometry."""
        case, geometry = self.case, geometry_of(self.model)
        if not 0 <= index < len(case.answer):
            raise ValueError(f"the answer has tokens 0 to {len(case.answer) - 1}, got {index}")
        plan.check_model(geometry)
        tokens = case.tokens[: case.start + index + 1]
        near = np.full((geometry.layers, geometry.kv_heads), min(NEAR_TOKENS, max(1, len(tokens) // 4)))
        cuts = [near, plan.windows(case.n_tokens)]
        passes = 1 if plan.is_dense else 2
        dense = token_influence(self.model, tokens, self._prefix(None, within(progress, 0, passes)), cuts, plan.sink_tokens)
        cut = dense
        if not plan.is_dense:
            cut = token_influence(self.model, tokens, self._prefix(plan, within(progress, 1, passes)), cuts, plan.sink_tokens)
        shares = _shares(case, plan, dense, cut)
        order = sorted(shares, key=lambda share: -max(share.regained, 0.0) if not plan.is_dense else -share.brought)
        return TokenTrace(case, plan, index, dense, cut, tuple(order))

    def _prefix(self, plan: Plan | None, progress: Progress | None) -> Prefix:
        name = "dense" if plan is None else plan.identity()
        if name not in self._prefixes:
            first = max(0, self.case.start - QUESTION_TOKENS)
            made = prefix_of(self.model, self.case.tokens[:first], self.case.n_tokens, plan, progress)
            # K and V of a long prompt are large: those of the plan before are dropped.
            kept = {key: prefix for key, prefix in self._prefixes.items() if key == "dense"}
            self._prefixes = {**kept, name: made}
        return self._prefixes[name]


def _shares(case: Case, plan: Plan, dense: TokenInfluence, cut: TokenInfluence) -> list[HeadShare]:
    windows, spans = plan.windows(case.n_tokens), plan.spans(case.n_tokens)
    shares = []
    for layer, kv_head in np.ndindex(*spans.shape):
        read = _beyond_sink(dense, layer, kv_head, plan.sink_tokens)
        lost, regained = float(dense.cuts[1, layer, kv_head]), float(cut.cuts[1, layer, kv_head])
        window = int(windows[layer, kv_head])
        # Every head reads a trace of something that its window hides: it counts where the loss does.
        hidden = _real([one for one in read if one.distance >= window]) if max(lost, regained) >= LEAST_NATS else []
        far = hidden or _real([one for one in read if NEAR_TOKENS <= one.distance < window])
        shares.append(
            HeadShare(
                layer=layer,
                kv_head=kv_head,
                brought=float(dense.cuts[0, layer, kv_head]),
                lost=lost,
                regained=regained,
                source=far[0].source if far else -1,
                distance=far[0].distance if far else 0,
                span=int(spans[layer, kv_head]),
                misses=hidden[0].distance - window + 1 if hidden else 0,
                room=_room(case, plan.sink_tokens, hidden),
            )
        )
    return shares


@dataclass(frozen=True)
class _Read:
    """A position, what it brought, and how far back it lay from the query that took most of it."""

    source: int
    brought: float
    distance: int


def _read(found: TokenInfluence, layer: int, kv_head: int) -> list[_Read]:
    """What a head read, the largest first."""
    columns = (found.sources[layer, kv_head], found.brought[layer, kv_head], found.readers[layer, kv_head])
    return [_Read(int(j), float(value), int(i - j)) for j, value, i in zip(*columns, strict=True) if j >= 0]


def _beyond_sink(found: TokenInfluence, layer: int, kv_head: int, sink_tokens: int) -> list[_Read]:
    """The same without the sink, which no plan hides."""
    return [one for one in _read(found, layer, kv_head) if one.source >= sink_tokens]


def _real(read: list[_Read]) -> list[_Read]:
    """The sources that count, of `read`, the largest first."""
    return [one for one in read if one.brought >= REAL_SOURCE * read[0].brought]


def _room(case: Case, sink_tokens: int, hidden: list[_Read]) -> int:
    earliest = min((one.source for one in hidden), default=None)
    return 0 if earliest is None else min(case.n_tokens - earliest + sink_tokens, case.n_tokens)
