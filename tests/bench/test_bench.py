"""The whole path of a benchmark on tiny shapes: every row, right or wrong kernels, peers, the record."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moa_lab.bench import GOALS, INTERPRETER, ROWS, BenchRecord, BenchRow, bench_kernels, table
from moa_lab.bench import peers as others
from moa_lab.bench.chunks import chunk_row
from moa_lab.bench.decode import decode_inputs, decode_row
from moa_lab.bench.lab import Lab
from moa_lab.bench.memory import memory_row
from moa_lab.bench.prefill import expected_prefill, prefill_rows
from moa_lab.bench.record import errors, is_right, judged
from moa_lab.bench.shapes import Shape, Spans, default_plans
from moa_lab.bench.timing import Timing, copies_past_cache, time_calls
from moa_lab.kernels.reference import masked_attention
from moa_lab.masks import dense_mask
from moa_lab.provenance import Provenance
from moa_lab.storage import RecordError
from tests.bench.labs import DEVICE, plain_lab, trusting_lab

CPU = torch.device("cpu")
SHAPE = Shape(4, 2, 32, 2, 256)
SPANS = Spans(256, 4, (200, 30))

needs_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: nothing is interpreted")


@pytest.fixture
def lab() -> Lab:
    return plain_lab()


@pytest.fixture
def trusting() -> Lab:
    return trusting_lab()


@pytest.fixture(scope="module")
def record() -> BenchRecord:
    return bench_kernels(quick=True)


# --- the whole path


def test_a_quick_run_returns_every_row_with_small_errors(record: BenchRecord) -> None:
    assert {row.id for row in record} == set(ROWS)
    for row in record:
        if row.id != "M1":
            assert row.detail["relative_error"] < 3e-2
            assert row.detail["error"] < 3e-2
            assert row.ours > 0


@needs_interpreter
def test_under_the_interpreter_no_row_meets_its_goal(record: BenchRecord) -> None:
    assert record.settings["device"] == record.provenance.device == INTERPRETER
    assert not any(row.meets for row in record)
    assert {row.detail.get("timer", "clock") for row in record} == {"clock"}


@needs_interpreter
def test_a_peer_that_cannot_run_is_recorded_with_its_reason(record: BenchRecord) -> None:
    assert "failed" in record.select("D1")[0].detail["peers"]["cuDNN"]
    dense = record.select("P2")[0]
    assert (dense.peer, dense.ratio, dense.meets) == (None, None, False)


def test_a_record_comes_back_from_its_file_as_it_was(record: BenchRecord, tmp_path: Path) -> None:
    assert BenchRecord.load(record.save(tmp_path / "bench.json")) == record


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(json.dumps({"schema": "moa-lab/plan/1"}))
    with pytest.raises(RecordError, match="moa-lab/bench/1"):
        BenchRecord.load(path)


def test_the_table_has_a_line_for_every_row_in_columns(record: BenchRecord) -> None:
    lines = table(record).splitlines()
    assert len(lines) == len(record.rows) + 2
    column = lines[0].index("shape")
    assert all(line[column - 2 : column] == "  " for line in lines[:-1])
    assert record.settings["device"] in lines[-1]


def test_only_the_rows_asked_for_are_measured_and_progress_ends_at_the_total() -> None:
    seen: list[tuple[int, int]] = []
    plan = default_plans()["standard-25"]
    found = bench_kernels(rows=["M1", "D2"], quick=True, plan=plan, progress=lambda done, total: seen.append((done, total)))
    assert [row.id for row in found] == ["D2", "M1"]
    assert {row.shape["plan"] for row in found} == {plan.name}
    assert seen == [(0, 2), (1, 2), (2, 2)]


def test_a_row_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match="D9"):
        bench_kernels(rows=["D9"], quick=True)


@needs_interpreter
def test_full_shapes_without_a_gpu_are_refused() -> None:
    assert os.environ["TRITON_INTERPRET"] == "1"
    with pytest.raises(ValueError, match="needs a GPU"):
        bench_kernels()


# --- right and wrong


def test_a_right_and_fast_kernel_meets_its_goal(trusting: Lab) -> None:
    assert decode_row("D1", SHAPE, trusting).meets


@pytest.mark.parametrize("wrong", [torch.zeros_like, lambda x: x * 1.1, lambda x: x * float("nan")])
def test_a_wrong_decode_kernel_never_meets(monkeypatch: pytest.MonkeyPatch, trusting: Lab, wrong: Any) -> None:
    from moa_lab.kernels import decode

    right = decode.decode_attention
    monkeypatch.setattr(decode, "decode_attention", lambda *arguments: wrong(right(*arguments)))
    row = decode_row("D1", SHAPE, trusting)
    assert row.ratio is not None
    assert row.ratio >= row.goal
    assert not row.meets


def test_few_bytes_are_judged_by_the_time_of_a_step(trusting: Lab) -> None:
    row = decode_row("D3", SHAPE, trusting)
    assert (row.unit, row.peer_name, row.at_most) == ("us", "limit", True)
    assert row.ours == pytest.approx(row.detail["ms"] * 1e3)
    assert decode_row("D1", SHAPE, trusting).peer_name == "read, not copy"


def test_a_chunk_over_a_ring_is_held_against_the_same_tokens_without_one(monkeypatch: pytest.MonkeyPatch, trusting: Lab) -> None:
    from moa_lab.kernels import prefill

    row = chunk_row(SHAPE, trusting)
    assert row.peer is not None
    # Of the work that both do, the same.
    assert row.ours * row.detail["ms"] == pytest.approx(row.peer * row.detail["whole"]["ms"])
    assert row.detail["chunk"] == 64
    monkeypatch.setitem(GOALS, "P4", replace(GOALS["P4"], ratio=0.0))
    assert chunk_row(SHAPE, trusting).meets
    right = prefill.chunk_attention
    monkeypatch.setattr(prefill, "chunk_attention", lambda *given: right(*given) * 1.1)
    assert not chunk_row(SHAPE, trusting).meets


def test_a_wrong_prefill_kernel_never_meets(monkeypatch: pytest.MonkeyPatch, trusting: Lab) -> None:
    from moa_lab.kernels import prefill

    monkeypatch.setattr(prefill, "prefill_attention", lambda query, *arguments: torch.zeros_like(query))
    flash = others.sdpa_prefill
    # cuDNN runs on GPUs alone; here another stands for it, slowed down so that any ratio would do.
    monkeypatch.setattr("moa_lab.bench.prefill.sdpa_prefill", lambda backend, inputs: flash("SDPA flash", inputs) * 100)
    monkeypatch.setitem(GOALS, "P1 cuDNN", replace(GOALS["P1 cuDNN"], ratio=0.0))
    monkeypatch.setitem(GOALS, "P2", replace(GOALS["P2"], ratio=1e9))
    rows = prefill_rows(SHAPE, trusting, ["P1", "P2"])
    assert [row.id for row in rows] == ["P1", "P2"]
    assert all(row.ratio is not None and not row.meets for row in rows)
    monkeypatch.undo()
    assert is_right({name: rows[0].detail[name] for name in ("error", "relative_error")}) is False


def test_errors_that_are_not_finite_are_none_and_wrong() -> None:
    found = errors(torch.tensor([[1.0, float("nan")]]), torch.ones(1, 2))
    assert found == {"error": None, "relative_error": None}
    assert not is_right(found)


def test_small_numbers_are_not_right_because_they_are_small() -> None:
    assert not is_right(errors(torch.zeros(3, 4), torch.full((3, 4), 1e-3)))


def test_goals_are_reached_from_their_own_side() -> None:
    fields: tuple[Any, ...] = ({}, 1.0, 1.0, "peer", "ms", True, {})
    assert judged("D1", GOALS["D1"], *fields).meets
    assert judged("D2", GOALS["D2"], *fields).meets
    assert not judged("P2", GOALS["P2"], *fields).meets
    assert not judged("P1", GOALS["P1 FlexAttention"], *fields).meets


def test_the_prefill_reference_sees_what_the_masks_say(lab: Lab) -> None:
    query, key, value = lab.random(0, 2, 4, 256, 32), lab.random(1, 2, 2, 256, 32), lab.random(2, 2, 2, 256, 32)
    shown = dense_mask(256, 4, torch.tensor(SPANS.windows, device=DEVICE)).repeat_interleave(2, dim=0)[None]
    expected = masked_attention(query.float(), key.float(), value.float(), shown, 32**-0.5)
    torch.testing.assert_close(expected_prefill(query, key, value, SPANS, 32**-0.5), expected)


# --- peers


def test_flex_attention_decodes_the_same_from_all_tokens_as_the_ring_from_its_own(lab: Lab) -> None:
    inputs = decode_inputs(SHAPE, SPANS, lab, dense=True)
    assert inputs.dense is not None
    expected = inputs.expected()
    found = others.flex_decode(inputs.query.float(), *(x.float() for x in inputs.dense), SPANS, compiled=False)()
    assert is_right(errors(found.reshape(expected.shape), expected))
    assert is_right(errors(inputs.attend(), expected))


def test_flex_attention_prefills_under_the_same_mask(lab: Lab) -> None:
    query, key, value = lab.random(0, 1, 4, 256, 32), lab.random(1, 1, 2, 256, 32), lab.random(2, 1, 2, 256, 32)
    found = others.flex_prefill(query.float(), key.float(), value.float(), SPANS, compiled=False)()
    assert is_right(errors(found, expected_prefill(query, key, value, SPANS, 32**-0.5)))


def test_a_peer_that_is_wrong_counts_as_failed(lab: Lab) -> None:
    found = others.measured("peer", lambda: [lambda: torch.zeros(2, 3)], 1.0, lab, torch.ones(2, 3))
    assert found["failed"].startswith("wrong result")


def test_a_backend_that_knows_no_groups_gets_repeated_keys(monkeypatch: pytest.MonkeyPatch, lab: Lab) -> None:
    monkeypatch.setattr(others, "_takes_groups", lambda *arguments: False)
    inputs = (lab.random(0, 1, 4, 64, 32), lab.random(1, 1, 2, 64, 32), lab.random(2, 1, 2, 64, 32))
    (attend,) = others.sdpa_prefill("SDPA flash", [inputs])
    assert is_right(errors(attend(), expected_prefill(*inputs, Spans(64, 0, (64, 64)), 32**-0.5)))


# --- memory and time


def test_rings_allocate_density_times_the_dense_bytes(lab: Lab) -> None:
    row = memory_row(SHAPE, replace(lab, device=CPU), layers=3)
    assert row.ratio == pytest.approx(1.0)
    assert row.detail["dense_bytes"] == 3 * 2 * 2 * 2 * 256 * 32 * 2


def test_every_call_takes_its_turn() -> None:
    seen: list[int] = []
    timing = time_calls([lambda: seen.append(0), lambda: seen.append(1)], CPU)
    assert seen == [0, 1]
    assert timing.timer == "clock"


def test_a_rate_is_work_per_second() -> None:
    assert Timing(ms=2.0, spread=0.0, timer="graph").rate(10.0) == 5000.0


def test_inputs_far_smaller_than_the_cache_are_rotated_on_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        L2_cache_size = 50 * 2**20

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties())
    gpu = torch.device("cuda")
    assert [copies_past_cache(n, gpu) for n in (2**30, 200 * 2**20, 67 * 2**20, 1)] == [1, 1, 3, 32]
    assert copies_past_cache(1, CPU) == 1


def test_a_row_without_a_peer_fits_in_the_table() -> None:
    shape = {"query_heads": 4, "kv_heads": 2, "head_dim": 32, "batch": 1, "n_tokens": 256, "plan": "p", "density": 0.5, "skew": 2.0}
    row = BenchRow("P2", shape, 1.0, None, "cuDNN", None, 0.75, False, "ms", True, {"error": None, "relative_error": None})
    assert "not finite" in table(BenchRecord((row,), {}, Provenance()))
