"""vLLM as a peer: what is asked of it and how its rates are computed, with an engine that only counts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from moa_lab.bench import engine
from moa_lab.bench.engine import ENGINE_SCHEMA, bench_engine, told_by
from moa_lab.bench.models import TINY, ModelShape
from moa_lab.bench.record import BenchRecord
from moa_lab.commands.app import app
from moa_lab.geometry import ModelGeometry
from moa_lab.plan import dense_plan, uniform_plan
from moa_lab.storage import read_json, write_json


class Counting:
    """An engine that needs 1 second a prompt token of all rows and 3 a step. short: answers lack a token. ahead: a step is scheduled while
    the one before runs."""

    __version__ = "0"

    def __init__(self, monkeypatch: pytest.MonkeyPatch, short: bool = False, ahead: bool = False) -> None:
        self.now, self.asked, self.short, self.ahead = 0.0, [], short, ahead
        monkeypatch.setattr(engine, "clock", lambda device: self.now)

    def LLM(self, **settings: Any) -> Counting:
        self.settings = settings
        cache = SimpleNamespace(num_gpu_blocks=100, block_size=16)
        core = SimpleNamespace(scheduler=SimpleNamespace(schedule=lambda counts: SimpleNamespace(num_scheduled_tokens=counts)))
        self.scheduler = core.scheduler
        self.llm_engine = SimpleNamespace(vllm_config=SimpleNamespace(cache_config=cache), engine_core=SimpleNamespace(engine_core=core))
        return self

    def SamplingParams(self, **settings: Any) -> SimpleNamespace:
        return SimpleNamespace(**settings)

    def generate(self, prompts: list[dict[str, list[int]]], asked: SimpleNamespace, use_tqdm: bool) -> list[SimpleNamespace]:
        self.asked.append([len(prompt["prompt_token_ids"]) for prompt in prompts])
        counts = dict(enumerate(self.asked[-1]))
        # One prompt a step, between tokens of the others, which do not count.
        steps = [({**dict.fromkeys(range(row), 1), row: count}, count) for row, count in counts.items()]
        steps += [(dict.fromkeys(counts, 1), 3)] * (asked.max_tokens - 1)
        running = 0
        for scheduled, seconds in steps:
            self.scheduler.schedule(scheduled)
            self.now += running if self.ahead else seconds
            running = seconds
        self.now += running if self.ahead else 0
        tokens = [0] * (asked.max_tokens - self.short)
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=tokens)]) for _ in prompts]


def test_rates_are_of_as_many_requests_as_its_cache_holds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    counting, seen = Counting(monkeypatch), []
    record = bench_engine("vLLM-fp8", [40, 100], TINY, new_tokens=7, progress=lambda *at: seen.append(at), engine=counting)
    # 48 and 108 tokens, in blocks of 16.
    assert counting.asked == [[40] * 33] * 3 + [[100] * 14] * 3
    assert counting.settings["kv_cache_dtype"] == "fp8"
    assert counting.settings["max_model_len"] == 108
    # Seven steps: five from one to the next after the first.
    told = [[row[name] for name in ("batch", "prefill_rate", "rate", "ms", "steps", "answer_rate")] for row in record["rows"]]
    assert told == [[33, 1, 11, 3000, 5, 11], [14, 1, 14 / 3, 3000, 5, 14 / 3]]
    assert seen == [(1, 2), (2, 2)]
    assert told_by(read_json(write_json(tmp_path / "record.json", record), ENGINE_SCHEMA)) == ["vLLM-fp8@40=11.0", "vLLM-fp8@100=4.7"]


def test_a_step_that_is_scheduled_while_a_prompt_is_read_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = bench_engine("vLLM-fp8", [40], TINY, new_tokens=7, engine=Counting(monkeypatch, ahead=True))["rows"]
    assert (row["ms"], row["steps"]) == (3000, 5)


def test_answers_that_lack_tokens_are_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="33 of them not with 5 tokens"):
        bench_engine("vLLM-bf16", [40], TINY, new_tokens=7, engine=Counting(monkeypatch, short=True))


def test_another_peer_is_refused() -> None:
    with pytest.raises(ValueError, match="among vLLM-bf16, vLLM-fp8, vLLM-plan, got vLLM"):
        bench_engine("vLLM", [40])


def test_a_plan_is_served_at_as_many_requests_as_its_pages_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[Path | None] = []
    monkeypatch.setattr(engine, "prepare", prepared.append)
    shape = ModelShape("tiny", 2, 4, 2, 16, 96, 512)
    half = replace(uniform_plan(ModelGeometry(2, 4, 2, 16, 512), 0.5, sink_tokens=4, min_span=5), name="half")
    record = bench_engine("vLLM-plan", [88], shape, new_tokens=7, engine=Counting(monkeypatch), plan=half, max_num_batched_tokens=64)
    # 96 tokens; 4 heads keep 48 of them, 3 pages of 16 each, and a block of the 100 belongs to nobody.
    assert [(row["batch"], row["density"]) for row in record["rows"]] == [(99 // 12, pytest.approx(0.5, abs=0.01))]
    assert record["plan"] == "half"
    assert record["cache_tokens"] == 100 * 16 // 4
    assert prepared[0] is not None


@pytest.mark.parametrize(("peer", "has"), [("vLLM-plan", False), ("vLLM-bf16", True)])
def test_a_plan_is_for_the_side_that_serves_one(peer: str, has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = dense_plan(ModelGeometry(2, 4, 2, 16, 512)) if has else None
    with pytest.raises(ValueError, match="a plan is for vLLM-plan, which needs one"):
        bench_engine(peer, [40], TINY, engine=Counting(monkeypatch), plan=plan)


def test_its_record_is_a_peer_of_decoding_end_to_end(tmp_path: Path) -> None:
    record = {"schema": ENGINE_SCHEMA, "peer": "vLLM-fp8", "rows": [{"prompt": 64, "rate": 9.5}]}
    told = write_json(tmp_path / "told.json", record)
    arguments = ["bench", "generate", "--quick", "--rows", "E5", "--sides", "plan", "--lengths", "64", "--peer", str(told)]
    shown = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "out.json")])
    assert shown.exit_code == 0, shown.output
    assert "vLLM-fp8 9.5" in shown.output


def test_prompts_are_timed_and_held_against_what_was_told(tmp_path: Path) -> None:
    record = {"schema": ENGINE_SCHEMA, "peer": "vLLM-bf16", "rows": [{"prompt": 64, "rate": 9.5, "prefill_rate": 1000.0}]}
    told = write_json(tmp_path / "told.json", record)
    arguments = [
        "bench",
        "answering",
        "--quick",
        "--prompt",
        "64",
        "--batches",
        "1,3",
        "--peer",
        str(told),
        "--out",
        str(tmp_path / "out.json"),
    ]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    found = BenchRecord.load(tmp_path / "out.json")
    assert [(row.id, row.shape["batch"], row.shape["plan"]) for row in found] == [
        ("E7", batch, plan) for plan in ("dense", "standard-50", "standard-25") for batch in (1, 3)
    ]
    for row in found:
        assert not row.meets
        assert row.ours == max(each["rate"] for each in row.detail["peers"].values())
        assert row.ratio == pytest.approx(row.ours / 1000)
