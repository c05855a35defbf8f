"""Lists of key blocks against brute force, and FlashAttention-4 with them, where it is installed, against the reference."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from moa_lab.bench.prefill import FLASH as FLASH_ROW
from moa_lab.bench.prefill import TRITON as TRITON_ROW
from moa_lab.bench.record import BenchRecord
from moa_lab.kernels.block_lists import block_lists
from moa_lab.kernels.flash import FEWEST, flash_prefill, seen_by, tile
from moa_lab.kernels.reference import masked_attention
from moa_lab.masks import visible
from moa_lab.shipped import data_folder

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
FLASH = find_spec("flash_attn") is not None


@pytest.mark.parametrize("n_tokens", [1, 63, 200, 900])
@pytest.mark.parametrize("blocks", [(64, 64), (128, 80), (192, 128)])
@pytest.mark.parametrize("sink", [0, 64, 300])
def test_a_block_is_listed_as_whole_where_all_is_seen_and_as_partial_where_some_is(
    n_tokens: int, blocks: tuple[int, int], sink: int
) -> None:
    windows = (1, 40, 64, 333, n_tokens)
    table = seen_by(windows, 2, sink, torch.device(DEVICE))
    lists = block_lists(table, n_tokens, *blocks)
    token = torch.arange(n_tokens)
    for head in range(2 * len(windows)):
        shown = visible(token[:, None], token, sink, torch.tensor(windows[head // 2]))
        for row, queries in enumerate(shown.split(blocks[0])):
            seen = queries.split(blocks[1], dim=1)
            whole = [at for at, part in enumerate(seen) if part.all()]
            partial = [at for at, part in enumerate(seen) if part.any() and not part.all()]
            for wanted, counts, found in ((whole, lists.whole_count, lists.whole), (partial, lists.partial_count, lists.partial)):
                assert found[head, row, : int(counts[head, row])].tolist() == wanted, (head, row)


@pytest.mark.skipif(not (HOPPER and FLASH), reason="needs a Hopper GPU and FlashAttention-4")
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("n_tokens", [1000, 2048])
def test_flash_attention_sees_what_the_reference_sees(head_dim: int, kv_heads: int, n_tokens: int) -> None:
    generator = torch.Generator().manual_seed(head_dim)
    shapes = [(2, n_tokens, heads, head_dim) for heads in (4, kv_heads, kv_heads)]
    query, key, value = (torch.randn(shape, generator=generator).to(DEVICE, torch.bfloat16).transpose(1, 2) for shape in shapes)
    windows = [50, 333, 64, n_tokens][:kv_heads]
    found = flash_prefill(query, key, value, windows, 64, head_dim**-0.5)
    token = torch.arange(n_tokens, device=DEVICE)
    per_head = torch.tensor(windows, device=DEVICE).repeat_interleave(4 // kv_heads)[None, :, None, None]
    shown = visible(token[:, None], token, 64, per_head)
    wanted = masked_attention(query.float(), key.float(), value.float(), shown, head_dim**-0.5)
    torch.testing.assert_close(found.float(), wanted, atol=3e-2, rtol=3e-2)


def test_the_faster_of_the_two_kernels_is_chosen_for_every_shape_of_the_record() -> None:
    rows = BenchRecord.load(data_folder("benchmarks") / "prefill.json").rows
    compared = 0
    for row in rows:
        peers = {name: peer.get("rate") for name, peer in row.detail.get("peers", {}).items()}
        rates = {row.detail.get("kernel"): row.detail.get("rate"), **peers}
        if rates.keys() >= {FLASH_ROW, TRITON_ROW}:
            long = row.shape["n_tokens"] >= FEWEST[row.shape["head_dim"]]
            taken, other = (FLASH_ROW, TRITON_ROW) if long else (TRITON_ROW, FLASH_ROW)
            assert rates[taken] >= rates[other], row.shape
            compared += 1
    assert {row.shape["head_dim"] for row in rows} == set(FEWEST)
    assert compared > len(FEWEST)


def test_tiles_are_those_that_the_library_takes() -> None:
    assert [tile(size) for size in (64, 128, 256)] == [(192, 128), (128, 128), (128, 80)]
