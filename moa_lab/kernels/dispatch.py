"""Which attention runs: the Triton kernel where it applies, the reference everywhere else."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import torch

from moa_lab.kernels.reference import windowed_attention

MAX_HEAD_DIM = 256
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def kernel_applies(query: torch.Tensor, *others: torch.Tensor) -> bool:
    """True where the Triton kernel can take the place of the reference: on a GPU, for its dtypes, where no gradient is asked for.

    others: key and value, which a gradient may be asked for alone.
    """
    wants_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, *others))
    fits = query.dtype in KERNEL_DTYPES and query.shape[-1] <= MAX_HEAD_DIM
    return query.is_cuda and fits and not wants_gradient and find_spec("triton") is not None


def span_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    first: torch.Tensor | None,
    sink_tokens: int,
    windows: np.ndarray,
    scale: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attention in which KV head g sees the sink and its own `windows[g]` tokens, by the fastest way that is right.

    Shapes as in `windowed_attention`; first as in `AttentionCall`: without it only the reference knows what is hidden.
    """
    if first is not None and kernel_applies(query, key, value):
        # Imported here: Triton is not everywhere.
        from moa_lab.kernels.prefill import prefill_attention

        on_device = torch.from_numpy(windows.astype(np.int32)).to(query.device, non_blocking=True)
        return prefill_attention(query, key, value, on_device, sink_tokens, scale, first=first, softcap=softcap)
    query_positions = positions.amax(dim=-1, keepdim=True)
    return windowed_attention(query, key, value, query_positions, positions, sink_tokens, windows, scale, softcap)
