"""What notebook 12 says of engines and of served plans, held against what is computed and recorded."""

from __future__ import annotations

from pathlib import Path

from moa_lab.engines import ENGINES, allocated_density, engine_of, engine_table
from moa_lab.evaluate.parity import Parity
from moa_lab.plan import Plan, dense_plan
from moa_lab.serving import bucket_lengths, page_layout, request_pages
from moa_lab.serving.shares import balanced_shares, natural_shares

DATA = Path(__file__).resolve().parents[2] / "data"
N = 4096
plan = Plan.load(DATA / "runs" / "standard-25" / "plan.json")
dense_pages = page_layout(dense_plan(plan.geometry), N, N).pages_for(N)


def test_engines_with_a_window_a_layer_or_a_model_keep_half_of_the_cache_and_more() -> None:
    _, refused = engine_table(plan, [engine_of(name) for name in ENGINES], [N])
    assert not refused
    allocated = {name: allocated_density(plan, engine_of(name), N) for name in ENGINES}
    assert allocated["moa-lab-vllm"] < 0.251
    others = [share for name, share in allocated.items() if "moa-lab" not in name]
    assert 0.485 < min(others) < 0.495
    assert 0.645 < max(share for share in others if share < 1) < 0.655


def test_pages_of_single_heads_hold_what_the_density_promises() -> None:
    assert dense_pages == 30 * 3 * 64
    assert page_layout(plan, N, N).pages_for(N) / dense_pages < 0.2505
    for share in ("15", "20", "25", "35", "50", "75"):
        other = Plan.load(DATA / "studies" / "plans" / f"moa-{share}.json")
        served = dense_pages / page_layout(other, N, N).pages_for(N)
        assert served > 0.97 / other.density(N)
        assert served > 1.25 / allocated_density(other, engine_of("vllm"), N)


def test_devices_take_9_to_27_percent_more_pages_in_the_models_order_and_1_to_6_where_heads_are_dealt_anew() -> None:
    found = []
    for name, devices in {"qwen2.5-coder-0.5b-25": 2, "smollm2-135m-25": 3, "standard-25": 3, "standard-50": 3}.items():
        each = Plan.load(DATA / "runs" / name / "plan.json")
        orders = natural_shares(each.geometry, devices), balanced_shares(each, devices, bucket_lengths(8192))
        found.append([order.density(each, N) / natural_shares(each.geometry).density(each, N) - 1 for order in orders])
    natural, dealt = zip(*found, strict=True)
    assert (round(100 * min(natural)), round(100 * max(natural))) == (9, 27)
    assert min(dealt) > 0.01
    assert max(dealt) < 0.06


def test_a_request_has_the_windows_of_its_own_length_rounded_up() -> None:
    lengths = bucket_lengths(N)
    pages = request_pages(plan, lengths, N)
    asked = {n: lengths[pages.bucket(n)] for n in (100, 1000, 1024, 1025, 4000)}
    assert asked == {100: 128, 1000: 1024, 1024: 1024, 1025: 1088, 4000: 4032}


def test_served_tokens_were_those_of_the_model_under_this_plan_on_a_cpu_and_on_a_gpu() -> None:
    for name, device in (("served", "cpu"), ("served-gpu", "cuda:0")):
        found = Parity.load(DATA / "parity" / f"{name}.json")
        assert found.passed
        assert found.settings["plan_identity"] == plan.identity()
        assert all(row.agreement == 1 for row in found.rows)
        assert found.provenance.device == device
