from __future__ import annotations

import numpy as np
import pytest
import torch
from ring_oracle import HEAD_DIM, Chunk, Sequences

from moa_lab.cache import LayerLayout
from moa_lab.serving import PageLayout
from moa_lab.serving.paged import PagedLayer, Scoring, Step, paged_attention

CAPACITY = 400


class Pages:
    """A pool, and the pages that rows took from it; pages that nobody has hold NaN."""

    def __init__(self, layout: LayerLayout, page_tokens: int, rows: int, seed: int = 0) -> None:
        # A second layer, whose pages lie between.
        self.layout = PageLayout((LayerLayout(2, (9, 500), None, CAPACITY), layout), page_tokens)
        self.layer = PagedLayer(self.layout, 1, torch.device("cpu"))
        columns = self.layout.pages_for(CAPACITY)
        self.free = (1 + torch.randperm(rows * columns, generator=torch.Generator().manual_seed(seed))).tolist()
        self.pool = torch.full((1 + rows * columns, 2, page_tokens, HEAD_DIM), float("nan"))
        self.pool[0] = 0
        self.table = torch.zeros(rows, columns, dtype=torch.int32)
        self.taken = [0] * rows

    def grow(self, lengths: list[int]) -> None:
        for row, length in enumerate(lengths):
            wanted = self.layout.pages_for(length)
            for column in range(self.taken[row], wanted):
                self.table[row, column] = self.free.pop()
            self.taken[row] = max(self.taken[row], wanted)


def by_pages(rows: Sequences, pages: Pages, chunk: Chunk) -> torch.Tensor:
    """What the new tokens of all rows get, padded as `chunk` is; rows may have none."""
    counts = (chunk.key.shape[2] - chunk.padding).tolist()
    pages.grow(chunk.lengths.tolist())
    has = [row for row, count in enumerate(counts) if count]
    flat = [torch.cat([x[row, :, -counts[row] :].transpose(0, 1) for row in has]) for x in (chunk.query, chunk.key, chunk.value)]
    firsts = torch.tensor([0, *np.cumsum([counts[row] for row in has])])
    step = Step(pages.table[has], chunk.lengths[has].long(), firsts)
    found = paged_attention(pages.layer, pages.pool, *flat, step, Scoring(rows.scale, rows.softcap, rows.sink_logits))
    output = torch.zeros_like(chunk.query)
    for at, row in enumerate(has):
        output[row, :, -counts[row] :] = found[firsts[at] : firsts[at + 1]].transpose(0, 1)
    return output


def check(layout: LayerLayout, page_tokens: int, steps: list[list[int]], **settings: object) -> None:
    rows = Sequences(layout, len(steps[0]), **settings)  # type: ignore[arg-type]
    pages = Pages(layout, page_tokens, len(steps[0]))
    for counts in steps:
        chunk = rows.chunk(counts)
        torch.testing.assert_close(by_pages(rows, pages, chunk), rows.expected(chunk), atol=2e-5, rtol=2e-5)
    assert pages.pool[0].eq(0).all()


STEPS = [[70, 3, 1], [1, 40, 1], [1, 1, 0], [33, 0, 64], [1, 1, 1], [2, 90, 1], [1, 1, 1], [64, 1, 65]]


@pytest.mark.parametrize("page_tokens", [1, 16, 64])
@pytest.mark.parametrize("windows", [(1, 28), (60, 1000), (28, 29)])
@pytest.mark.parametrize("sink_tokens", [0, 4])
def test_ragged_chunks_and_single_tokens_see_the_sink_and_the_window(page_tokens: int, windows: tuple[int, int], sink_tokens: int) -> None:
    check(LayerLayout(sink_tokens, windows, None, CAPACITY), page_tokens, STEPS)


@pytest.mark.parametrize("reach", [20, 48, 100])
def test_a_layers_own_window_hides_what_lies_beyond_also_the_sink(reach: int) -> None:
    check(LayerLayout(4, (30, 90), reach, CAPACITY), 16, STEPS)


@pytest.mark.parametrize("settings", [{"softcap": 5.0}, {"sinks": True}, {"group": 1}, {"group": 4, "softcap": 2.0, "sinks": True}])
def test_capped_scores_sink_logits_and_groups_are_those_of_the_reference(settings: dict[str, object]) -> None:
    check(LayerLayout(4, (20, 1000), None, CAPACITY), 16, STEPS, **settings)


def test_rings_wrap_many_times() -> None:
    check(LayerLayout(3, (7, 13), None, CAPACITY), 8, [[30, 1]] + [[1, 1]] * 100)


def test_a_page_that_another_request_left_is_read_no_further_than_it_was_written() -> None:
    layout = LayerLayout(4, (20, 1000), None, CAPACITY)
    rows, pages = Sequences(layout, 2), Pages(layout, 16, 2)
    by_pages(rows, pages, rows.chunk([50, 17]))
    # Row 0 ends, NaN in all that it had, and a new request takes its pages.
    pages.free += pages.table[0, : pages.taken[0]].tolist()
    pages.pool[pages.table[0, : pages.taken[0]].long()] = float("nan")
    pages.taken[0] = 0
    fresh = Sequences(layout, 2, seed=1)
    fresh.chunk([0, 17])
    chunk = fresh.chunk([21, 0])
    torch.testing.assert_close(by_pages(fresh, pages, chunk), fresh.expected(chunk), atol=2e-5, rtol=2e-5)
