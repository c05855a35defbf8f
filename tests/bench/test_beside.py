"""Speeds beside what plans keep: they meet by bits and bytes, quality is against the dense model, and what has no speed is said."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import exit_code

from moa_lab.bench.beside import Kept, Session, Speed, beside, kept_of, session_of
from moa_lab.bench.record import BenchRecord, BenchRow
from moa_lab.bench.serving import SERVING_SCHEMA
from moa_lab.figures import speed_and_quality
from moa_lab.geometry import ModelGeometry
from moa_lab.plan import Plan, uniform_plan
from moa_lab.provenance import Provenance
from moa_lab.records import Measurement, Measurements
from moa_lab.records.intervals import Interval, unknown
from moa_lab.storage import RecordError

GEOMETRY = ModelGeometry(2, 4, 2, 64, 8192)
LENGTH = 4096


def bench_row(density: float, rate: float, bits: str | None = None, prompt: int = LENGTH, **peers: float) -> BenchRow:
    shape: dict[str, Any] = {"model": "Llama-2-7B", "head_dim": 128, "batch": 9, "n_tokens": prompt + 64, "plan": "moa", "density": density}
    detail = {"peers": {name.replace("_", " "): {"rate": other, "batch": 5} for name, other in peers.items()}}
    return BenchRow(
        "E5", shape | ({"bits": bits} if bits else {}), rate, None, "vLLM-bf16", None, 1.0, False, "tokens/s", detail=detail,
    )  # fmt: skip


def bench_record() -> BenchRecord:
    rows = (
        bench_row(0.5, 400.0, "8", ours_half=300.0, ours_dense=1.0), bench_row(0.25, 700.0, "8", ours_quarter=600.0),
        bench_row(0.25, 650.0, "8"), bench_row(0.5, 90.0, "8", prompt=16384),
        replace(bench_row(0.5, 30.0, "8"), unit="ms"),
    )  # fmt: skip
    told = [{"peer": "vLLM-bf16", "prompt": LENGTH, "rate": 100.0}, {"peer": "vLLM-fp8", "prompt": LENGTH, "rate": 150.0}]
    return BenchRecord(rows, {"device": "a <GPU>", "new_tokens": 64, "told": told})


def served() -> dict[str, Any]:
    rows = [
        {"side": "vLLM-bf16", "prompt": LENGTH, "batch": 5, "rate": 101.0},
        {"side": "plan moa 50%", "prompt": LENGTH, "batch": 11, "rate": 250.0, "density": 0.5},
        {"side": "plan moa 25%", "prompt": LENGTH, "failed": "out of memory"},
    ]
    return {"schema": SERVING_SCHEMA, "rows": rows, "model": "Llama-2-7B", "device": "a GPU"}


def row(plan: str, metric: str, task: str, values: list[float], samples: bool = True) -> Measurement:
    value = float(np.mean(values))
    detail = {"per_sample": values, "samples": "some"} if samples else {}
    return Measurement(plan, metric, task, LENGTH, value, len(values), value - 0.1, value + 0.1, 0.5, detail)


def run_folder(folder: Path, plan: Plan, samples: bool = True) -> Path:
    """A run in which the dense model finds 16 of 20 needles and the plan 15 of these, at 0.1 nats more on documents."""
    hits = [1.0] * 16 + [0.0] * 4
    nats = [3.0, 3.2, 3.1, 2.9]
    rows = []
    for name, lost in (("dense", 0.0), ("moa", 0.1)):
        found = [0.0, *hits[1:]] if lost else hits
        rows += [row(name, "retrieval", "needles", found, samples)]
        rows += [row(name, "cross_entropy", "documents", [value + lost for value in nats], samples)]
    folder.mkdir()
    plan.renamed("moa").save(folder / "plan.json")
    Measurements(tuple(rows), {}, Provenance(model="models/small <b>.gguf")).save(folder / "measurements.json")
    return folder


def test_a_benchmark_tells_the_fastest_of_every_mix_and_share_of_bytes_at_a_prompt(tmp_path: Path) -> None:
    path = bench_record().save(tmp_path / "bench.json")
    found = session_of(path)
    # 8 bits of 128 numbers and their grid take 132 bytes where 16 bits take 256.
    assert {(one.bits, round(one.share, 4)): one.rate for one in found.speeds} == {
        ("8", 0.2578): 400.0, ("16", 0.5): 300.0, ("8", 0.1289): 700.0, ("16", 0.25): 600.0,
    }  # fmt: skip
    assert found.peers == {"vLLM bf16": 100.0, "vLLM fp8": 150.0}
    assert (found.model, found.device, found.prompt) == ("Llama-2-7B", "a <GPU>", LENGTH)
    far = session_of(path, 16384)
    assert [one.rate for one in far.speeds] == [90.0]
    assert far.peers == {}
    with pytest.raises(ValueError, match="no plan's tokens/s were measured at 512 tokens; it has prompts of 4096, 16384"):
        session_of(path, 512)


def test_a_server_tells_plans_in_16_bits_and_no_side_that_failed(tmp_path: Path) -> None:
    path = tmp_path / "serving.json"
    path.write_text(json.dumps(served()))
    found = session_of(path)
    assert found.speeds == (Speed("16", 0.5, 250.0, 11),)
    assert found.peers == {"vLLM bf16": 101.0}


def test_other_and_garbled_records_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="speeds are read from"):
        session_of(uniform_plan(GEOMETRY, 0.5).save(tmp_path / "plan.json"))
    (tmp_path / "serving.json").write_text(json.dumps({**served(), "rows": [{"rate": 1.0, "density": 0.5}]}))
    with pytest.raises(RecordError, match="lacks or garbles"):
        session_of(tmp_path / "serving.json")


def test_a_run_tells_what_is_kept_of_the_dense_model_over_the_same_samples(tmp_path: Path) -> None:
    found = kept_of(run_folder(tmp_path / "run", uniform_plan(GEOMETRY, 0.5).with_bits(8)), LENGTH)
    assert (found.model, found.bits, found.length) == ("small <b>", "8", LENGTH)
    # 68 of 128 bytes a vector of 64 numbers.
    assert found.share == pytest.approx(0.5 * 68 / 128, rel=1e-3)
    assert found.needles.value == pytest.approx(15 / 16)
    assert 0.7 < found.needles.low < found.needles.value < found.needles.high < 1.2
    assert found.documents == pytest.approx((math.expm1(0.1), 4, math.expm1(0.1), math.expm1(0.1)))
    with pytest.raises(ValueError, match="moa: needles at 2048 tokens was not measured"):
        kept_of(tmp_path / "run", 2048)


def test_without_samples_intervals_are_wider_or_unknown_and_heads_may_differ_in_bits(tmp_path: Path) -> None:
    widths = np.full((2, 2, 2), 8)
    widths[0, 0] = 4
    found = kept_of(run_folder(tmp_path / "run", uniform_plan(GEOMETRY, 0.5).with_bits(widths), samples=False), LENGTH)
    assert found.bits == "per-head"
    assert found.needles.low < 0.8
    assert (found.documents.value, found.documents.low, found.documents.high) == (pytest.approx(math.expm1(0.1)), -math.inf, math.inf)


def made(bits: str, share: float, model: str = "small", length: int = LENGTH) -> Kept:
    return Kept(model, bits, share, length, Interval(0.9, 20, 0.8, 1.0), unknown(0.02, 4))


SESSION = Session(
    "Llama-2-7B", "a GPU", LENGTH, (Speed("16", 0.5, 300.0), Speed("8", 0.26, 400.0, 9), Speed("8", 0.25, 410.0)),
    {"vLLM bf16": 100.0, "vLLM fp8": 150.0},
)  # fmt: skip


def test_a_plan_stands_at_the_speed_of_its_bits_and_of_the_nearest_bytes() -> None:
    plans = [made("16", 0.49), made("8", 0.251), made("8", 0.12), made("16", 0.25), made("per-head", 0.25)]
    found, alone = beside(SESSION, plans)
    assert [(speed.rate, kept.share) for speed, kept in found] == [(300.0, 0.49), (410.0, 0.251)]
    assert alone == plans[2:]


def test_the_figure_has_needles_and_perplexity_over_speed_with_peers_and_says_what_was_measured_on_which_model() -> None:
    found, _ = beside(SESSION, [made("16", 0.5), made("8", 0.25), made("16", 0.5, "o<b>ther")])
    fig = speed_and_quality(SESSION, found)
    title = fig.layout.title.text
    assert "Speed: geometry of Llama-2-7B, random weights, a GPU, prompts of 4,096 tokens" in title
    assert "Quality: small, o&lt;b&gt;ther, 4,096 tokens; small models, not the one whose speed is shown" in title
    assert "vLLM fp8: quality not measured" in title
    points = [trace for trace in fig.data if trace.x[0] is not None and trace.name != "peers"]
    left, right = ([trace for trace in points if (trace.yaxis == "y2") == second] for second in (False, True))
    assert sorted((trace.x[0], trace.y[0], trace.text[0]) for trace in left) == [
        (300.0, 90.0, "50%"), (300.0, 90.0, "50%"), (410.0, 90.0, "25%"),
    ]  # fmt: skip
    assert left[0].error_y.array[0] == pytest.approx(10.0)
    assert [trace.y[0] for trace in right] == [2.0] * 3
    assert right[0].error_y.array[0] is None, "an interval that is not known is not drawn"
    assert left[0].marker.color == left[2].marker.color != left[1].marker.color
    assert left[0].marker.symbol == left[1].marker.symbol != left[2].marker.symbol
    peers = [trace for trace in fig.data if trace.name == "peers"]
    assert [list(trace.y) for trace in peers] == [[100, 100], [0, 0]]
    assert list(peers[0].marker.symbol) == ["square", "square-open"]
    assert "not measured" in peers[0].customdata[1]
    assert {trace.name for trace in fig.data if trace.showlegend is None} == {"16 bits", "8 bits", "small", "o&lt;b&gt;ther"}


def test_plans_of_several_lengths_and_none_are_refused() -> None:
    speed = SESSION.speeds[0]
    with pytest.raises(ValueError, match="at one length, got 2048, 4096"):
        speed_and_quality(SESSION, [(speed, made("16", 0.5)), (speed, made("16", 0.5, length=2048))])
    with pytest.raises(ValueError, match="got none"):
        speed_and_quality(SESSION, [])


def test_the_command_draws_runs_over_speeds_and_says_what_has_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    bench, out = bench_record().save(tmp_path / "bench.json"), tmp_path / "figure.html"
    half, less = (run_folder(tmp_path / name, uniform_plan(GEOMETRY, share)) for name, share in (("half", 0.5), ("less", 0.4)))
    assert exit_code(monkeypatch, "show", bench, "--figure", out, "--quality", half, "--quality", less) == 0
    assert "without a speed, and not drawn: small <b> with 40.0% in 16 bits" in capsys.readouterr().out
    assert "small models, not the one whose speed is shown" in out.read_text()
    assert exit_code(monkeypatch, "show", bench, "--figure", tmp_path / "other.html", "--quality", less) == 2
    assert "no speed was measured in the bits and near the bytes of small <b> with 40.0% in 16 bits" in capsys.readouterr().err
    assert exit_code(monkeypatch, "show", bench, "--quality", half) == 2
    assert "name a file with --figure" in capsys.readouterr().err
    assert exit_code(monkeypatch, "show", bench, "--figure", tmp_path / "far.html", "--quality", half, "--length", 512) == 2
    assert "needles at 512 tokens was not measured" in capsys.readouterr().err


def test_the_records_of_this_project_meet(tmp_path: Path) -> None:
    data = Path(__file__).resolve().parents[2] / "data"
    kept = [kept_of(data / "runs" / name, LENGTH) for name in ("standard-50", "standard-25", "qwen2.5-coder-0.5b-25")]
    for name, peers in (("stored_bits_generate", 2), ("serving", 2), ("generate", 0)):
        session = session_of(data / "benchmarks" / f"{name}.json")
        found, alone = beside(session, kept)
        assert not alone
        assert len(session.peers) == peers
        assert len({speed.rate for speed, _ in found}) == 2
