"""Influence of every head on one token of an answer: how much it brought, and from which tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from moa_lab.geometry.wrappers import plain_model
from moa_lab.interface import AttentionCall, Handler, route_attention
from moa_lab.kernels.dispatch import span_attention
from moa_lab.models import geometry_of
from moa_lab.plan import SINK_TOKENS, Plan
from moa_lab.profiling.token_rows import Force, LayerRows, tracing

SOURCES = 32
"""Source tokens kept of every head."""
PREFIX_TOKENS = 512
"""Tokens of the prefix that are run at once: as many scores are in memory."""

Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""


@dataclass(frozen=True, eq=False)
class Prefix:
    """K and V of the first `n` tokens of a sequence under a plan (None: dense), a pair a layer, (1, kv_heads, n, head_dim) each."""

    force: Force
    pairs: tuple[tuple[torch.Tensor, torch.Tensor], ...]

    @property
    def n(self) -> int:
        """Tokens."""
        return int(self.pairs[0][0].shape[2]) if self.pairs else 0


@dataclass(frozen=True, eq=False)
class TokenInfluence:
    """What the heads brought to the token at `position`, in nats of its log-odds, to first order.

    The loss of `moa_lab.profiling.influence` is here minus the token's log-odds, log(p / (1 - p)): its slope is that of the
    cross-entropy divided by 1 - p, and so does not vanish where the model is sure. Positive: it made the token likelier.
    rows: [first, stop) positions of the queries that count: those before them brought what they did to the text, not to the answer.
    cuts: (cuts, layers, kv_heads), what the token loses when the head keeps the sink and the cut's window alone, in these rows.
    sources: int64 (layers, kv_heads, SOURCES), key positions, the one that brought most first, -1 where there are fewer; brought: what
    each of them brought; readers: the position of the query that took most of it. by_key: (position,), summed over all heads.
    probability: of the token, under what the model ran with.
    """

    position: int
    rows: tuple[int, int]
    probability: float
    log_odds: float
    cuts: np.ndarray
    sources: np.ndarray
    brought: np.ndarray
    readers: np.ndarray
    by_key: np.ndarray


def prefix_of(
    model: PreTrainedModel, tokens: np.ndarray, n_tokens: int, plan: Plan | None = None, progress: Progress | None = None
) -> Prefix:
    """Run `tokens` (n,), the beginning of a sequence, under `plan` at length `n_tokens`; may be none. progress: counts tokens."""
    model = plain_model(model)
    force = Force(plan, n_tokens)
    geometry = geometry_of(model)
    every = np.full(geometry.kv_heads, geometry.max_length)

    def handler(layer: int) -> Handler:
        windows = force.windows(layer)

        def attend(call: AttentionCall) -> torch.Tensor:
            # One path for all: it never holds the scores of more than a few hundred queries.
            sink = 0 if plan is None else plan.sink_tokens
            seen = every if windows is None else windows
            return span_attention(call.query, *force.stored(layer, call), call.mask, sink, seen, call.scale, call.softcap, call.sink_logits)

        return attend

    # Without a config no layer drops what its own window has left behind.
    cache = DynamicCache()
    ids = torch.from_numpy(np.asarray(tokens, dtype=np.int64)).to(model.device)[None]
    with torch.no_grad(), route_attention(model, handler):
        for start in range(0, ids.shape[1], PREFIX_TOKENS):
            if progress:
                progress(start, ids.shape[1])
            model(input_ids=ids[:, start : start + PREFIX_TOKENS], past_key_values=cache, use_cache=True, logits_to_keep=1)
    return Prefix(force, tuple((keys, values) for keys, values, *_ in cache))


def token_influence(
    model: PreTrainedModel, tokens: np.ndarray, prefix: Prefix, cuts: Sequence[np.ndarray] = (), sink_tokens: int = SINK_TOKENS
) -> TokenInfluence:
    """Trace the last of `tokens` (n,), which go on after `prefix`: the rows that count are those between.

    cuts: windows in tokens (layers, kv_heads) beside a sink of `sink_tokens`. One forward and one backward pass over those rows; memory
    grows with rows x n for one layer at a time. The effect of a cut takes the weights that the head would have if it saw everything,
    also where the prefix is of a plan: then it is what the token would lose, or gain by having it back, under that plan.
    Raises ValueError where no token lies between the prefix and the last one.
    """
    model = plain_model(model)
    position, first = len(tokens) - 1, prefix.n
    if position <= first:
        raise ValueError(f"a token after the prefix of {first} and one more is needed, got {len(tokens)} tokens")
    geometry, found = geometry_of(model), dict[int, LayerRows]()
    ids = torch.from_numpy(np.asarray(tokens[first:position], dtype=np.int64)).to(model.device)[None]
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_(True)

    def handler(layer: int) -> Handler:
        return tracing(layer, prefix.force, [windows[layer] for windows in cuts], sink_tokens, found.__setitem__)

    cache = DynamicCache(list(prefix.pairs)) if first else DynamicCache()
    with torch.enable_grad(), route_attention(model, handler):
        logits = model(inputs_embeds=embedded, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        log_odds = _log_odds(logits, int(tokens[position]))
        torch.autograd.grad(-log_odds, embedded)
    log_odds = log_odds.detach()
    layers = [found[layer] for layer in range(geometry.layers)]
    return TokenInfluence(
        position=position,
        rows=(first, position),
        probability=float(torch.sigmoid(log_odds)),
        log_odds=float(log_odds),
        cuts=np.stack([layer.cut.float().cpu().numpy() for layer in layers], axis=1),
        by_key=np.sum([layer.brought.sum(dim=0).float().cpu().numpy() for layer in layers], axis=0),
        **_sources(layers, first, position),
    )


def _log_odds(logits: torch.Tensor, token: int) -> torch.Tensor:
    """log(p / (1 - p)) of a token, from logits (vocabulary,)."""
    others = torch.cat([logits[:token], logits[token + 1 :]])
    return logits[token] - others.logsumexp(dim=0)


def _sources(layers: Sequence[LayerRows], first: int, keys: int) -> dict[str, np.ndarray]:
    """The keys that brought most to every head, as `TokenInfluence` has them; first: position of the first row."""
    count = min(SOURCES, keys)
    tops = [layer.brought.topk(count, dim=-1) for layer in layers]
    brought = np.stack([top.values.float().cpu().numpy() for top in tops])
    sources = np.stack([top.indices.cpu().numpy() for top in tops])
    readers = np.stack([layer.readers.gather(-1, top.indices).cpu().numpy() for layer, top in zip(layers, tops, strict=True)])
    short = [(0, 0), (0, 0), (0, SOURCES - count)]
    positive = brought > 0
    return {
        "sources": np.pad(np.where(positive, sources, -1), short, constant_values=-1),
        "brought": np.pad(np.where(positive, brought, 0.0), short),
        "readers": np.pad(np.where(positive, readers + first, -1), short, constant_values=-1),
    }
