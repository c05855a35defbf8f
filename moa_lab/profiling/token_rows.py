"""What the heads of one layer brought to a few queries: attention whose gradient is reduced to sources and effects of cuts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from moa_lab.cache.storage import heads_as_stored
from moa_lab.interface import AttentionCall, Handler
from moa_lab.kernels.reference import dense_attention, softmax_with_sink, windowed_attention
from moa_lab.masks import visible
from moa_lab.plan import Plan
from moa_lab.profiling.influence import change_of_keeping, influence, logit_slopes

ROW_ELEMENTS = {"cpu": 2**21, "cuda": 2**25}
"""Elements of (query_heads, rows, keys) at once."""


@dataclass(frozen=True, eq=False)
class LayerRows:
    """What one layer brought, summed over the traced rows and over the query heads of each KV head.

    brought: (kv_heads, keys), the first-order change of the loss when that key alone is masked (`influence`). readers: int64
    (kv_heads, keys), the row to which the key brought most. cut: (cuts, kv_heads), the change when the head keeps the sink and a window
    alone (`change_of_keeping`).
    """

    brought: torch.Tensor
    readers: torch.Tensor
    cut: torch.Tensor


Receive = Callable[[int, LayerRows], None]
"""Takes a layer's number and what it brought, while the backward pass runs."""


@dataclass(frozen=True, eq=False)
class Force:
    """Which keys every head sees: a plan at length `n_tokens`, or (None) whatever the model shows."""

    plan: Plan | None
    n_tokens: int

    def windows(self, layer: int) -> np.ndarray | None:
        """Window tokens of the layer's KV heads; None where nothing is cut."""
        return None if self.plan is None or self.plan.is_dense else self.plan.windows(self.n_tokens)[layer]

    def stored(self, layer: int, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V as the plan stores them; gradients pass through the rounding as if there was none."""
        bits = None if self.plan is None else self.plan.bits_of(layer)
        if bits is None:
            return call.key, call.value
        rounded = heads_as_stored(call.key.detach(), call.value.detach(), bits)
        return call.key + (rounded[0] - call.key.detach()), call.value + (rounded[1] - call.value.detach())

    def attend(self, layer: int, call: AttentionCall, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """The layer's output, (1, query_heads, rows, head_dim)."""
        windows = self.windows(layer)
        if windows is None or self.plan is None:
            return dense_attention(call.query, key, value, call.mask, call.scale, call.softcap, call.sink_logits)
        return windowed_attention(
            call.query, key, value, call.query_positions, call.positions, self.plan.sink_tokens, windows, call.scale, call.softcap,
            sink_logits=call.sink_logits,
        )  # fmt: skip


def tracing(layer: int, force: Force, cuts: Sequence[np.ndarray], sink_tokens: int, receive: Receive) -> Handler:
    """An attention handler under `force` that sends what the layer brought to `receive` during the backward pass.

    cuts: windows in tokens (kv_heads,) of the cuts whose effect is wanted, each beside a sink of `sink_tokens`.
    """

    def handler(call: AttentionCall) -> torch.Tensor:
        key, value = force.stored(layer, call)
        # Recomputed in the backward pass: the scores of one layer are in memory at a time.
        output = checkpoint(force.attend, layer, call, key, value, use_reentrant=False)
        assert isinstance(output, torch.Tensor)
        windows = force.windows(layer)
        seen = [] if windows is None or force.plan is None else [_seen(call, force.plan.sink_tokens, windows)]
        kept = [_seen(call, sink_tokens, windows) for windows in cuts]
        output.register_hook(lambda gradient: receive(layer, _reduced(call, key.detach(), value.detach(), gradient, seen, kept)))
        return output

    return handler


Seen = Callable[[slice], torch.Tensor]
"""Which keys some rows see: bool, broadcastable to (kv_heads, 1, rows, keys)."""


def _seen(call: AttentionCall, sink_tokens: int, windows: np.ndarray) -> Seen:
    window = torch.from_numpy(np.asarray(windows)).to(call.query.device, torch.int32)[:, None, None, None]

    def seen(rows: slice) -> torch.Tensor:
        keys = call.positions[:, :, rows]
        return visible(keys.amax(dim=-1, keepdim=True), keys, sink_tokens, window)

    return seen


@torch.no_grad()
def _reduced(
    call: AttentionCall, key: torch.Tensor, value: torch.Tensor, gradient: torch.Tensor, seen: Sequence[Seen], kept: Sequence[Seen]
) -> LayerRows:
    """seen: what hides keys in the pass itself (none: nothing but the model); kept: the cuts."""
    work = torch.promote_types(call.query.dtype, torch.float32)
    heads, tokens = call.query.shape[1:3]
    kv_heads, keys = key.shape[1:3]
    # (kv_heads, group, rows, head_dim) and (kv_heads, 1, keys, head_dim).
    query, gradient = (x.detach()[0].unflatten(0, (kv_heads, heads // kv_heads)).to(work) for x in (call.query, gradient))
    key, value = (x[0, :, None].to(work) for x in (key, value))
    sinks = None if call.sink_logits is None else call.sink_logits.detach().reshape(kv_heads, heads // kv_heads, 1, 1)
    brought, most, cut = key.new_zeros(kv_heads, keys), key.new_zeros(kv_heads, keys), key.new_zeros(len(kept), kv_heads)
    readers = torch.zeros(kv_heads, keys, dtype=torch.int64, device=key.device)
    step = max(1, ROW_ELEMENTS.get(query.device.type, ROW_ELEMENTS["cpu"]) // (heads * keys))
    for start in range(0, tokens, step):
        rows = slice(start, min(start + step, tokens))
        scores = query[:, :, rows] @ key.mT * call.scale
        if call.softcap is not None:
            scores = call.softcap * torch.tanh(scores / call.softcap)
        scores = scores.masked_fill_(call.positions[:, :, rows] < 0, float("-inf"))
        slopes_of = gradient[:, :, rows] @ value.mT
        whole, left = _weights(scores, sinks)
        slopes, expected = logit_slopes(whole, slopes_of)
        for index, keep in enumerate(kept):
            cut[index] += _cut(whole, slopes, expected, left, keep(rows)).sum(dim=(1, 2))
        for hide in seen:
            whole, _ = _weights(scores.masked_fill(~hide(rows), float("-inf")), sinks)
        each = influence(whole, slopes_of).sum(dim=1)
        brought += each.sum(dim=1)
        here, reader = each.max(dim=1)
        readers = torch.where(here > most, reader + start, readers)
        most = torch.maximum(most, here)
    return LayerRows(brought, readers, cut)


def _cut(
    weights: torch.Tensor, slopes: torch.Tensor, expected: torch.Tensor, left: torch.Tensor | None, kept: torch.Tensor
) -> torch.Tensor:
    """Change of the loss when every row keeps `kept` alone: (kv_heads, group, rows); 0 where it loses nothing.

    left: the weight of a sink logit, a key of value 0 that no cut takes.
    """
    kept_weight, kept_slopes = ((x * kept).sum(dim=-1, keepdim=True) for x in (weights, slopes))
    if left is not None:
        kept_weight, kept_slopes = kept_weight + left, kept_slopes - left * expected
    loses = ((weights > 0) & ~kept).any(dim=-1, keepdim=True)
    return torch.where(loses, change_of_keeping(kept_weight, kept_slopes, expected), 0.0)[..., 0]


def _weights(scores: torch.Tensor, sinks: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    return (scores.softmax(dim=-1), None) if sinks is None else softmax_with_sink(scores, sinks)
