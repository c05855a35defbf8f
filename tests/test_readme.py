from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moa_lab.evaluate.summary import table

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
