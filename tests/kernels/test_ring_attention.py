"""Attention over the ring, by the reference and by Triton, held against a cache that keeps everything."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ring_attends import DEVICE, Attend, by_reference, by_triton, by_unrolled, check
from ring_oracle import Sequences, random_layout

from moa_lab.cache import LayerLayout
from moa_lab.geometry import MAX_TOKENS
from moa_lab.kernels import decode, prefill
from moa_lab.kernels.schedule import decode_schedule
from moa_lab.kernels.write import ring_write

WAYS = pytest.mark.parametrize("attend", [by_reference, by_triton, by_unrolled])


@WAYS
@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_any_layout_and_any_chunks_equal_attention_over_all_that_was_seen(attend: Attend, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = Sequences(random_layout(rng), 2, group=int(rng.integers(1, 4)), seed=seed % 1000, device=DEVICE)
    for _ in range(6):
        longest = min(20, rows.layout.capacity - int(rows.lengths.max()))
        if longest < 1:
            break
        single = rng.random() < 0.6 and int(rows.lengths.min()) > 0
        counts = [1, 1] if single else [int(n) for n in rng.integers(1, longest + 1, size=2)]
        check(attend, rows, counts)


@WAYS
@pytest.mark.parametrize("prompt", [14, 15, 16, 17, 18, 40])
def test_one_token_after_another_past_the_windows_edge(attend: Attend, prompt: int) -> None:
    rows = Sequences(LayerLayout(4, (12, 5, 1000), None, capacity=80), 2, device=DEVICE)
    check(attend, rows, [prompt, prompt - 9])
    for _ in range(4):
        check(attend, rows, [1, 1])


@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
def test_every_head_dimension(head_dim: int) -> None:
    rows = Sequences(LayerLayout(4, (20, 90), None, capacity=80), 1, head_dim=head_dim, dtype=torch.float16, device=DEVICE)
    check(by_triton, rows, [70])
    check(by_triton, rows, [1])


@pytest.mark.parametrize("head_dim", [64, 256])
def test_tiles_for_waves_of_32_lanes(head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (prefill, decode):
        monkeypatch.setattr(module, "wave_lanes", lambda _: 32)
    rows = Sequences(LayerLayout(4, (20, 90), None, capacity=80), 2, head_dim=head_dim, dtype=torch.float16, device=DEVICE)
    tile = decode.tile_slots(rows.ring)
    assert tile == {64: 32, 256: 16}[head_dim]
    check(by_triton, rows, [40, 23])
    # There no load chooses between the ring and the new tokens.
    check(by_triton, rows, [30, 9])
    check(partial(by_triton, tile=tile), rows, [1, 1])


@pytest.mark.parametrize("group", [1, 3, 8, 17])
def test_every_number_of_query_heads_to_a_kv_head(group: int) -> None:
    rows = Sequences(LayerLayout(4, (20, 90), None, capacity=80), 2, group=group, device=DEVICE)
    check(by_triton, rows, [70, 33])
    check(by_triton, rows, [1, 1])


@WAYS
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("reach", [None, 30])
def test_capped_scores_and_a_layers_own_window(attend: Attend, softcap: float | None, reach: int | None) -> None:
    rows = Sequences(LayerLayout(8, (9, 25, 28, 90), reach, capacity=80), 2, softcap=softcap, device=DEVICE)
    check(attend, rows, [60, 21])
    for _ in range(3):
        check(attend, rows, [1, 1])


@WAYS
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_sink_logit_of_every_query_head_counts_once_over_all_segments(attend: Attend, softcap: float | None) -> None:
    rows = Sequences(LayerLayout(8, (9, 90), 60, capacity=80), 2, softcap=softcap, sinks=True, device=DEVICE)
    check(attend, rows, [60, 21])
    check(attend, rows, [1, 1])
    check(attend, rows, [5, 9])
    check(attend, rows, [1, 1])


@WAYS
def test_rows_dropped_repeated_and_moved_go_on_as_they_were(attend: Attend) -> None:
    rows = Sequences(LayerLayout(4, (12, 1000), None, capacity=80), 3, device=DEVICE)
    check(attend, rows, [30, 7, 18])
    check(attend, rows, [1, 1, 1])
    rows.reorder([2, 0, 0, 1])
    check(attend, rows, [1, 1, 1, 1])
    rows.reorder([3])
    check(attend, rows, [1])


@WAYS
def test_a_cache_that_grew_goes_on_as_it_was(attend: Attend) -> None:
    rows = Sequences(LayerLayout(4, (12, 1000), None, capacity=20), 2, device=DEVICE)
    check(attend, rows, [19, 8])
    rows.ring.grow(60)
    check(attend, rows, [1, 1])
    check(attend, rows, [25, 30])
    check(attend, rows, [1, 1])


@WAYS
def test_a_window_of_the_longest_length_that_a_model_may_have_keeps_everything(attend: Attend) -> None:
    rows = Sequences(LayerLayout(4, (MAX_TOKENS, 5), None, capacity=60), 2, device=DEVICE)
    for counts in ([20, 9], [1, 1], [12, 30]):
        check(attend, rows, counts)


def test_the_same_sums_every_time() -> None:
    rows = Sequences(LayerLayout(4, (700, 100), None, capacity=900), 2, dtype=torch.float16, device=DEVICE)
    chunk = rows.chunk([850, 600])
    ring_write(chunk.key, chunk.value, rows.ring, chunk.lengths, chunk.padding)
    last = rows.chunk([1, 1])
    first = by_triton(rows, last)
    assert all(torch.equal(by_triton(rows, last), first) for _ in range(3))


# --- the schedule


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(1, 700), min_size=1, max_size=5), st.integers(1, 4), st.sampled_from([16, 32, 128]), st.integers(1, 40)
)  # fmt: skip
def test_every_slot_is_read_once_and_no_program_has_more_than_its_share(slots: list[int], batch: int, tile: int, programs: int) -> None:
    made = decode_schedule(np.array(slots), batch, tile, programs, torch.device("cpu"))
    read = {(row, head): [] for row in range(batch) for head in range(len(slots))}
    for row, head, low, high in made.segments.tolist():
        read[row, head] += range(low, high)
    assert all(found == list(range(slots[head])) for (_, head), found in read.items())
    tiles = -(-(made.segments[:, 3] - made.segments[:, 2]) // tile)
    loads = [int(tiles[low:high].sum()) for low, high in zip(made.bounds[:-1], made.bounds[1:], strict=True)]
    assert sum(loads) == int(tiles.sum())
    assert made.programs <= programs
    assert max(loads) - min(loads) <= 1
    owners = (made.segments[:, 0] * len(slots) + made.segments[:, 1]).tolist()
    assert [owners.index(owner) for owner in range(len(slots) * batch)] == made.firsts[:-1].tolist()
