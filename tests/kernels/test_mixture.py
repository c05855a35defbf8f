"""The mean over windows in one pass, held against a pass for each window."""

from __future__ import annotations

import pytest
import torch

from moa_lab.kernels.mixture import BLOCK, mixed_windows
from moa_lab.kernels.reference import masked_attention

SCALE = 0.25


def inputs(tokens: int, heads: int = 4, kv_heads: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return [torch.randn(2, count, tokens, 16, generator=generator, dtype=torch.float64) for count in (heads, kv_heads, kv_heads)]


def shares(blocks: int, kv_heads: int = 2) -> torch.Tensor:
    return torch.rand(2, kv_heads, blocks, generator=torch.Generator().manual_seed(1), dtype=torch.float64).softmax(dim=-1)


def causal(tokens: int, reach: int | None = None) -> torch.Tensor:
    position = torch.arange(tokens)
    back = position[:, None] - position
    return ((back >= 0) & (back < (reach or tokens)))[None, None]


def one_by_one(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, shown: torch.Tensor, weights: torch.Tensor, sink: int,
    softcap: float | None,
) -> torch.Tensor:  # fmt: skip
    """A masked attention for each window, and their weighted mean."""
    tokens, group = query.shape[2], query.shape[1] // key.shape[1]
    block = torch.arange(tokens) // BLOCK
    found = torch.zeros_like(query)
    for index in range(weights.shape[-1]):
        seen = (block[:, None] - block <= index) | (block < -(-sink // BLOCK))
        part = masked_attention(query, key, value, shown & seen, SCALE, softcap)
        found = found + weights[..., index].repeat_interleave(group, dim=1)[..., None, None] * part
    return found


@pytest.mark.parametrize("tokens", [64, 200, 256])
@pytest.mark.parametrize("sink", [0, 64, 100])
def test_it_is_the_weighted_mean_of_the_windows(tokens: int, sink: int) -> None:
    query, key, value = inputs(tokens)
    weights = shares(-(-tokens // BLOCK))
    found = mixed_windows(query, key, value, causal(tokens), weights, sink, SCALE)
    torch.testing.assert_close(found, one_by_one(query, key, value, causal(tokens), weights, sink, None), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("reach", "softcap"), [(90, None), (None, 2.0), (40, 1.0)])
def test_the_models_own_window_and_soft_cap_count(reach: int | None, softcap: float | None) -> None:
    query, key, value = inputs(230)
    weights, shown = shares(4), causal(230, reach)
    found = mixed_windows(query, key, value, shown, weights, 64, SCALE, softcap)
    # `masked_attention` takes a soft cap's softmax in single precision.
    torch.testing.assert_close(found, one_by_one(query, key, value, shown, weights, 64, softcap), rtol=1e-4, atol=1e-5)


def test_slopes_are_those_of_the_mean() -> None:
    query, key, value = (x.requires_grad_() for x in inputs(150))
    weights = shares(3).requires_grad_()
    wanted = one_by_one(query, key, value, causal(150), weights, 64, None)
    found = mixed_windows(query, key, value, causal(150), weights, 64, SCALE)
    towards = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    slopes = [torch.autograd.grad((one * towards).sum(), (query, key, value, weights)) for one in (found, wanted)]
    for ours, theirs in zip(*slopes, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_window_of_all_blocks_is_dense_attention() -> None:
    query, key, value = inputs(190)
    weights = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64).expand(2, 2, 3)
    found = mixed_windows(query, key, value, causal(190), weights, 64, SCALE)
    torch.testing.assert_close(found, masked_attention(query, key, value, causal(190), SCALE), rtol=1e-5, atol=1e-6)
