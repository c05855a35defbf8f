"""Decoding end to end on a tiny model: who is measured, what is kept, and how rows follow from what was found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from moa_lab.bench import generate, steps
from moa_lab.bench.beside import session_of
from moa_lab.bench.endtoend import COMPILED, DENSE, DYNAMIC, KINDS, ROWS, STATIC, TOLD, Findings, jobs_of, ours_name, tasks_of
from moa_lab.bench.generate import bench_generate
from moa_lab.bench.generate_rows import rows_of
from moa_lab.bench.models import LLAMA2_7B, TINY, largest_batch, plan_for, random_model, smaller_batch, stretched_plan
from moa_lab.bench.record import BenchRecord
from moa_lab.bench.shapes import default_plans
from moa_lab.commands.app import app
from moa_lab.models import geometry_of

torch.set_num_threads(1)
CPU = torch.device("cpu")
HALF = "standard-50"


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, BenchRecord]:
    path = tmp_path_factory.mktemp("bench") / "generate.json"
    return path, bench_generate(quick=True, out=path)


def test_a_quick_run_measures_every_side_of_every_row_and_meets_nothing(record: tuple[Path, BenchRecord]) -> None:
    _, found = record
    assert {row.id for row in found} == set(ROWS)
    assert not any(row.meets for row in found)
    sides = {(side["prompt"], side["side"]): side["found"] for side in found.settings["sides"]}
    assert not [found["failed"] for found in sides.values() if "failed" in found]
    assert {side for _, side in sides} == {
        DYNAMIC, STATIC, DENSE, *(ours_name(plan) + bits + end for plan in default_plans() for bits in ("", "@8") for end in ("", COMPILED))
    }  # fmt: skip
    for row in found.select("E1"):
        assert row.ratio == pytest.approx(row.ours / sides[row.shape["n_tokens"] - generate.QUICK_NEW_TOKENS, row.peer_name]["rate"])


def test_stored_bits_are_held_against_the_same_tokens_in_16_bits(record: tuple[Path, BenchRecord]) -> None:
    sides = {(side["prompt"], side["side"]): side["found"] for side in record[1].settings["sides"]}
    rows = [row for row in record[1].select("E5") if row.peer_name == ours_name(HALF)]
    assert len(rows) == 2
    for row in rows:
        assert row.shape["bits"] == "8"
        assert row.detail["check"]["wrong"] == 0
        assert row.ratio == pytest.approx(row.ours / row.detail["peers"][ours_name(HALF)]["rate"])
        prompt = row.shape["n_tokens"] - generate.QUICK_NEW_TOKENS
        whole = sides[prompt, ours_name(HALF)]
        # 16 numbers a vector: 64 bytes in float32, 16 and a grid of 4 in 8 bits.
        assert row.detail["kept_bytes"] / row.detail["batch"] == pytest.approx(whole["kept_bytes"] / whole["batch"] * 20 / 64)
        assert row.detail["allocated_bytes"] / row.detail["batch"] == pytest.approx(whole["allocated_bytes"] / whole["batch"] * 20 / 64)


def test_our_loop_is_checked_against_an_uncached_pass(record: tuple[Path, BenchRecord]) -> None:
    check = record[1].select("E1")[0].detail["check"]
    assert check["wrong"] == 0
    assert check["equal"] > 0.9 * check["tokens"]
    assert check["equal_dense"] < check["equal"]


def test_a_record_is_taken_up_where_it_ended(record: tuple[Path, BenchRecord], monkeypatch: pytest.MonkeyPatch) -> None:
    path, whole = record
    monkeypatch.setattr(generate, "_measured", lambda *_: pytest.fail("measured again"))
    again = bench_generate(quick=True, out=path, resume=True)
    assert [(row.id, row.ours) for row in again] == [(row.id, row.ours) for row in whole]


def test_what_failed_is_told_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted: dict[str, Any] = {"rows": ["E1"], "quick": True, "out": tmp_path / "a.json", "sides": ["plan", "dynamic"], "lengths": [64]}

    def broken(*_: Any) -> dict[str, Any]:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(generate, "transformers_step", broken)
    row = next(row for row in bench_generate(**wanted) if row.peer_name == DYNAMIC)
    assert row.peer is None
    assert not row.meets
    assert "no such kernel" in row.detail["peers"][DYNAMIC]["failed"]
    monkeypatch.setattr(generate, "transformers_step", steps.transformers_step)
    assert next(row for row in bench_generate(**wanted, resume=True) if row.peer_name == DYNAMIC).ratio is not None


def test_a_record_of_other_sizes_is_not_taken_up(record: tuple[Path, BenchRecord], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "QUICK_NEW_TOKENS", 20)
    with pytest.raises(ValueError, match="its new_tokens is 16, here it is 20"):
        bench_generate(quick=True, out=record[0], resume=True)


def test_a_batch_that_does_not_fit_is_made_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def short(model: Any, plan: Any, batch: int, *_: Any, **__: Any) -> dict[str, Any]:
        tried.append(batch)
        if len(tried) < 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"ms": 1.0}

    monkeypatch.setattr(generate, "our_step", short)
    found = bench_generate(["E1"], quick=True, sides=["plan"], lengths=[64]).rows[0]
    assert tried == [tried[0], smaller_batch(tried[0]), smaller_batch(smaller_batch(tried[0]))]
    assert found.shape["batch"] == tried[-1]
    assert found.ours == pytest.approx(tried[-1] * 1e3)


def test_a_row_is_held_against_the_peers_that_were_asked_for() -> None:
    def peers(rows: list[str], sides: list[str]) -> set[str]:
        record = bench_generate(rows, quick=True, sides=sides, lengths=[64], told={(TOLD[0], 64): 1e3} if rows == ["E5"] else None)
        return {row.peer_name for row in record}

    assert peers(["E5"], ["plan"]) == {"ours standard-50", TOLD[0]}
    assert peers(["E5"], ["plan", "dense"]) == {"ours standard-50", TOLD[0], DENSE}
    assert peers(["E1"], ["plan", "static"]) == {STATIC}


def test_the_largest_batch_fills_what_is_free() -> None:
    assert [largest_batch(free, 10, 7) for free in (9, 16, 17, 80)] == [0, 0, 1, 10]
    assert [smaller_batch(batch) for batch in (1, 15, 64)] == [0, 14, 60]


def test_a_batch_leaves_room_for_the_logits_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(TINY, 256, CPU, torch.float32)
    plan = default_plans()[HALF]
    stretched = plan_for(plan, geometry_of(model), 256)
    logits = model(input_ids=torch.zeros(1, 1, dtype=torch.long)).logits
    assert generate.logits_bytes(model) == 4 * logits.nbytes
    free = generate.RESERVE_BYTES + 2**24
    monkeypatch.setattr(generate, "free_bytes", lambda _: free)
    monkeypatch.setattr(type(model), "device", property(lambda _: torch.device("cuda")))
    rows = generate.fitting_batch(model, stretched, ours_name(HALF), 256)
    row = stretched.kv_bytes(256, 4) + 4 * logits.nbytes
    assert rows * row <= free - generate.RESERVE_BYTES < (rows + 1) * row


def test_rows_hold_what_was_found_against_their_goals() -> None:
    state = Findings(torch.device("cuda"), torch.bfloat16, dict(default_plans()), jobs_of(["E1"], False, default_plans(), [4096]),
                     ["E1", "E3"], KINDS, 64, 1e12)  # fmt: skip
    geometry = geometry_of(random_model(TINY, 256, CPU, torch.float32))
    plan = plan_for(state.plans[HALF], geometry, 4160)
    name = LLAMA2_7B.name
    state.used[name, 4096, ours_name(HALF)] = plan
    state.checks[name, HALF] = {"wrong": 0}
    ours = {"ms": 30.0, "rate": 2000.0, "batch": 62, "roofline_ms": 29.0, "over_roofline": 1.03}
    state.found = {
        (name, 4096, ours_name(HALF)): ours,
        (name, 4096, ours_name(HALF) + COMPILED): {**ours, "ms": 28.0, "rate": 2200.0},
        (name, 4096, DYNAMIC): {"rate": 250.0, "over_roofline": 4.0},
        (name, 4096, STATIC): {"rate": 1200.0, "over_roofline": 1.1},
        (name, 4096, DENSE): {"rate": 1000.0, "over_roofline": 1.0},
    }
    rows = {row.peer_name: row for row in rows_of(state)}
    assert {peer: round(row.ratio or 0, 3) for peer, row in rows.items()} == {DYNAMIC: 8.8, STATIC: 1.833, DENSE: 2.0, "roofline": 0.966}
    assert {peer: row.meets for peer, row in rows.items()} == {DYNAMIC: True, STATIC: False, DENSE: True, "roofline": True}
    state.checks[name, HALF] = {"wrong": 1}
    assert not any(row.meets for row in rows_of(state))


def test_stored_bits_have_goals_against_what_was_told_and_the_others_inform() -> None:
    plans = default_plans()
    jobs = jobs_of(["E6"], False, plans, [4096])
    told = {(TOLD[0], 4096): 100.0, (TOLD[1], 4096): 500.0, (TOLD[1], 8192): 1.0}
    state = Findings(torch.device("cuda"), torch.bfloat16, dict(plans), jobs, ["E6"], KINDS, 64, 1e12, told)
    name, quarter = LLAMA2_7B.name, "standard-25"
    geometry = geometry_of(random_model(TINY, 256, CPU, torch.float32))
    state.used[name, 4096, ours_name(quarter) + "@8"] = plan_for(plans[quarter], geometry, 4160).with_bits(8)
    state.checks[name, quarter + "@8"] = {"wrong": 0}
    ours = {"ms": 30.0, "rate": 2000.0, "batch": 200, "roofline_ms": 29.0, "over_roofline": 1.03}
    state.found = {(name, 4096, ours_name(quarter) + "@8"): ours, (name, 4096, ours_name(quarter)): {"rate": 1250.0}}
    rows = {row.peer_name: row for row in rows_of(state)}
    asked = {peer: (row.ratio, row.goal, row.meets) for peer, row in rows.items() if "goal" not in row.detail}
    assert asked == {"vLLM-bf16": (20.0, 7.0, True), "vLLM-fp8": (4.0, 4.2, False)}
    informing = {peer: (row.ratio, row.goal) for peer, row in rows.items() if "goal" in row.detail}
    assert informing == {DYNAMIC: (None, 15.0), STATIC: (None, 3.6), DENSE: (None, 3.6), ours_name(quarter): (1.6, 1.0)}
    assert rows["vLLM-fp8"].detail["peers"]["vLLM-fp8"] == {"rate": 500.0, "told": "given, not measured in this process"}


def test_a_row_of_stored_bits_measures_16_bits_beside_itself() -> None:
    plans = default_plans()
    state = Findings(CPU, torch.float32, dict(plans), jobs_of(["E5"], True, plans, [64]), ["E5"], ["plan"], 16, 1.0)
    assert tasks_of(state, TINY) == [(64, ours_name(HALF) + "@8"), (64, ours_name(HALF))]


def test_what_was_told_is_recorded_and_stays_when_a_record_is_taken_up(tmp_path: Path) -> None:
    wanted: dict[str, Any] = {"rows": ["E5"], "quick": True, "out": tmp_path / "a.json", "sides": ["plan"], "lengths": [64]}
    bench_generate(**wanted, told={("vLLM-bf16", 64): 10.0, ("vLLM-fp8", 64): 20.0})
    again = bench_generate(**wanted, resume=True, told={("vLLM-fp8", 64): 30.0})
    assert {entry["peer"]: entry["rate"] for entry in again.settings["told"]} == {"vLLM-bf16": 10.0, "vLLM-fp8": 30.0}
    assert {row.peer_name: row.peer for row in again if row.peer_name in TOLD} == {"vLLM-bf16": 10.0, "vLLM-fp8": 30.0}


def test_a_plan_with_bits_keeps_them_where_it_is_stretched_and_has_no_rows_of_other_bits() -> None:
    plan = default_plans()[HALF].with_bits(8, "mine")
    geometry = geometry_of(random_model(TINY, 256, CPU, torch.float32))
    assert set(stretched_plan(plan, geometry, 256).widths().ravel()) == {8}
    with pytest.raises(ValueError, match="E5 stores a plan in bits of its own"):
        bench_generate(["E5"], quick=True, plans=[plan], sides=["plan"], lengths=[64])


def test_a_plan_whose_heads_differ_in_bits_is_measured_in_bytes_as_it_is(tmp_path: Path) -> None:
    plan = default_plans()[HALF]
    # What sees most is stored in the fewest bits, by which bytes tell another plan from this one.
    longest = plan.spans(8192) > np.quantile(plan.spans(8192), 0.7)
    mixed = plan.with_bits(np.where(longest[..., None], 4, 16) + np.zeros(2, dtype=int), "mixed")
    geometry = geometry_of(random_model(TINY, 8192, CPU, torch.float32))
    stretched = stretched_plan(mixed, geometry, 4096)
    widths, spans = stretched.widths()[..., 0].ravel(), stretched.spans(4096).ravel()
    assert set(widths) == {4, 16}
    assert spans[widths == 4].min() >= spans[widths == 16].max()
    record = bench_generate(["E1"], quick=True, plans=[mixed], sides=["plan", "dense"], lengths=[64])
    shape = record.select("E1")[0].shape
    assert shape["bits"] == "per-head"
    assert shape["bytes"] < shape["density"]
    (speed,) = session_of(record.save(tmp_path / "bench.json")).speeds
    assert (speed.bits, speed.share) == ("per-head", shape["bytes"])


def test_plans_of_several_runs_are_measured_beside_each_other_as_they_store(tmp_path: Path) -> None:
    files = [tmp_path / name / "plan.json" for name in ("wide", "few")]
    for file, bits in zip(files, (16, 8), strict=True):
        file.parent.mkdir()
        default_plans()[HALF].with_bits(bits, "moa").save(file)
    told = {("vLLM-bf16", 64): 10.0}
    record = bench_generate(["E1"], quick=True, plans=files, sides=["plan"], lengths=[64], told=told)
    session = session_of(record.save(tmp_path / "bench.json"))
    assert [speed.bits for speed in session.speeds] == ["16", "8"]
    assert session.speeds[1].share < 0.7 * session.speeds[0].share
    assert session.peers == {"vLLM bf16": 10.0}
    assert list(record.settings["plans"]) == ["wide", "few"]


def test_a_side_is_measured_once_for_all_rows() -> None:
    plans = default_plans()
    state = Findings(CPU, torch.float32, dict(plans), jobs_of(["E1", "E2"], True, plans), ["E1", "E2"], ["dense", "plan"], 16, 1.0)
    tasks = tasks_of(state, TINY)
    assert len(tasks) == len(set(tasks)) == 2 * 3
    state.found[TINY.name, *tasks[0]] = {"rate": 1.0}
    assert tasks_of(state, TINY) == tasks[1:]


@pytest.mark.parametrize("n_tokens", [128, 4160])
def test_a_stretched_plan_is_as_dense_as_its_own(n_tokens: int) -> None:
    geometry = geometry_of(random_model(TINY, 8192, CPU, torch.float32))
    for plan in default_plans().values():
        stretched = stretched_plan(plan, geometry, n_tokens)
        assert stretched.density(n_tokens) == pytest.approx(plan.density(max(plan.lengths)), abs=0.02)
        assert len(set(stretched.spans(n_tokens).ravel().tolist())) > 1


def test_the_command_writes_and_shows_the_record(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    arguments = ["bench", "generate", "--quick", "--rows", "E4,E5", "--sides", "plan,dense", "--peer", "vLLM-fp8@64=9.5", "--out", str(out)]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    assert "ours dense" in shown.output
    assert "vLLM-fp8 9.5" in shown.output
    assert BenchRecord.load(out).select("E4")
    assert isinstance(CliRunner().invoke(app, arguments).exception, ValueError)


@pytest.mark.parametrize("peer", ["vLLM-fp8=9", "vLLM-fp8@4k=9", "vLLM-fp8@64", "vLLM-fp8@64=fast"])
def test_a_peer_that_does_not_say_its_prompt_and_rate_is_refused(tmp_path: Path, peer: str) -> None:
    arguments = ["bench", "generate", "--quick", "--peer", peer, "--out", str(tmp_path / "bench.json")]
    assert "--peer must be" in str(CliRunner().invoke(app, arguments).exception)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"rows": ["E9"]}, "rows must be"),
        ({"sides": ["theirs"]}, "sides must be"),
        ({"lengths": [5]}, "lengths"),
        ({"plans": ["a/plan.json", "b/a.json"]}, "names of their own, got a, a"),
        ({"told": {("theirs", 64): 1.0}}, "told must be tokens/s of vLLM-bf16 or vLLM-fp8"),
        ({"told": {("vLLM-fp8", 65): 1.0}}, r"a prompt of the rows \(64, 128, 192\)"),
        ({"told": {("vLLM-fp8", 64): float("nan")}}, "nan"),
    ],
)
def test_what_there_is_not_is_refused(wrong: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        bench_generate(quick=True, **wrong)
