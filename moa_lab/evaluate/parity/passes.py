"""Passes of a model over a ring cache, and under full masks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from moa_lab.interface import AttentionCall
from moa_lab.kernels.reference import masked_attention
from moa_lab.masks import visible
from moa_lab.runtime import RingCache

QUERY_BLOCK = 128
"""Queries whose full masks are in memory at once."""
POSITIONS = 64
"""Most positions of one pass whose logits are compared, to limit memory."""


def masked_in_blocks(call: AttentionCall, sink_tokens: int, windows: torch.Tensor, reverse: bool) -> torch.Tensor:
    """Attention with a mask of all (query, key) pairs for each of the query heads' `windows` (query_heads,), in blocks of queries."""
    key, value = (x.flip(2) if reverse else x for x in (call.key, call.value))
    asked, blocks = call.query_positions, []
    for start in range(0, call.query.shape[2], QUERY_BLOCK):
        block = slice(start, start + QUERY_BLOCK)
        at = call.positions[:, :, block]
        shown = visible(asked[:, :, block], at, sink_tokens, windows[:, None, None]) & (at >= 0)
        shown = shown.flip(-1) if reverse else shown
        blocks.append(masked_attention(call.query[:, :, block], key, value, shown, call.scale, call.softcap, call.sink_logits))
    return torch.cat(blocks, dim=2)


def produce(
    model: PreTrainedModel, cache: RingCache, script: Sequence[tuple[int, ...]], texts: torch.Tensor, positions: int = POSITIONS
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Run a script over `cache`: for every row, logits (positions, vocabulary), float32, and their positions in the row's text.

    From every step at most `positions` columns are taken, the newest among them; padding is left out.
    """
    device, rows = texts.device, len(script[0])
    done = torch.zeros(rows, dtype=torch.long, device=device)
    seen = torch.zeros(rows, 0, dtype=torch.long, device=device)
    found: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in range(rows)]
    for step in script:
        new = torch.tensor(step, device=device)
        columns = _spread_out(max(step), positions, device)
        # Where each column is in its row's text; below `done` where it is padding.
        at = (done + new)[:, None] - max(step) + torch.arange(max(step), device=device)
        real = at >= done[:, None]
        seen = torch.cat([seen, real.long()], dim=1)
        padded = {"attention_mask": seen} if rows > 1 else {}
        logits = model(
            input_ids=torch.where(real, texts[:rows].gather(1, at.clamp(min=0)), 0), position_ids=at.clamp(min=0),
            past_key_values=cache, use_cache=True, logits_to_keep=columns, **padded,
        ).logits  # fmt: skip
        for row in range(rows):
            kept = real[row, columns]
            found[row].append((logits[row, kept].float(), at[row, columns][kept]))
        done = done + new
    return [(torch.cat([logits for logits, _ in parts]), torch.cat([at for _, at in parts])) for parts in found]


def _spread_out(n: int, most: int, device: torch.device) -> torch.Tensor:
    """At most `most` of `n` columns, evenly spread, the last among them: int64."""
    return torch.linspace(n - 1, 0, min(n, most), dtype=torch.float64).round().long().flip(0).to(device)
