"""The kernel of the backward pass with influence, without a GPU in Triton's interpreter, against plain PyTorch in float64."""

from __future__ import annotations

import pytest
import torch
from ring_attends import DEVICE

from moa_lab.kernels.influence import backward_with_influence
from moa_lab.masks import KeyMask
from moa_lab.profiling import capture
from moa_lab.profiling.row_blocks import backward_by_row_blocks

SCALE = 0.3


@pytest.mark.parametrize(
    ("heads", "kv_heads", "n_tokens", "head_dim", "sink_tokens", "settings"),
    [
        (4, 2, 200, 16, 10, {}),
        (2, 1, 130, 40, 64, {}),
        (1, 1, 64, 16, 0, {}),
        (2, 2, 300, 16, 4, {"reach": 100}),
        (2, 2, 128, 16, 4, {"reach": 1}),
        (2, 2, 150, 16, 70, {"softcap": 5.0, "sinks": True}),
        (2, 2, 5, 16, 64, {"sinks": True}),
    ],
)
def test_gradients_and_sums_are_those_of_plain_pytorch(
    heads: int, kv_heads: int, n_tokens: int, head_dim: int, sink_tokens: int, settings: dict[str, float]
) -> None:
    tensors = [1.5 * _normal(part, 2, many, n_tokens, head_dim) for part, many in enumerate((heads, kv_heads, kv_heads, heads))]
    logits = _normal(9, heads, 1, 1) if settings.get("sinks") else None
    reach, softcap = settings.get("reach"), settings.get("softcap")
    mask = KeyMask(1, n_tokens, n_tokens, tensors[0].device, reach=reach)
    wanted, result = backward_by_row_blocks(
        *(x.double() for x in tensors), mask, SCALE, softcap, None if logits is None else logits.double(), sink_tokens
    )  # fmt: skip
    gradients, sums = backward_with_influence(*tensors, sink_tokens, SCALE, softcap, reach, logits)
    for found, expected in zip((*gradients, *sums), (*wanted, result.blocks, result.distances, result.span_effects), strict=True):
        near = 1e-3 * float(expected.abs().max()) + 1e-6
        torch.testing.assert_close(found.double(), expected, atol=near, rtol=1e-3)


def test_what_is_left_beside_a_weight_near_one_is_not_rounded_away() -> None:
    """Where nearly all weight lies on one key, what its loss would change is told by the little that is left."""
    query, key, value, slope = (_normal(part, 1, 1, 128, 16) for part in range(4))
    query, key = torch.full_like(query, 2.0), 0.1 * key
    # 14 more than the others: a millionth is left.
    key[:, :, 0] = 1.75
    mask = KeyMask(1, 128, 128, query.device)
    _, result = backward_by_row_blocks(*(x.double() for x in (query, key, value, slope)), mask, 0.25, None, None, 0)
    _, sums = backward_with_influence(query, key, value, slope, 0, 0.25)
    torch.testing.assert_close(sums.blocks.double(), result.blocks, atol=1e-3 * float(result.blocks.max()), rtol=1e-3)


def test_the_kernel_is_tried_before_it_is_used(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from moa_lab.kernels import influence

    capture.works.cache_clear()
    try:
        assert capture.works(torch.device(DEVICE), torch.float32, 16)
        capture.works.cache_clear()
        right = influence.backward_with_influence
        monkeypatch.setattr(influence, "backward_with_influence", lambda *given: (right(*given)[0], [2 * x for x in right(*given)[1]]))
        assert not capture.works(torch.device(DEVICE), torch.float32, 16)
    finally:
        capture.works.cache_clear()
    assert "plain PyTorch" in caplog.text


def _normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
