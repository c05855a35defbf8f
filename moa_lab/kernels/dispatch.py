"""Which attention runs: the Triton kernel where it applies, the reference everywhere else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from moa_lab.cache import RingLayer, storage
from moa_lab.kernels.blockwise import blockwise_attention
from moa_lab.kernels.mixture import mixed_windows
from moa_lab.kernels.reference import windowed_attention
from moa_lab.kernels.ring_reference import chunk_attention, newest_attention
from moa_lab.kernels.schedule import DecodeSchedule, cores_of, decode_schedule
from moa_lab.masks import KeyMask
from moa_lab.plan.bits import Bits
from moa_lab.provenance import version_of

MAX_HEAD_DIM = 256
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def _finds(module: str) -> bool:
    try:
        return find_spec(module) is not None
    # An import hook that hides modules may raise instead of returning None.
    except ModuleNotFoundError:
        return False


# Checked once, at import: torch.compile cannot trace a search for modules.
HAS_TRITON = _finds("triton")
HAS_FLASH = version_of("flash-attn-4") is not None


def kernel_applies(query: torch.Tensor, *others: torch.Tensor) -> bool:
    """True where the Triton kernel can replace the reference: on a GPU, for its dtypes and head_dim, without gradients.

    others: key and value, which may need gradients even where the query does not.
    """
    wants_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, *others))
    return _fits(query) and not wants_gradient


def _fits(query: torch.Tensor) -> bool:
    return on_gpu(query) and query.dtype in KERNEL_DTYPES and query.shape[-1] <= MAX_HEAD_DIM and HAS_TRITON


def on_gpu(tensor: torch.Tensor) -> bool:
    """Whether the tensor is on a device where kernels run."""
    return tensor.is_cuda


def span_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: KeyMask,
    sink_tokens: int,
    windows: np.ndarray,
    scale: float,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention in which KV head g sees the sink and its own `windows[g]` tokens, by the kernel where it applies.

    Shapes as in `windowed_attention`. mask: what the model itself hides.
    """
    if kernel_applies(query, key, value) and mask.first is not None:
        # Whether anything is padded is asked last, since it waits for the device.
        first = None if _flash_fits(mask.reach, softcap, sink_logits) and mask.is_plain else mask.first
        return prompt_by_kernel(query, key, value, windows, sink_tokens, scale, mask.reach, softcap, sink_logits, first)
    if mask.hides_the_future_alone and softcap is None and sink_logits is None:
        return blockwise_attention(query, key, value, sink_tokens, windows, scale)
    positions = mask.positions
    query_positions = positions.amax(dim=-1, keepdim=True)
    gaps = mask.explicit is None and not mask.padded_on_the_left
    return windowed_attention(query, key, value, query_positions, positions, sink_tokens, windows, scale, softcap, gaps, sink_logits)


def prompt_by_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    windows: Iterable[int],
    sink_tokens: int,
    scale: float,
    reach: int | None = None,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
    first: torch.Tensor | None = None,
) -> torch.Tensor:
    """`moa_lab.kernels.prefill.prefill_attention`, of a whole prompt without padding (first: None) by FlashAttention-4 where that is the
    faster one."""
    # Imported here, since Triton may be missing.
    if first is None and _flash_fits(reach, softcap, sink_logits):
        from moa_lab.kernels.flash import prompt_attention

        return prompt_attention(query, key, value, [int(window) for window in windows], sink_tokens, scale)
    from moa_lab.kernels.prefill import prefill_attention

    return prefill_attention(
        query, key, value, windows, sink_tokens, scale, first=first, reach=reach, softcap=softcap, sink_logits=sink_logits
    )


def _flash_fits(reach: int | None, softcap: float | None, sink_logits: torch.Tensor | None) -> bool:
    return HAS_FLASH and reach is None and softcap is None and sink_logits is None


def drawn_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: KeyMask,
    shift: torch.Tensor,
    counts: torch.Tensor,
    sink_tokens: int,
    scale: float,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """`drawn_windows` where its kernel runs and nothing is padded; elsewhere `mixed_windows`, recomputed in the backward pass."""
    if _fits(query) and mask.explicit is None and mask.real is None:
        from moa_lab.kernels.drawn import drawn_windows, holds_tiles

        if holds_tiles(query):
            return drawn_windows(query, key, value, shift, counts, sink_tokens, scale, softcap, mask.reach, sink_logits)
    weights = torch.nn.functional.one_hot(counts.long() - 1, shift.shape[-1]).to(shift.dtype) + shift
    shown = mask.positions >= 0
    return checkpoint(mixed_windows, query, key, value, shown, weights, sink_tokens, scale, softcap, sink_logits, use_reentrant=False)


def ring_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ring: RingLayer,
    lengths: torch.Tensor,
    padding: torch.Tensor,
    scale: float,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
    *,
    schedule: DecodeSchedule | None = None,
    keep: bool = True,
) -> torch.Tensor:
    """Attend from new tokens to the ring and to one another, and write them to it: (batch, query_heads, tokens, head_dim).

    Shapes as in `chunk_attention`. schedule: of `new_schedule`, for a single token; None: the reference runs. keep: False writes
    nothing. What the ring stores in fewer bits is seen so by every query, the token's own too: chunks of any size give the same.
    """
    if query.shape[2] > 1 or not keep:
        found = _chunk_attention(query, *heads_as_stored(key, value, ring.stored_bits), ring, lengths, padding, scale, softcap, sink_logits)
        if keep:
            ring_write(key, value, ring, lengths, padding)
        return found
    ring_write(key, value, ring, lengths, padding)
    if schedule is None or not kernel_applies(query, key, value):
        return newest_attention(query, ring, lengths, scale, softcap, sink_logits)
    from moa_lab.kernels.decode import decode_attention

    return decode_attention(query, ring, lengths, schedule, scale, softcap, sink_logits)


def _chunk_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ring: RingLayer, *others: Any) -> torch.Tensor:
    if kernel_applies(query, key, value):
        from moa_lab.kernels import prefill

        return prefill.chunk_attention(query, key, value, ring, *others)
    return chunk_attention(query, key, value, ring, *others)


def heads_as_stored(key: torch.Tensor, value: torch.Tensor, bits: Sequence[Bits] | None) -> tuple[torch.Tensor, torch.Tensor]:
    """`moa_lab.cache.storage.heads_as_stored`, in one kernel where that applies."""
    if bits is not None and kernel_applies(key, value):
        from moa_lab.kernels import stored

        return stored.heads_as_stored(key, value, bits)
    return storage.heads_as_stored(key, value, bits)


def ring_write(key: torch.Tensor, value: torch.Tensor, ring: RingLayer, lengths: torch.Tensor, padding: torch.Tensor) -> None:
    """`RingLayer.write`, in one kernel where that applies."""
    # No gradient flows through a cache.
    key, value = key.detach(), value.detach()
    if kernel_applies(key, value):
        from moa_lab.kernels import write

        write.ring_write(key, value, ring, lengths, padding)
    else:
        ring.write(key, value, lengths, padding)


def new_schedule(ring: RingLayer, batch: int) -> DecodeSchedule | None:
    """A schedule for the decode kernel that fills this device; None where the kernel does not run."""
    sample = ring.sample
    if not kernel_applies(sample):
        return None
    # Imported here, since Triton may be missing.
    from moa_lab.kernels.decode import programs_for, tile_slots

    tile = tile_slots(ring)
    tiles = batch * int((-(-ring.layout.slots // tile)).sum())
    return decode_schedule(ring.layout.slots, batch, tile, programs_for(ring, tiles, cores_of(sample.device)), sample.device)
