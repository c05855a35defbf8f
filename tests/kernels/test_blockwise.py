"""Attention by blocks of queries that read what they may see, against the one whose masks are written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moa_lab.kernels.blockwise import QUERY_BLOCK, blockwise_attention
from moa_lab.kernels.dispatch import span_attention
from moa_lab.kernels.reference import masked_attention, windowed_attention
from moa_lab.masks import KeyMask, dense_mask

torch.set_num_threads(1)


def inputs(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(2, 6, n, 8, generator=generator)
    key, value = (torch.randn(2, 3, n, 8, generator=generator) for _ in range(2))
    return query, key, value


@pytest.mark.parametrize("sink", [0, 3, 64])
@pytest.mark.parametrize("windows", [(1, 64, 10_000), (65, 65, 200), (300, 1, QUERY_BLOCK)])
@pytest.mark.parametrize("n", [1, 64, 65, QUERY_BLOCK + 65, 3 * QUERY_BLOCK + 7])
def test_blocks_give_what_the_written_out_mask_gives(n: int, windows: tuple[int, ...], sink: int) -> None:
    query, key, value = inputs(n)
    shown = dense_mask(n, sink, torch.tensor(windows).repeat_interleave(2))[None]
    expected = masked_attention(query, key, value, shown, 0.3)
    found = blockwise_attention(query, key, value, sink, np.array(windows), 0.3)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("asked", [1, 100, 2 * QUERY_BLOCK, 2 * QUERY_BLOCK + 37])
def test_the_last_queries_of_a_sequence_get_what_they_get_among_all(asked: int) -> None:
    query, key, value = inputs(3 * QUERY_BLOCK + 7)
    windows = np.array([1, 500, 10_000])
    whole = blockwise_attention(query, key, value, 3, windows, 0.3)
    found = blockwise_attention(query[:, :, -asked:], key, value, 3, windows, 0.3)
    torch.testing.assert_close(found, whole[:, :, -asked:], atol=2e-6, rtol=1e-5)


def test_keys_that_no_query_of_a_block_sees_are_not_read() -> None:
    query, key, value = inputs(700)
    gone = slice(4, 700 - QUERY_BLOCK - 100)
    key[:, :, gone], value[:, :, gone] = torch.nan, torch.nan
    found = blockwise_attention(query, key, value, 4, np.full(3, 100), 0.3)
    assert found[:, :, 700 - QUERY_BLOCK :].isfinite().all()


def test_a_whole_sequence_takes_the_blocks_and_padding_or_a_window_of_the_models_own_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = inputs(300)
    windows, taken = np.array([1, 80, 5000]), []
    monkeypatch.setattr("moa_lab.kernels.dispatch.blockwise_attention", lambda *given: taken.append(1) or blockwise_attention(*given))
    device, real = torch.device("cpu"), torch.ones(2, 300).bool()
    real[0, :10] = False
    for settings in ({}, {"real": real}, {"reach": 90}):
        mask = KeyMask(2, 300, 300, device, **settings)
        found = span_attention(query, key, value, mask, 4, windows, 0.3)
        at = mask.positions.amax(dim=-1, keepdim=True)
        expected = windowed_attention(query, key, value, at, mask.positions, 4, windows, 0.3)
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)
    assert len(taken) == 1


def test_a_gradient_goes_through_the_blocks() -> None:
    query, key, value = inputs(400)
    gradients = []
    for attend in (blockwise_attention, _written_out):
        given = [x.clone().requires_grad_(True) for x in (query, key, value)]
        gradients.append(torch.autograd.grad(attend(*given, 4, np.array([1, 80, 5000]), 0.3).square().sum(), given))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def _written_out(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sink: int, windows: np.ndarray, scale: float) -> torch.Tensor:
    group = query.shape[1] // key.shape[1]
    shown = dense_mask(query.shape[2], sink, torch.from_numpy(windows).repeat_interleave(group))[None]
    return masked_attention(query, key, value, shown, scale)
