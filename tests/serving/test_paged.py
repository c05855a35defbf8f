from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pages_oracle import CAPACITY, Pages, by_pages, check
from ring_attends import DEVICE
from ring_oracle import HEAD_DIM, Sequences

from moa_lab.cache import LayerLayout
from moa_lab.kernels import paged as paged_launch
from moa_lab.serving import paged, paged_kernels
from moa_lab.serving.page_pool import page_bytes
from moa_lab.serving.step import Scoring, Step

STEPS = [[70, 3, 1], [1, 40, 1], [1, 1, 0], [33, 0, 64], [1, 1, 1], [2, 90, 1], [1, 1, 1], [64, 1, 65]]


@pytest.fixture(autouse=True, params=["kernels", "plain"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """By kernels, without a GPU in Triton's interpreter, and in plain PyTorch."""
    monkeypatch.setattr(paged, "kernel_applies", lambda *_: request.param == "kernels")


@pytest.mark.parametrize(("page_tokens", "sink_tokens"), [(1, 4), (16, 0), (48, 3), (128, 4)])
@pytest.mark.parametrize("windows", [(1, 28), (60, 1000), (28, 29)])
def test_ragged_chunks_and_single_tokens_see_the_sink_and_the_window(page_tokens: int, windows: tuple[int, int], sink_tokens: int) -> None:
    check(LayerLayout(sink_tokens, windows, None, CAPACITY), page_tokens, STEPS)


@pytest.mark.parametrize("reach", [20, 48, 100])
def test_a_layers_own_window_hides_what_lies_beyond_also_the_sink(reach: int) -> None:
    check(LayerLayout(4, (30, 90), reach, CAPACITY), 16, STEPS)


@pytest.mark.parametrize("settings", [{"softcap": 5.0}, {"sinks": True}, {"group": 1}, {"group": 4, "softcap": 2.0, "sinks": True}])
def test_capped_scores_sink_logits_and_groups_are_those_of_the_reference(settings: dict[str, object]) -> None:
    check(LayerLayout(4, (20, 1000), None, CAPACITY), 16, STEPS, **settings)


@pytest.mark.parametrize("at_least", [(7,), (4, 4, 4, 4), (6, 5, 1)])
def test_places_that_another_device_has_heads_for_are_left_out(at_least: tuple[int, ...]) -> None:
    check(LayerLayout(4, (20, 60), None, CAPACITY), 16, STEPS, at_least)


def test_rings_wrap_many_times() -> None:
    check(LayerLayout(3, (7, 13), None, CAPACITY), 8, [[30, 1]] + [[1, 1]] * 40)


def test_a_page_that_another_request_left_is_read_no_further_than_it_was_written() -> None:
    layout = LayerLayout(4, (20, 1000), None, CAPACITY)
    rows, pages = Sequences(layout, 2, device=DEVICE), Pages(layout, 16, 2)
    by_pages(rows, pages, rows.chunk([50, 17]))
    # A new request takes the pages of row 0.
    pages.leave(0)
    fresh = Sequences(layout, 2, seed=1, device=DEVICE)
    fresh.chunk([0, 17])
    chunk = fresh.chunk([21, 0])
    torch.testing.assert_close(by_pages(fresh, pages, chunk), fresh.expected(chunk), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "group"), [(torch.float32, 24, 3), (torch.float16, 64, 1), (torch.float16, 16, 8)], ids=lambda value: str(value)
)
def test_a_heads_slots_are_divided_among_programs(dtype: torch.dtype, head_dim: int, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_launch, "SPLIT", 64)
    steps = [[200, 3, 1], [1, 64, 1], [1, 1, 1], [1, 1, 64]]
    check(LayerLayout(4, (90, 1000), None, CAPACITY), 16, steps, dtype=dtype, head_dim=head_dim, group=group)


def test_what_a_row_holds_is_read_of_some_heads_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two heads and then the third, of longer rows of one after another."""
    monkeypatch.setattr(paged_kernels, "MOST_READ", 2 * 240 * HEAD_DIM * 4)
    for bits in (None, [(8, 4)] * 3):
        check(LayerLayout(4, (20, 1000, 60), 90, CAPACITY), 16, STEPS, softcap=5.0, sinks=True, bits=bits)


def test_rows_of_other_lengths_have_windows_of_their_own() -> None:
    """A batch of two buckets: every row sees the windows of its own, and its pages lie where its own layout says."""
    layouts = LayerLayout(4, (20, 300), None, CAPACITY), LayerLayout(4, (60, 1000), None, CAPACITY)
    rows = [Sequences(layout, 2, seed=seed, device=DEVICE) for seed, layout in enumerate(layouts)]
    pages = Pages(layouts[1], 16, 2, others=layouts[:1])
    pages.buckets = [0, 1]
    for counts in ([70, 3], [1, 90], [1, 1], [33, 1], [1, 1], [64, 64], [1, 1]):
        first, second = (each.chunk(counts) for each in rows)
        chunk = replace(
            first, **{name: torch.stack([getattr(first, name)[0], getattr(second, name)[1]]) for name in ("query", "key", "value")}
        )
        expected = torch.stack([rows[0].expected(first)[0], rows[1].expected(second)[1]])
        torch.testing.assert_close(by_pages(rows[0], pages, chunk), expected, atol=2e-5, rtol=2e-5)


def test_a_pass_with_more_tokens_than_rows_bring_writes_those_of_its_rows_alone(request: pytest.FixtureRequest) -> None:
    """As in a graph that was captured for more requests: the rows behind the last have no token and no length."""
    only_kernels(request)
    layout = LayerLayout(4, (20, 1000), None, CAPACITY)
    rows, pages = Sequences(layout, 2, device=DEVICE), Pages(layout, 16, 4)
    by_pages(rows, pages, rows.chunk([50, 17]))
    chunk = rows.chunk([1, 1])
    pages.grow(chunk.lengths.tolist())
    before = pages.raw.clone()
    step = padded(pages, chunk.lengths.long())
    flat = [torch.cat([x[:, :, 0], torch.full_like(x[:, :, 0], torch.nan)]) for x in (chunk.query, chunk.key, chunk.value)]
    found = paged.layer_attention(pages.kinds, pages.raw, *flat, step, Scoring(rows.scale))
    torch.testing.assert_close(found[:2, :, None], rows.expected(chunk), atol=2e-5, rtol=2e-5)
    written = (pages.raw != before).any(dim=1).nonzero().flatten()
    assert len(written)
    assert set(written.tolist()) <= set(pages.table[:2].flatten().tolist()) - {0}


def only_kernels(request: pytest.FixtureRequest) -> None:
    if "plain" in request.node.callspec.id:
        pytest.skip("graphs are captured of kernels alone")


def padded(pages: Pages, lengths: torch.Tensor) -> Step:
    """One new token of each of the first rows, in a pass for all rows of `pages`."""
    count, rows = len(pages.table), len(lengths)
    firsts = torch.arange(count + 1, device=lengths.device).clamp(max=rows)
    filled = torch.nn.functional.pad(lengths, (0, count - rows))
    # What the host knew when the graph was captured.
    return Step(pages.table, torch.tensor(pages.buckets, device=lengths.device), filled, firsts, (list(range(count + 1)), [1] * count))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: graphs are CUDA's")
def test_a_captured_pass_holds_for_later_lengths_and_fewer_rows(request: pytest.FixtureRequest) -> None:
    only_kernels(request)
    layout = LayerLayout(4, (20, 1000), None, CAPACITY)
    rows, pages = Sequences(layout, 3, device=DEVICE), Pages(layout, 16, 4)
    by_pages(rows, pages, rows.chunk([50, 17, 90]))
    lengths = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    firsts = torch.zeros(5, dtype=torch.int64, device=DEVICE)
    query, key, value = (torch.zeros(4, heads, HEAD_DIM, device=DEVICE) for heads in (4, 2, 2))
    buckets, on_host = torch.tensor(pages.buckets, device=DEVICE), (list(range(5)), [1] * 4)

    def attend() -> torch.Tensor:
        step = Step(pages.table, buckets, lengths, firsts, on_host)
        return paged.layer_attention(pages.kinds, pages.raw, query, key, value, step, Scoring(rows.scale))

    attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = attend()
    for counts in ([1, 1, 1], [1, 1, 1], [1, 1, 1]):
        chunk = rows.chunk(counts)
        pages.grow(chunk.lengths.tolist())
        step = padded(pages, chunk.lengths.long())
        lengths.copy_(step.lengths)
        firsts.copy_(step.firsts)
        for held, given in zip((query, key, value), (chunk.query, chunk.key, chunk.value), strict=True):
            held[:3] = given[:, :, 0]
        graph.replay()
        torch.testing.assert_close(found[:3, :, None], rows.expected(chunk), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("bits", [(8, 8), (8, 4), (16, 4), (4, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_pages_of_codes_hold_what_a_packed_ring_does(bits: tuple[int, int], dtype: torch.dtype) -> None:
    layout = LayerLayout(4, (28, 1000), None, CAPACITY)
    check(layout, 16, STEPS, bits=[bits, bits], dtype=dtype, head_dim=24)


@pytest.mark.parametrize(
    ("head_dim", "page_tokens", "bits", "settings"),
    [
        (64, 32, (8, 4), {"group": 4, "softcap": 2.0}),
        (128, 64, (8, 8), {"group": 1, "sinks": True}),
        (128, 48, (8, 8), {}),
        (128, 32, (4, 16), {"group": 9}),
        (256, 64, (4, 4), {}),
    ],
)  # fmt: skip
def test_heads_whose_codes_single_warps_read_where_a_tile_lies_in_a_page(
    head_dim: int, page_tokens: int, bits: tuple[int, int], settings: dict[str, object]
) -> None:
    layout = LayerLayout(4, (28, 1000), None, CAPACITY)
    check(layout, page_tokens, STEPS[:4], bits=[bits, bits], dtype=torch.float16, head_dim=head_dim, **settings)


def test_codes_of_a_layer_with_a_window_of_its_own_are_read_by_single_warps() -> None:
    check(LayerLayout(4, (30, 90), 48, CAPACITY), 32, STEPS[:5], bits=[(8, 8)] * 2, dtype=torch.float16, head_dim=64)


@pytest.mark.parametrize("bits", [[(8, 8), (16, 16), (8, 4), (8, 8)], [(16, 16), (4, 4), (4, 4), (4, 4)]])
def test_heads_that_store_other_bits_have_pages_of_as_many_bytes(bits: list[tuple[int, int]]) -> None:
    layout = LayerLayout(4, (28, 1000, 60, 300), None, CAPACITY)
    check(layout, 32, STEPS, bits=bits, dtype=torch.float16, head_dim=24, sinks=True)


def test_a_page_takes_what_the_plan_says_of_its_bits() -> None:
    assert page_bytes(64, 128, torch.bfloat16) == 2 * 64 * 128 * 2
    assert page_bytes(64, 128, torch.bfloat16, (8, 8)) == 2 * 64 * (128 + 4)
    assert page_bytes(64, 128, torch.bfloat16, (8, 4)) == 64 * (128 + 4 + 64 + 4)
