"""The reference attention, held against the formula written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moa_lab.kernels import reference
from moa_lab.kernels.reference import masked_attention, windowed_attention
from moa_lab.masks import visible


def by_hand(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, shown: torch.Tensor, scale: float, softcap: float | None
) -> torch.Tensor:
    """One head and one query at a time: only the keys that are shown are ever touched."""
    batch, heads, n_queries, _ = query.shape
    shown = shown.expand(batch, heads, n_queries, key.shape[2])
    output = torch.zeros_like(query)
    for b in range(batch):
        for head in range(heads):
            kv_head = head // (heads // key.shape[1])
            for i in range(n_queries):
                seen = shown[b, head, i].nonzero().flatten()
                scores = key[b, kv_head, seen] @ query[b, head, i] * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                weights = scores.exp() / scores.exp().sum()
                output[b, head, i] = weights @ value[b, kv_head, seen]
    return output


def random_attention(heads: int, kv_heads: int, n_queries: int = 7, n_keys: int = 9) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(heads)
    query = torch.randn(2, heads, n_queries, 8, generator=generator)
    key, value = (torch.randn(2, kv_heads, n_keys, 8, generator=generator) for _ in range(2))
    shown = torch.rand(2, heads, n_queries, n_keys, generator=generator) < 0.4
    # A query always sees itself.
    shown |= torch.eye(n_queries, n_keys).bool()
    return query, key, value, shown


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
def test_masked_attention_equals_the_formula_head_by_head(heads: int, kv_heads: int, softcap: float | None) -> None:
    query, key, value, shown = random_attention(heads, kv_heads)
    found = masked_attention(query, key, value, shown, 0.4, softcap)
    torch.testing.assert_close(found, by_hand(query, key, value, shown, 0.4, softcap), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_a_mask_of_one_head_holds_for_all(softcap: float | None) -> None:
    query, key, value, shown = random_attention(4, 2)
    shared = shown[:1, :1]
    found = masked_attention(query, key, value, shared, 0.4, softcap)
    torch.testing.assert_close(found, masked_attention(query, key, value, shared.expand_as(shown), 0.4, softcap))


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_hidden_keys_of_huge_size_change_nothing(softcap: float | None) -> None:
    query, key, value, _ = random_attention(4, 2)
    shown = torch.ones(1, 1, 7, 9, dtype=torch.bool)
    shown[..., 3:6] = False
    expected = masked_attention(query, key, value, shown, 0.4, softcap)
    key[:, :, 3:6], value[:, :, 3:6] = 1e18, -1e30
    torch.testing.assert_close(masked_attention(query, key, value, shown, 0.4, softcap), expected, atol=0, rtol=0)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_the_output_keeps_the_dtype_of_the_query(softcap: float | None) -> None:
    query, key, value, shown = random_attention(4, 2)
    found = masked_attention(query.bfloat16(), key.bfloat16(), value.bfloat16(), shown, 0.4, softcap)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), masked_attention(query, key, value, shown, 0.4, softcap), atol=0.05, rtol=0.05)


def positions_of(first: list[int], n_queries: int, n_keys: int, own_window: int | None = None) -> torch.Tensor:
    """Key positions of rows that are padded on the left by `first` keys; -1 for the future, padding and beyond the layer's window."""
    key = torch.arange(n_keys)
    asked = key[n_keys - n_queries :, None]
    near = key > asked - own_window if own_window else torch.ones(n_queries, n_keys, dtype=torch.bool)
    rows = [torch.where((key <= asked) & (key >= start) & near, key - start, -1) for start in first]
    codes = torch.stack(rows)[:, None].int()
    return torch.where(codes.amax(dim=-1, keepdim=True) < 0, 0, codes)


WINDOWS = np.array([3, 64, 11, 3])


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("first", [[0, 0], [0, 9], [0, 64]])
@pytest.mark.parametrize(
    ("n_queries", "n_keys", "own_window"), [(64, 64, None), (64, 64, 7), (20, 64, None), (1, 64, None), (17, 17, None)]
)
def test_windows_in_blocks_equal_one_mask_for_all(
    first: list[int], n_queries: int, n_keys: int, own_window: int | None, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "QUERY_BLOCK", 8)
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(2, 8, n_queries, 8, generator=generator)
    key, value = (torch.randn(2, 4, n_keys, 8, generator=generator) for _ in range(2))
    positions = positions_of([min(start, n_keys) for start in first], n_queries, n_keys, own_window)
    asked = positions.amax(dim=-1, keepdim=True)
    windows = torch.from_numpy(WINDOWS).repeat_interleave(2)[:, None, None]
    shown = visible(asked, positions, 4, windows) & (positions >= 0)
    expected = masked_attention(query, key, value, shown, 0.4, softcap)
    found = windowed_attention(query, key, value, asked, positions, 4, WINDOWS, 0.4, softcap)
    # Nobody reads what a padding query sees.
    real = torch.stack([torch.arange(n_keys - n_queries, n_keys) >= start for start in first])[:, None, :, None]
    assert found.isfinite().all()
    torch.testing.assert_close(found.where(real, 0), expected.where(real, 0), atol=1e-5, rtol=1e-5)


def test_a_cache_with_room_behind_the_newest_key_hides_nothing_that_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "QUERY_BLOCK", 8)
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(1, 8, 20, 8, generator=generator)
    key, value = (torch.randn(1, 4, 64, 8, generator=generator) for _ in range(2))
    positions = torch.nn.functional.pad(positions_of([0], 20, 30), (0, 34), value=-1)
    asked = positions.amax(dim=-1, keepdim=True)
    arguments = (asked, positions[..., :30], 4, WINDOWS, 0.4)
    expected = windowed_attention(query, key[:, :, :30], value[:, :, :30], *arguments)
    found = windowed_attention(query, key, value, asked, positions, 4, WINDOWS, 0.4)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_keys_that_no_query_of_a_block_reaches_are_not_read() -> None:
    n, window = 4 * reference.QUERY_BLOCK, 100
    query, key, value = (torch.randn(1, 1, n, 8) for _ in range(3))
    positions = positions_of([0], n, n)
    # A value that is multiplied by a weight of nothing would still spoil the sum.
    value[:, :, 50 : n - reference.QUERY_BLOCK - window] = float("nan")
    found = windowed_attention(query, key, value, positions.amax(-1, keepdim=True), positions, 4, np.array([window]), 0.4)
    assert found[:, :, -reference.QUERY_BLOCK :].isfinite().all()
