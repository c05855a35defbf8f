"""What a GPU is foretold to hold and to decode, held against the recorded runs on one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_model

from moa_lab.capacity import GPUS, Gpu, capacity, estimated_weights_bytes, plan_capacity
from moa_lab.geometry import ModelGeometry
from moa_lab.models import weight_count
from moa_lab.plan import dense_plan, uniform_plan

BENCHMARKS = Path(__file__).resolve().parents[1] / "data/benchmarks"
WEIGHTS = {"Llama-2-7B": 2 * 6_738_415_616, "Llama-3-8B": 2 * 8_030_261_248}
RECORDS = {"h100": "generate", "h200": "stored_bits_generate"}


def sides(gpu: str) -> list[dict[str, Any]]:
    """Our recorded sides on a GPU."""
    record = json.loads((BENCHMARKS / f"{RECORDS[gpu]}.json").read_text(encoding="utf-8"))
    return [side for side in record["settings"]["sides"] if side["side"].startswith("ours")]


OURS = [(gpu, side) for gpu in RECORDS for side in sides(gpu)]


def recorded(side: dict[str, Any]) -> tuple[int, float, int]:
    """Batch, tokens per second and bytes of one sequence."""
    found = side["found"]
    return found["batch"], found["rate"], found["kept_bytes"] // found["batch"]


@pytest.mark.parametrize(("gpu", "side"), OURS, ids=[f"{gpu}-{side['model']}-{side['prompt']}-{side['side']}" for gpu, side in OURS])
def test_every_recorded_run_of_ours_is_foretold_to_a_sequence_and_within_a_tenth(gpu: str, side: dict[str, Any]) -> None:
    batch, rate, kv_bytes = recorded(side)
    found = capacity(GPUS[gpu], WEIGHTS[side["model"]], kv_bytes)
    assert abs(found.batch - batch) <= 1
    # A step whose layers are not compiled waits between its kernels.
    assert found.tokens_s == pytest.approx(rate, rel=0.1 if side["found"]["compiled"] else 0.13)


def test_the_records_have_plans_and_dense_caches_of_two_models_and_stored_bits() -> None:
    known = {(side["model"], side["side"], side["found"]["compiled"]) for _, side in OURS}
    assert {("Llama-2-7B", f"ours standard-{share}{bits} compiled", True) for share in (25, 50) for bits in ("", "@8")} < known
    assert {("Llama-3-8B", "ours standard-50 compiled", True), ("Llama-2-7B", "ours dense", False)} < known


def test_half_the_bytes_hold_twice_the_sequences_and_fewer_bits_more() -> None:
    geometry = ModelGeometry(layers=32, query_heads=32, kv_heads=8, head_dim=128, max_length=32768)
    gpu, weights = GPUS["rtx-4090"], 16 * 10**9
    dense = plan_capacity(dense_plan(geometry), gpu, weights, 8192)
    half = plan_capacity(uniform_plan(geometry, 0.5), gpu, weights, 8192)
    eight = plan_capacity(uniform_plan(geometry, 0.5).with_bits(8), gpu, weights, 8192)
    assert dense.batch < half.batch < eight.batch
    assert half.batch == pytest.approx(2 * dense.batch, abs=1)
    assert plan_capacity(dense_plan(geometry), gpu, weights, 8192, batch=2).batch == 2


def test_what_does_not_fit_is_a_batch_of_none_and_senseless_sizes_are_refused() -> None:
    found = capacity(GPUS["l4"], 40 * 10**9, 10**9)
    assert (found.batch, found.tokens_s) == (0, 0)
    for sizes in ((0, 1), (1, 0), (1, 1, 0)):
        with pytest.raises(ValueError, match="at least a byte"):
            capacity(Gpu("any", 10**9, 1e12, 1e14), *sizes)


def test_weights_are_counted_without_reading_them(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    assert weight_count(tmp_path) == sum(weight.numel() for weight in model.parameters())
    with pytest.raises(ValueError, match=r"no config\.json"):
        weight_count(tmp_path.parent)


@pytest.mark.parametrize(
    ("heads", "billions"),
    [
        ((32, 32, 32, 128), 6.74), ((32, 32, 8, 128), 8.03), ((28, 28, 4, 128), 7.62), ((40, 40, 40, 128), 13.0), ((80, 64, 8, 128), 70.6),
        ((32, 32, 8, 128), 7.25),
    ],
    ids=["Llama-2-7B", "Llama-3-8B", "Qwen2.5-7B", "Llama-2-13B", "Llama-3-70B", "Mistral-7B"],
)  # fmt: skip
def test_weights_of_known_models_are_estimated_from_their_heads_within_what_is_said(heads: tuple[int, ...], billions: float) -> None:
    assert 0.65 < estimated_weights_bytes(ModelGeometry(*heads, 8192)) / (2e9 * billions) < 1.32
