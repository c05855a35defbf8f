"""The Triton prefill kernel, interpreted on a CPU (or compiled on a GPU), held against the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moa_lab.kernels import prefill
from moa_lab.kernels.prefill import prefill_attention
from moa_lab.kernels.reference import masked_attention
from moa_lab.masks import visible

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def inputs(
    heads: int, kv_heads: int, n_queries: int, n_keys: int, head_dim: int, dtype: torch.dtype, batch: int = 2
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(head_dim + n_keys)
    shapes = [(batch, n_queries, heads, head_dim), (batch, n_keys, kv_heads, head_dim), (batch, n_keys, kv_heads, head_dim)]
    # As transformers hands them over: heads and tokens swapped in memory.
    query, key, value = (torch.randn(shape, generator=generator).to(DEVICE, dtype).transpose(1, 2) for shape in shapes)
    return query, key, value


def expected(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, windows: list[int], sink: int, scale: float,
    first: list[int], reach: int | None, softcap: float | None, sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """`masked_attention` with the mask of `visible`, in float32."""
    n_queries, n_keys = query.shape[2], key.shape[2]
    start = torch.tensor(first, device=query.device)[:, None, None, None]
    known = torch.arange(n_keys, device=query.device)[None, None, None, :] - start
    asked = torch.arange(n_keys - n_queries, n_keys, device=query.device)[None, None, :, None] - start
    per_head = torch.tensor(windows, device=query.device).repeat_interleave(query.shape[1] // key.shape[1])[None, :, None, None]
    shown = visible(asked, known, sink, per_head) & (known >= 0) & (asked - known < (reach or n_keys))
    found = masked_attention(query.float(), key.float(), value.float(), shown, scale, softcap, sink_logits)
    return torch.where(shown.any(dim=-1, keepdim=True), found, 0.0)


def check(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, windows: list[int], sink: int = 20, *,
    first: list[int] | None = None, reach: int | None = None, softcap: float | None = None, scale: float = 0.2,
    sink_logits: torch.Tensor | None = None,
) -> None:  # fmt: skip
    starts = None if first is None else torch.tensor(first, dtype=torch.int32, device=query.device)
    found = prefill_attention(
        query, key, value, torch.tensor(windows, dtype=torch.int32, device=query.device), sink, scale,
        first=starts, reach=reach, softcap=softcap, sink_logits=sink_logits,
    )  # fmt: skip
    assert found.dtype == query.dtype
    wanted = expected(query, key, value, windows, sink, scale, first or [0] * len(query), reach, softcap, sink_logits)
    torch.testing.assert_close(found.float(), wanted, atol=TOLERANCE[query.dtype], rtol=TOLERANCE[query.dtype])


@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
def test_every_head_dimension(head_dim: int) -> None:
    check(*inputs(2, 1, 150, 150, head_dim, torch.float16), [50], scale=head_dim**-0.5)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (4, 1)])
def test_heads_read_the_kv_head_of_their_group(heads: int, kv_heads: int) -> None:
    check(*inputs(heads, kv_heads, 200, 200, 32, torch.float32), [40, 200, 1, 130][:kv_heads])


@pytest.mark.parametrize("window", [1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 269, 270, 400])
def test_windows_around_the_edges_of_tiles(window: int) -> None:
    check(*inputs(1, 1, 270, 270, 16, torch.float32), [window])


@pytest.mark.parametrize("sink", [0, 1, 31, 32, 33, 64, 300])
def test_sinks_around_the_edges_of_tiles(sink: int) -> None:
    check(*inputs(2, 2, 270, 270, 16, torch.float32), [40, 100], sink)


@pytest.mark.parametrize(("n_queries", "n_keys"), [(1, 1), (1, 200), (7, 200), (64, 200), (65, 129), (128, 128), (199, 200)])
def test_queries_that_continue_a_sequence(n_queries: int, n_keys: int) -> None:
    check(*inputs(2, 2, n_queries, n_keys, 16, torch.float32), [40, 150])


@pytest.mark.parametrize("first", [[0, 5], [70, 0], [33, 139], [64, 128]])
@pytest.mark.parametrize("n_queries", [140, 30])
def test_rows_that_are_padded_on_the_left(first: list[int], n_queries: int) -> None:
    check(*inputs(2, 2, n_queries, 140, 16, torch.float32), [25, 90], first=first)


@pytest.mark.parametrize("reach", [1, 20, 64, 100])
@pytest.mark.parametrize("first", [None, [0, 70]])
def test_a_layers_own_window_hides_the_sink_too(reach: int, first: list[int] | None) -> None:
    check(*inputs(2, 2, 200, 200, 16, torch.float32), [30, 150], first=first, reach=reach)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_soft_capped_scores(dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("Triton's interpreter multiplies bfloat16 wrongly; the GPU runs this")
    check(*inputs(4, 2, 150, 150, 64, dtype), [40, 100], softcap=3.0, scale=0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("first", [None, [0, 70]])
def test_a_sink_logit_of_every_query_head_takes_its_weight(dtype: torch.dtype, first: list[int] | None) -> None:
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("Triton's interpreter multiplies bfloat16 wrongly; the GPU runs this")
    # The last one dwarfs every score; minus infinity is no sink at all.
    logits = torch.tensor([0.5, -3.0, float("-inf"), 60.0], device=DEVICE, dtype=dtype)[:, None, None]
    check(*inputs(4, 2, 150, 150, 16, dtype), [40, 100], first=first, reach=120, sink_logits=logits)


@pytest.mark.parametrize("wave", [32, 64])
@pytest.mark.parametrize("head_dim", [64, 256])
def test_tiles_for_waves_of_any_width(wave: int, head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "wave_lanes", lambda _: wave)
    tensors = inputs(2, 2, 100, 150, head_dim, torch.float16)
    check(*tensors, [40, 140], scale=head_dim**-0.5)
    check(*tensors, [1, 90], 30, first=[0, 70], reach=100, softcap=5.0, scale=head_dim**-0.5)
    test_keys_that_nobody_sees_are_never_loaded(head_dim)


@pytest.mark.parametrize("head_dim", [16])
def test_keys_that_nobody_sees_are_never_loaded(head_dim: int) -> None:
    query, key, value = inputs(1, 1, 64, 512, head_dim, torch.float32, batch=1)
    # Loaded, even a weight of nothing would spoil the sum.
    value[:, :, 64 : 512 - 64 - 96] = float("nan")
    windows = torch.tensor([32], dtype=torch.int32, device=DEVICE)
    assert prefill_attention(query, key, value, windows, 20, 0.2).isfinite().all()


@pytest.mark.parametrize("head_dim", [16, 80])
def test_tiles_are_loaded_by_descriptors_where_these_work_and_by_pointers_elsewhere(head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def pointers(tensor: torch.Tensor) -> bool:
        asked.append(described(tensor))
        return False

    described = prefill._describes
    tensors = inputs(4, 2, 150, 200, head_dim, torch.float16)
    check(*tensors, [40, 190], first=[0, 23], softcap=5.0)
    monkeypatch.setattr(prefill, "_describes", pointers)
    check(*tensors, [40, 190], first=[0, 23], softcap=5.0)
    able = DEVICE == "cpu" or torch.cuda.get_device_capability() >= (9, 0)
    assert asked == [able] * len(asked)
    assert asked


def test_keys_that_no_descriptor_can_describe_are_loaded_all_the_same() -> None:
    query, key, value = (torch.cat([x, x], dim=-1)[..., 1:17] for x in inputs(2, 2, 70, 70, 16, torch.float16))
    assert not prefill._describes(key)
    check(query, key, value, [20, 60])


def test_shapes_that_do_not_fit_are_refused() -> None:
    query, key, value = inputs(4, 2, 8, 8, 16, torch.float32)
    windows = torch.tensor([4, 4], dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="do not fit together"):
        prefill_attention(query[:, :3], key, value, windows, 4, 0.2)
    with pytest.raises(ValueError, match="do not fit together"):
        prefill_attention(query, key[:, :, :4], value[:, :, :4], windows, 4, 0.2)
    with pytest.raises(ValueError, match="windows must be"):
        prefill_attention(query, key, value, windows[:1], 4, 0.2)
    with pytest.raises(ValueError, match="scale must be positive"):
        prefill_attention(query, key, value, windows, 4, 0.0)


def test_random_cases_of_everything_at_once() -> None:
    random = np.random.default_rng(0)
    for _ in range(25):
        kv_heads, n_keys = int(random.integers(1, 4)), int(random.integers(1, 300))
        n_queries, batch = int(random.integers(1, n_keys + 1)), int(random.integers(1, 4))
        tensors = inputs(kv_heads * int(random.integers(1, 4)), kv_heads, n_queries, n_keys, 16, torch.float32, batch)
        check(
            *tensors, [int(w) for w in random.integers(1, n_keys + 10, kv_heads)], int(random.integers(0, 80)),
            first=[int(f) for f in random.integers(0, n_keys, batch)],
            reach=None if random.random() < 0.5 else int(random.integers(1, n_keys + 10)),
            softcap=None if random.random() < 0.5 else 2.0,
        )  # fmt: skip
