from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moa_lab.evaluate.summary import table
from moa_lab.studies import MODULES, StudyRecord

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_quotes_the_record_of_the_demo() -> None:
    shown = table(json.loads((ROOT / "data/runs/demo/summary.json").read_text(encoding="utf-8")))
    for line in shown.replace("; [95% interval]", ";\n[95% interval]").splitlines():
        assert line in README


def test_the_readme_quotes_the_records_of_the_gpu() -> None:
    def cells(plan: dict[str, Any]) -> list[str]:
        spread = (("retrieval", "accuracy"), ("cross_entropy", "value"), ("document_cross_entropy", "value"))
        return [f"{plan[metric][length][part]:.3f}" for metric, part in spread for length in ("2048", "4096")]

    for density in (25, 50):
        plans = json.loads((ROOT / f"data/runs/standard-{density}/summary.json").read_text(encoding="utf-8"))["plans"]
        for name in ("dense", "uniform", "paper", "moa"):
            assert " | ".join([f"| {density}% | {name}", *cells(plans[name])]) + " |" in README


def test_the_readme_quotes_the_record_of_the_decode_kernel() -> None:
    rows = json.loads((ROOT / "data/benchmarks/decode.json").read_text(encoding="utf-8"))["rows"]
    decode = [row for row in rows if row["id"] == "D1"]
    rates = [row["ours"] / 1000 for row in decode]
    assert f"at {min(rates):.2f} to {max(rates):.2f} TB/s" in README
    assert f"device-to-device copy: {decode[0]['peer'] / 1000:.2f})" in README
    assert all(row["detail"]["useful_bytes"] >= 256e6 for row in decode)
    assert {round(row["shape"]["skew"]) for row in decode} == {2, 4}


def test_the_readme_quotes_the_record_of_decoding_end_to_end() -> None:
    record = json.loads((ROOT / "data/benchmarks/generate.json").read_text(encoding="utf-8"))
    found = {(side["prompt"], side["side"]): side["found"] for side in record["settings"]["sides"] if side["model"] == "Llama-2-7B"}
    peers = ["transformers DynamicCache", "transformers StaticCache compiled"]
    for prompt in (4096, 8192, 16384):
        cells = [found[prompt, side] for side in (*peers, "ours standard-50 compiled", "ours standard-25 compiled")]
        assert " | ".join([f"| {prompt}", *(f"{cell['rate']:.0f} ({cell['batch']})" for cell in cells)]) + " |" in README


def test_the_readme_names_every_module_and_the_picture_is_there() -> None:
    assert (ROOT / "data/pictures/report.png").is_file()
    listed = README[README.index("## The tree") :]
    for module in (ROOT / "moa_lab").iterdir():
        if module.is_dir() and not module.name.startswith("_"):
            assert f"{module.name}/" in listed, module.name
        elif module.suffix == ".py" and not module.name.startswith("_"):
            assert module.name in listed, module.name


def study(name: str) -> StudyRecord:
    return StudyRecord.load(ROOT / f"data/studies/{name}.json")


def value(record: StudyRecord, plan: str, task: str = "needles", length: int = 2048, metric: str = "retrieval") -> float:
    (row,) = record.select(plan=plan, task=task, length=length, metric=metric)
    return row.value


def row_of(name: str) -> str:
    (line,) = [line for line in README.splitlines() if line.startswith(f"| `{name}` |")]
    return line


def test_the_readme_has_a_line_for_every_study() -> None:
    for name in MODULES:
        assert study(name).name == name
        assert row_of(name)


def test_the_readme_quotes_what_the_studies_found_of_densities() -> None:
    retrieval = study("retrieval")
    pairs = {
        name: [f"{value(retrieval, name, length=n):.2f}" for n in (2048, 4096)] for name in ("moa-25", "dense", "uniform-25", "snapkv-25")
    }
    line = row_of("retrieval")
    assert f"{pairs['moa-25'][0]} of the needles at 2k and {pairs['moa-25'][1]} at 4k" in line
    for name, before in (("dense", "(dense"), ("uniform-25", "uniform")):
        assert f"{before} {pairs[name][0]} and {pairs[name][1]}" in line
    assert f"sees the question, {pairs['snapkv-25'][0]} and {pairs['snapkv-25'][1]})" in line
    assert f"{retrieval.goals[1].value:.1f} times the mean span" in line
    documents, summaries = study("quality").goals
    assert f"{100 * documents.value:+.1f}% on documents (goal 2%: missed), {100 * summaries.value:+.1f}% on own answers" in row_of(
        "quality"
    )
    assert not documents.meets
    speed = study("speed")
    times = [
        value(speed, f"moa-{d}", "decode", 4096, "tokens_per_s") / value(speed, "dense", "decode", 4096, "tokens_per_s")
        for d in (50, 25, 15)
    ]
    assert f"{times[0]:.1f}, {times[1]:.1f}, {times[2]:.1f} times the tokens/s" in row_of("speed")


def test_the_readme_quotes_what_the_studies_found_of_the_method() -> None:
    found = study("calibration")
    both = {
        plan: (value(found, plan) + value(found, plan, length=4096)) / 2
        for plan in ("whole-text", "model", "human", "whole-text/paper", "model/paper", "human/paper", "questions")
    }
    line = row_of("calibration")
    paper = [f"{both[f'{name}/paper']:.2f}" for name in ("whole-text", "model", "human")]
    assert f"whole text finds {paper[0]} of the needles, the model's own words {paper[1]}, a human's {paper[2]}" in line
    ours = [f"{both[name]:.2f}" for name in ("whole-text", "model", "human", "questions")]
    assert f"objectives {ours[0]}, {ours[1]} and {ours[2]}, and planted questions alone {ours[3]}" in line
    space = study("space")
    steps = [f"{value(space, name):.2f}" for name in ("uniform", "layers", "heads", "elastic")]
    assert f"{steps[0]} uniform, {steps[1]} per layer, {steps[2]} per head, {steps[3]} with elastic rules" in row_of("space")
    ranks = {row.plan: row.value for row in study("search").select(metric="rank_correlation")}
    line = row_of("search")
    for name in ("element, sum", "span, sum", "regression on measured plans"):
        assert f"{ranks[name]:.2f}" in line
    assert max(ranks.values()) < 0.8
    transfer = study("transfer")
    between = [
        row.value for row in transfer.select(metric="rank_correlation") if row.plan.endswith("span") and len({*row.task.split("/")}) == 2
    ]
    assert f"({min(between):.2f} to {max(between):.2f})" in row_of("transfer")
    (needles,), (nats,) = (transfer.select(plan="foreign", metric=metric) for metric in ("needles_gained", "nats_saved"))
    assert f"{-needles.value:.2f} of the needles and {-nats.value:.2f} nats" in row_of("transfer")


def test_the_readme_claims_of_low_densities_and_bits_follow_from_the_records() -> None:
    weights = study("weights")
    for row in (*weights.select(plan="50% spans in 8 bits", metric="retrieval_difference"),):
        assert row.low > 0
    saved = weights.select(plan="50% spans in 8 bits", metric="cross_entropy_difference")
    assert saved
    assert all(row.high < 0 for row in saved)
    losses = sorted(row.value for row in study("low_density").select(metric="loss_change"))
    assert 0.45 < losses[-1] / sum(losses) < 0.55
    assert "32 whole heads of 90 are not enough" in study("low_density").answer
    (needles,) = [goal for goal in study("refine").goals if goal.name.startswith("50%: needles")]
    assert needles.meets
    assert "No family is better than linear" in study("rules").answer
