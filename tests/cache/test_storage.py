"""Stored bits: what comes back lies within half a step, bytes are counted to the last, and 16 bits change nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moa_lab.cache.storage import as_stored, heads_as_stored, pack, places, unpack, values_at
from moa_lab.plan.bits import code_words, vector_bytes


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([4, 8]), st.integers(1, 80), st.sampled_from([1e-3, 1.0, 300.0]))
def test_packed_places_come_back_and_values_lie_within_half_a_step(seed: int, bits: int, head_dim: int, scale: float) -> None:
    values = scale * torch.randn(3, 5, head_dim, generator=torch.Generator().manual_seed(seed))
    where, low, step = places(values, bits)
    codes = pack(where, bits)
    assert codes.shape == (3, 5, code_words(head_dim, bits))
    assert torch.equal(unpack(codes, bits, head_dim), where.to(torch.uint8))
    found = values_at(unpack(codes, bits, head_dim), low, step, torch.float32)
    assert torch.equal(found, as_stored(values, bits))
    # Half a step, and what rounding the grid itself to float16 costs: relative to its values, and where these are very small.
    largest = values.abs().amax(dim=-1, keepdim=True)
    assert bool(((found - values).abs() <= 0.51 * step.float() + 2e-3 * largest + 2.0 ** (bits - 24)).all())


def test_more_bits_are_nearer_and_sixteen_are_exact() -> None:
    values = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    errors = [float((as_stored(values, bits) - values).abs().mean()) for bits in (4, 8, 16)]
    assert errors[0] > 10 * errors[1] > 10 * errors[2] == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_huge_values_saturate_and_never_become_nan(dtype: torch.dtype) -> None:
    values = torch.tensor([[-1e6, 2.0, 3.0, 1e6]], dtype=dtype)
    found = as_stored(values, 8)
    assert found.dtype == dtype
    assert bool(found.isfinite().all())
    assert float(found[0, 0]) < -3e4
    assert float(found[0, 3]) > 3e4


def test_equal_values_and_zeros_come_back_as_they_were() -> None:
    for value in (0.0, 1.5, -3.0):
        assert torch.equal(as_stored(torch.full((2, 64), value), 4), torch.full((2, 64), value))


def test_every_head_has_its_own_bits_of_k_and_of_v() -> None:
    key, value = torch.randn(2, 1, 3, 5, 8, generator=torch.Generator().manual_seed(0))
    found_key, found_value = heads_as_stored(key, value, [(4, 16), (16, 8), (8, 8)])
    for head, (k, v) in enumerate([(4, 16), (16, 8), (8, 8)]):
        assert torch.equal(found_key[:, head], as_stored(key[:, head], k))
        assert torch.equal(found_value[:, head], as_stored(value[:, head], v))
    assert heads_as_stored(key, value, None) == (key, value)


@pytest.mark.parametrize(("head_dim", "bits", "size"), [(64, 16, 128), (64, 8, 68), (64, 4, 36), (128, 4, 68), (5, 4, 8), (5, 8, 12)])
def test_a_vector_takes_its_codes_and_a_grid(head_dim: int, bits: int, size: int) -> None:
    assert vector_bytes(head_dim, bits) == size
    assert vector_bytes(head_dim, 16, dtype_bytes=4) == 4 * head_dim


def test_a_gradient_passes_straight_through_the_rounding() -> None:
    values = torch.randn(2, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weights = torch.arange(16.0).view(2, 8)
    found = as_stored(values, torch.tensor([[4], [16]]))
    assert torch.equal(found, as_stored(values.detach(), torch.tensor([[4], [16]])))
    (found * weights).sum().backward()
    assert values.grad is not None
    assert torch.equal(values.grad, weights)
