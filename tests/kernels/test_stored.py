"""What comes back from a cache of fewer bits, by the kernel, is what the cache's own definition says."""

from __future__ import annotations

import pytest
import torch
from ring_attends import DEVICE

from moa_lab.cache import storage
from moa_lab.plan import Bits

pytest.importorskip("triton", reason="Triton is not installed")

BITS: list[Bits] = [(8, 8), (16, 4), (4, 16), (8, 4)]


@pytest.mark.parametrize("head_dim", [24, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_head_is_rounded_to_its_own_bits(dtype: torch.dtype, head_dim: int) -> None:
    from moa_lab.kernels.stored import heads_as_stored

    generator = torch.Generator().manual_seed(head_dim)
    key, value = (torch.randn(2, 37, 4, head_dim, generator=generator).to(dtype).to(DEVICE).transpose(1, 2) for _ in range(2))
    value = value.contiguous()
    # Vectors of one number, and numbers that float16 just holds.
    key[0, 0, 3], value[1, 2, 5], key[0, 1, 2, 3] = 0.0, 7.0, 60000.0
    found, expected = heads_as_stored(key, value, BITS), storage.heads_as_stored(key, value, BITS)
    for own, right in zip(found, expected, strict=True):
        # A multiplication and an addition may be rounded as one.
        torch.testing.assert_close(own, right, rtol=2e-7 if dtype == torch.float32 else 1e-3, atol=1e-6)


def test_what_nobody_rounds_is_not_copied() -> None:
    from moa_lab.kernels.stored import heads_as_stored

    key, value = torch.randn(2, 1, 4, 3, 16, device=DEVICE)
    found = heads_as_stored(key, value, [(16, 8)] * 4)
    assert found[0] is key
    assert not torch.equal(found[1], value)
