"""The kernels for drawn windows, interpreted on a CPU (or compiled on a GPU), held against `mixed_windows`."""

from __future__ import annotations

import pytest
import torch

from moa_lab.kernels import dispatch
from moa_lab.kernels import drawn as kernels
from moa_lab.kernels.dispatch import drawn_attention
from moa_lab.kernels.drawn import drawn_windows
from moa_lab.kernels.mixture import BLOCK, mixed_windows
from moa_lab.masks import KeyMask

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
SCALE = 0.25

Result = tuple[torch.Tensor, ...]
Sinks = torch.Tensor | None


def inputs(tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens + head_dim)
    shapes = [(2, tokens, count, head_dim) for count in (heads, kv_heads, kv_heads)]
    # As transformers hands them over: heads and tokens swapped in memory.
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype).transpose(1, 2) for shape in shapes]


def drawn(tokens: int, kv_heads: int, seed: int = 0) -> torch.Tensor:
    blocks = -(-tokens // BLOCK)
    return torch.randint(1, blocks + 1, (2, kv_heads), generator=torch.Generator().manual_seed(seed), dtype=torch.int32).to(DEVICE)


def ours(
    tensors: list[torch.Tensor], counts: torch.Tensor, sink: int, softcap: float | None, reach: int | None, sinks: Sinks = None
) -> Result:
    query, key, value = (x.detach().requires_grad_() for x in tensors)
    shift = torch.zeros(*counts.shape, -(-query.shape[2] // BLOCK), device=DEVICE, requires_grad=True)
    found = drawn_windows(query, key, value, shift, counts, sink, SCALE, softcap, reach, sinks)
    return found, *torch.autograd.grad((found * towards(found)).sum(), (query, key, value, shift))


def theirs(
    tensors: list[torch.Tensor], counts: torch.Tensor, sink: int, softcap: float | None, reach: int | None, sinks: Sinks = None
) -> Result:
    query, key, value = (x.detach().float().requires_grad_() for x in tensors)
    tokens = query.shape[2]
    position = torch.arange(tokens, device=DEVICE)
    back = position[:, None] - position
    shown = ((back >= 0) & (back < (reach or tokens)))[None, None]
    weights = torch.nn.functional.one_hot(counts.long() - 1, -(-tokens // BLOCK)).float().requires_grad_()
    found = mixed_windows(query, key, value, shown, weights, sink, SCALE, softcap, sinks)
    return found, *torch.autograd.grad((found * towards(found)).sum(), (query, key, value, weights))


def towards(like: torch.Tensor) -> torch.Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(5)).to(like)


def check(
    tokens: int = 150, heads: int = 4, kv_heads: int = 2, head_dim: int = 16, dtype: torch.dtype = torch.float32, *, sink: int = 64,
    softcap: float | None = None, reach: int | None = None, counts: torch.Tensor | None = None,
    sinks: Sinks = None,
) -> None:  # fmt: skip
    tensors = inputs(tokens, heads, kv_heads, head_dim, dtype)
    counts = drawn(tokens, kv_heads) if counts is None else counts
    for found, wanted in zip(
        ours(tensors, counts, sink, softcap, reach, sinks), theirs(tensors, counts, sink, softcap, reach, sinks), strict=True
    ):  # fmt: skip
        # Slopes are sums over many rows: what counts is their error against the largest (which is 0 where a query sees itself alone).
        error = (found.float() - wanted).abs().max() / wanted.abs().max().clamp(min=0.1)
        assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("tokens", [30, 64, 65, 190, 256, 330])
def test_any_number_of_tokens(tokens: int) -> None:
    check(tokens)


@pytest.mark.parametrize("head_dim", [16, 24, 64, 80, 128])
def test_every_head_dimension(head_dim: int) -> None:
    check(head_dim=head_dim)


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (6, 2), (3, 1)])
def test_heads_read_the_kv_head_of_their_group(heads: int, kv_heads: int) -> None:
    check(heads=heads, kv_heads=kv_heads)


@pytest.mark.parametrize("sink", [0, 64, 100, 128])
def test_the_sink_is_seen_from_every_window(sink: int) -> None:
    check(260, sink=sink, counts=torch.tensor([[1, 2], [5, 1]], dtype=torch.int32, device=DEVICE))


@pytest.mark.parametrize("reach", [1, 40, 64, 100])
def test_a_layers_own_window_hides_the_sink_too(reach: int) -> None:
    check(200, reach=reach)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_soft_caps_and_half_precision(dtype: torch.dtype, softcap: float | None) -> None:
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("Triton's interpreter multiplies bfloat16 wrongly; the GPU runs this")
    check(190, head_dim=32, dtype=dtype, softcap=softcap)


@pytest.mark.parametrize("reach", [None, 40])
def test_a_sink_logit_is_part_of_every_window(reach: int | None) -> None:
    check(heads=2, kv_heads=1, sinks=torch.tensor([0.5, 2.0], device=DEVICE)[:, None, None], reach=reach)


@pytest.mark.parametrize("rows", [16, 32])
def test_a_block_may_be_several_tiles(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "tiles_of", lambda *_: (rows, 4, 1))
    counts = torch.tensor([[1], [2]], dtype=torch.int32, device=DEVICE)
    check(210, 1, 1, counts=counts)
    check(150, 2, 1, counts=counts, sink=100, softcap=2.0, reach=110)
    check(129, 1, 1, counts=counts, sink=0, sinks=torch.tensor([0.5], device=DEVICE)[:, None, None])


@pytest.mark.parametrize(("wave", "rows"), [(None, [64, 64, 64]), (64, [64, 64, 32]), (32, [32, 16, 16])])
def test_tiles_follow_from_the_registers_of_a_wave(wave: int | None, rows: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "wave_lanes", lambda _: wave)
    assert [kernels.tiles_of(torch.empty(1, head_dim, dtype=torch.float16))[0] for head_dim in (64, 128, 256)] == rows


@pytest.mark.parametrize(("capability", "rows"), [((8, 0), 32), ((9, 0), 64), ((10, 0), 32)])
def test_tiles_of_wide_heads_follow_from_the_capability(capability: tuple[int, int], rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "nvidia_capability", lambda _: capability)
    monkeypatch.setattr(kernels, "room_for_tiles", lambda _: 88 * 1024)
    query = torch.empty(1, 256, dtype=torch.float16)
    assert kernels.tiles_of(query)[0] == rows
    assert kernels.holds_tiles(query) == (rows == 32)
    assert kernels.tiles_of(query.float())[0] == BLOCK


def test_scores_that_dwarf_the_window_leave_its_slope_finite() -> None:
    query, key, value = inputs(256, 1, 1, 16, torch.float32)
    # The first key beyond the sink outweighs all the others together by e to the power of hundreds.
    key[:, :, 64] = 100 * query.mean(dim=2)
    tensors, counts = [query + 5 * query.mean(dim=2, keepdim=True), key, value], torch.ones(2, 1, dtype=torch.int32, device=DEVICE)
    assert all(x.isfinite().all() for x in ours(tensors, counts, 0, None, None))


@pytest.mark.parametrize("padded", [False, True])
def test_padding_goes_by_the_reference_and_everything_else_by_the_kernel(padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(dispatch, "on_gpu", lambda tensor: True)
    monkeypatch.setattr("moa_lab.kernels.drawn.drawn_windows", lambda query, *_: calls.append(query.shape[2]) or query)
    query, key, value = inputs(130, 2, 2, 16, torch.float32)
    real = torch.ones(2, 130, dtype=torch.bool, device=DEVICE)
    real[1, :40] = False
    mask = KeyMask(2, 130, 130, torch.device(DEVICE), real=real if padded else None)
    shift = torch.zeros(2, 2, 3, device=DEVICE)
    found = drawn_attention(query, key, value, mask, shift, drawn(130, 2), 64, SCALE)
    assert calls == ([] if padded else [130])
    assert found.isfinite().all()
