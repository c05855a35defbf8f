from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from moa_lab.evaluate.summary import table
from moa_lab.plan import Plan
from moa_lab.presses.methods import split_heads
from moa_lab.records import Measurements
from moa_lab.studies import MODULES, StudyRecord
from moa_lab.studies.gains import gain

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


OTHERS = {
    "Qwen 50%": "qwen2.5-coder-0.5b-50", "Qwen 25%": "qwen2.5-coder-0.5b-25", "Qwen 15%": "qwen2.5-coder-0.5b-15",
    "Gemma 50%": "gemma-3-270m-50", "Gemma 25%": "gemma-3-270m-25", "Gemma 15%": "gemma-3-270m-15",
    "SmolLM2 50%": "smollm2-135m-50", "SmolLM2 25%": "smollm2-135m-25", "SmolLM2 15%": "smollm2-135m-15",
}  # fmt: skip
OF_STANDARD = ("Gemma 25%", "Gemma 15%")


@pytest.mark.parametrize("name", OTHERS)
def test_the_readme_quotes_the_records_of_other_models(name: str) -> None:
    plans = json.loads((ROOT / f"data/runs/{OTHERS[name]}/summary.json").read_text(encoding="utf-8"))["plans"]
    kinds = {"retrieval": "accuracy", "line_retrieval": "accuracy", "cross_entropy": "value", "document_cross_entropy": "value"}
    needles, lines = (256, 32) if name in OF_STANDARD else (512, 64)
    counts = {"retrieval": needles, "line_retrieval": lines, "cross_entropy": 64, "document_cross_entropy": 32}
    assert {"2048", "4096", "8192"} <= set(plans["moa"]["retrieval"])
    for length in plans["moa"]["retrieval"]:
        assert {metric: plans["moa"][metric][length]["n"] for metric in kinds} == counts
        told = [
            " / ".join(f"{plans[name][metric][length][part]:.3f}" for name in ("dense", "uniform", "moa")) for metric, part in kinds.items()
        ]
        assert f"| {name} | {int(length):,} | {' | '.join(told)} |" in README


def test_the_readme_quotes_the_record_of_the_decode_kernel() -> None:
    rows = json.loads((ROOT / "data/benchmarks/decode.json").read_text(encoding="utf-8"))["rows"]
    decode = [row for row in rows if row["id"] == "D1"]
    rates = [row["ours"] / 1000 for row in decode]
    assert f"at {min(rates):.2f} to {max(rates):.2f} TB/s" in README
    assert decode[0]["peer_name"] == "read, not copy"
    assert f"a pure read: {decode[0]['peer'] / 1000:.2f})" in README
    assert all(row["detail"]["useful_bytes"] >= 256e6 for row in decode)
    assert {round(row["shape"]["skew"]) for row in decode} == {2, 4}


def test_the_readme_quotes_the_record_of_decoding_end_to_end() -> None:
    record = json.loads((ROOT / "data/benchmarks/generate.json").read_text(encoding="utf-8"))
    found = {(side["prompt"], side["side"]): side["found"] for side in record["settings"]["sides"] if side["model"] == "Llama-2-7B"}
    peers = ["transformers DynamicCache", "transformers StaticCache compiled"]
    for prompt in (4096, 8192, 16384):
        cells = [found[prompt, side] for side in (*peers, "ours standard-50 compiled", "ours standard-25 compiled")]
        assert " | ".join([f"| {prompt}", *(f"{cell['rate']:.0f} ({cell['batch']})" for cell in cells)]) + " |" in README


def test_the_readme_quotes_the_records_of_stored_bits() -> None:
    def read(name: str) -> dict[str, Any]:
        return dict(json.loads((ROOT / f"data/benchmarks/{name}.json").read_text(encoding="utf-8")))

    kernels = read("stored_bits")["rows"]
    for bits, row in (("8", "B2"), ("4", "B3")):
        ratios = [found["ratio"] for found in kernels if found["id"] == row and found["shape"]["bits"] == bits]
        assert f"{min(ratios):.2f} to {max(ratios):.2f}".replace("0.", ".") in README
    rates = [found["ours"] / 1000 for found in kernels if found["id"] == "B1"]
    assert f"reads {min(rates):.1f} to {max(rates):.1f} TB/s" in README
    sides = {(side["prompt"], side["side"]): side["found"] for side in read("stored_bits_generate")["settings"]["sides"]}
    engines = {(row["prompt"], name): row for name in ("bf16", "fp8") for row in read(f"engines/vllm-{name}")["rows"]}
    ours = [f"ours standard-{density}{bits} compiled" for density in (50, 25) for bits in ("", "@8")]
    for prompt in (4096, 16384):
        found = [engines[prompt, "bf16"], engines[prompt, "fp8"], *(sides[prompt, side] for side in ours)]
        assert " | ".join([f"| {prompt}", *(f"{side['rate']:.0f} ({side['batch']})" for side in found)]) + " |" in README


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


def test_the_readme_has_a_line_for_every_study_and_says_which_has_no_record_yet() -> None:
    for name in MODULES:
        if (ROOT / f"data/studies/{name}.json").exists():
            assert study(name).name == name
            assert "no record yet" not in row_of(name)
        else:
            assert "no record yet" in row_of(name)


def test_the_readme_quotes_what_was_found_of_unseen_lengths() -> None:
    found, line = study("unseen"), row_of("unseen")
    ranks = [{row.plan: row for row in found.select(task=f"random plans of {density}")} for density in ("50%", "25%")]
    moved = [told["slopes of shorter texts, spans moved"] for told in ranks]
    half, quarter = (f"{row.value:.2f} [{row.low:.2f}, {row.high:.2f}]" for row in moved)
    assert f"order {moved[0].n} random plans of 50%" in line
    assert f"(rank correlation {half}; goal 0.8: met, not decided), and plans of 25% less well ({quarter}: missed, not decided)" in line
    assert {goal.value: (goal.goal, goal.meets, goal.decided) for goal in found.goals} == {
        moved[0].value: (0.8, True, False), moved[1].value: (0.8, False, False)
    }  # fmt: skip
    for said, name in (
        ("left as long as they are {} and {},", "slopes of shorter texts"), ("at 8k itself {} and {}.", "slopes of 2 samples a task there"),
        ("{} and {} extrapolated", "profile, extrapolated"), ("{} and {} as it stands at 4k", "profile, its longest length"),
    ):  # fmt: skip
        assert said.format(*(f"{told[name].value:.2f}" for told in ranks)) in line
    assert (
        max(row.value for told in ranks for name, row in told.items() if name.startswith("profile"))
        == ranks[0]["profile, extrapolated"].value
    )
    assert (found.settings["length"], max(found.settings["profiled_lengths"])) == (8192, 4096)


def test_the_readme_quotes_what_was_found_of_engines() -> None:
    found, line = study("engines"), row_of("engines")
    predicted = found.settings["predicted"]
    assert all(predicted[f"searched-{word}"] < predicted[f"rounded-{word}"] for word in found.settings["limits"])
    gained = {
        (word, task): gain(found.rows, f"searched-{word}", f"rounded-{word}", task, (4096,))
        for word in found.settings["limits"] for task in ("needles", "documents", "summaries")
    }  # fmt: skip
    assert {word: [gained[word, task].verdict for task in ("needles", "documents", "summaries")] for word, _ in gained} == {
        "layers": ["not decided", "worse", "worse"], "one": ["better", "worse", "worse"], "three": ["worse", "worse", "not decided"]
    }  # fmt: skip
    by = {key: f"{abs(one.found.value):.{2 if key[1] == 'needles' else 3}f}" for key, one in gained.items()}
    assert (
        f"{by['one', 'needles']} more needles, for {by['one', 'documents']} nats of documents and {by['one', 'summaries']} of own" in line
    )
    assert f"documents and own answers lose {by['layers', 'documents']} and {by['layers', 'summaries']}." in line
    both = [f"{value(found, f'{kind}-three', length=4096):.2f}" for kind in ("searched", "rounded")]
    assert f"{by['three', 'needles']} fewer needles ({both[0]}; rounded up {both[1]}), documents lose {by['three', 'documents']}." in line
    assert {row.n for row in found.select(metric="retrieval")} == {256}
    assert found.settings["run"]["preset"] == study("unseen").settings["run"]["preset"] == "standard"


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
    for length in retrieval.settings["test_lengths"]:
        assert gain(retrieval.rows, "moa-25", "dense", "needles", (length,)).verdict == "not decided"
        for density in (15, 20, 25, 35) if length >= 2048 else ():
            ahead = gain(retrieval.rows, f"moa-{density}", f"snapkv-{density}", "needles", (length,))
            assert ahead.verdict == "better"
            assert ahead.density <= ahead.against_density
    half, reach = retrieval.goals
    assert f"{half.value:.2f} of what the dense model finds at the worst length to 4k (goal {half.goal}: met)" in line
    behind = [gain(retrieval.rows, "moa-50", name, "needles", (8192,)) for name in ("dense", "snapkv-50")]
    assert f"at 8k it finds {-behind[0].found.value:.2f} less than dense and {-behind[1].found.value:.2f} less than SnapKV" in line
    assert all(one.verdict == "worse" for one in behind)
    assert f"{reach.value:.1f} times the mean span (the paper: {reach.goal})" in line
    assert reach.low == reach.value
    assert all(goal.meets and goal.decided for goal in (half, reach))
    quality, line = study("quality"), row_of("quality")
    documents, answers = quality.goals
    assert f"{100 * documents.value:+.1f}% on documents (goal 2%: met)" in line
    assert f"{100 * answers.value:+.1f}% on own answers (met, not decided), at the worst length to 4k" in line
    assert documents.decided
    assert documents.meets
    assert answers.value < 0.02 == documents.goal == answers.goal < answers.high
    lost = [
        math.expm1(value(quality, plan, "documents", 8192, "cross_entropy") - value(quality, "dense", "documents", 8192, "cross_entropy"))
        for plan in ("moa-15", "uniform-15")
    ]
    assert f"at 8k, twice the longest lesson, learned spans of 15% cost {100 * lost[0]:.0f}%, uniform ones {100 * lost[1]:.0f}%" in line
    assert 2 * max(Plan.load(ROOT / "data/studies/plans/moa-15.json").search["lesson_lengths"]) == 8192
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
    assert gain(space.rows, "elastic", "heads", "needles", (2048, 4096, 8192)).verdict == "worse"
    ranks = [
        {row.plan: row.value for row in study("search").select(metric="rank_correlation", task=f"random plans of {density}")}
        for density in ("25%", "50%")
    ]
    best, paper, ours = (tuple(f"{told[name]:.2f}" for told in ranks) for name in ("slopes under drawn plans", "element, sum", "span, sum"))
    line = row_of("search")
    assert f"(rank correlation {best[0]} at 25%, {best[1]} at 50%; goal 0.8: met)" in line
    assert (
        f"the paper's predictor does not ({', '.join(paper)}), the best form of a dense profile does somewhat ({', '.join(ours)})" in line
    )
    for told in ranks:
        assert told["span, sum"] == max(value for name, value in told.items() if name.startswith(("span, ", "element, ")))
        others = [value for name, value in told.items() if name != "slopes under drawn plans"]
        assert max(others) < 0.6 < 0.8 < told["slopes under drawn plans"]
    transfer = study("transfer")
    between = [
        row.value for row in transfer.select(metric="rank_correlation") if row.plan.endswith("span") and len({*row.task.split("/")}) == 2
    ]
    assert f"({min(between):.2f} to {max(between):.2f})" in row_of("transfer")
    (needles,), (nats,) = (transfer.select(plan="foreign", metric=metric) for metric in ("needles_gained", "nats_saved"))
    assert f"{-needles.value:.2f} of the needles and {-nats.value:.2f} nats" in row_of("transfer")


def test_the_readme_quotes_what_learning_spans_gains() -> None:
    # At 1,024 tokens plans keep what they like below 50%: no equal bytes there.
    refine, line, lengths, costs = study("refine"), row_of("refine"), (2048, 4096), []
    for density in (15, 20, 25, 50):
        needles, documents = (
            gain(refine.rows, f"learned-{density}", f"search-{density}", task, lengths) for task in ("needles", "documents")
        )
        assert abs(needles.density - needles.against_density) < 0.01
        assert documents.verdict == "worse"
        assert documents.found.low > -0.05
        costs.append(-documents.found.value)
        assert needles.verdict == "better"
        for task in ("needles", "documents", "summaries"):
            moved = gain(refine.rows, f"refined-{density}", f"learned-{density}", task, lengths)
            helped = "better" if task != "needles" else "not decided"
            assert moved.verdict == (helped if density == 25 else "no difference")
            assert moved.found.value < 0.02
    assert f"documents pay up to {max(costs):.2f} nats" in line
    fifth = [value(refine, "learned-20", length=n) for n in lengths]
    worst = min(found / value(refine, "dense", length=n) for found, n in zip(fifth, lengths, strict=True))
    assert f"20%: {fifth[0]:.2f} at 2k, {fifth[1]:.2f} at 4k, {worst:.2f} of dense where it is worst (goal 0.9: met)" in line
    goals = {goal.name.partition(",")[0]: goal for goal in refine.goals}
    assert {name: goal.meets for name, goal in goals.items()} == {
        "20%: needles found": True, "25%: needles lost against dense": False, "25%: cross-entropy of own answers": True,
        "50%: needles lost against dense": True, "50%: perplexity above the dense model's": False,
    }  # fmt: skip
    assert goals["20%: needles found"].decided
    answers = goals["25%: cross-entropy of own answers"]
    assert f"its own answers are {answers.value:.2f} of the way from dense to uniform (goal {answers.goal}: met, not decided)" in line
    assert not answers.decided
    assert "(goal 0.5: met, not decided), its documents beyond uniform" in line
    assert all(gain(refine.rows, "refined-25", "uniform-25", "documents", (n,)).verdict == "worse" for n in lengths)
    for density in (25, 50):
        for length in (1024, 2048, 4096):
            assert gain(refine.rows, f"learned-{density}", "dense", "needles", (length,)).verdict == "not decided"
    lost = gain(refine.rows, "refined-25", "dense", "needles", (2048,))
    assert lost.verdict == "worse"
    assert f"loses {-lost.found.value:.2f} at 2k (missed)" in line


def test_the_plans_of_the_densities_are_the_measured_ones() -> None:
    for density in study("retrieval").settings["densities"]:
        name = f"moa-{100 * density:g}"
        plan = Plan.load(ROOT / f"data/studies/plans/{name}.json")
        for row in study("retrieval").select(plan=name, metric="retrieval"):
            assert plan.density(row.length) == pytest.approx(row.density)


def test_the_readme_claims_of_low_densities_and_bits_follow_from_the_records() -> None:
    weights = study("weights")
    (found,) = weights.select(plan="50% spans in mixed bits", metric="retrieval_difference")
    assert found.low < 0 < found.high
    assert abs(found.density - found.detail["density_against"]) < 0.001
    ahead = ("weights mixed 4 bits", "weights mixed 3 bits", "kv mixed 4 bits, K and V apart", "kv mixed 3 bits, K and V apart")
    for name in ahead:
        assert all(row.low > 0 for row in weights.select(plan=name, metric="retrieval_difference"))
        assert all(row.high < 0 for row in weights.select(plan=name, metric="cross_entropy_difference"))
    saved = weights.select(plan="50% spans in mixed bits", metric="cross_entropy_difference")
    assert saved
    assert all(row.high < 0 for row in saved)
    losses = sorted(row.value for row in study("low_density").select(metric="loss_change"))
    assert 0.45 < losses[-1] / sum(losses) < 0.55
    assert "32 whole heads of 90 are not enough" in study("low_density").answer
    assert all(
        row.low > 0 for metric in ("needles_gained", "nats_saved") for row in study("low_density").select(plan="learned-15", metric=metric)
    )
    for task in ("needles", "documents", "summaries"):
        found = gain(study("low_density").rows, "learned-15", "ranked-15-floor-128-sink-64", task, (2048, 4096))
        assert found.verdict == "better"
        assert abs(found.density - found.against_density) < 0.001
    gap = study("rules").settings["families"]["logarithmic"]["gap"]
    assert f"which the solver left with a gap of {100 * gap:.0f}%" in row_of("rules")
    rules = study("rules").rows
    found = {
        (name, task): gain(rules, name, f"linear as {name}", task, (8192,))
        for name in ("capped", "power", "logarithmic")
        for task in ("needles", "documents", "summaries")
    }
    assert all(one.equal for one in found.values())
    assert {name: [found[name, task].verdict for task in ("needles", "documents", "summaries")] for name, _ in found} == {
        "capped": ["not decided", "better", "better"],
        "power": ["worse", "better", "better"],
        "logarithmic": ["worse", "worse", "not decided"],
    }


def test_the_readme_quotes_the_record_of_serving() -> None:
    record = json.loads((ROOT / "data/benchmarks/serving.json").read_text(encoding="utf-8"))
    (base,) = (row["rate"] for row in record["rows"] if row["side"] == "vLLM-bf16")
    for row in record["rows"]:
        cells = [row["side"], row["batch"], f"{row['rate']:.0f}", f"{row['ms']:.1f}", f"{row['rate'] / base:.2f}"]
        assert f"| {' | '.join(map(str, cells))} |" in README
    parity = json.loads((ROOT / "data/parity/served-gpu.json").read_text(encoding="utf-8"))["rows"]
    assert all(row["agreement"] == 1.0 for row in parity)
    assert f"{sum(row['decided'] for row in parity):,} positions" in README


def test_the_readme_quotes_the_record_of_answering() -> None:
    rows = json.loads((ROOT / "data/benchmarks/answering.json").read_text(encoding="utf-8"))["rows"]
    of = {row["shape"]["plan"]: row for row in rows if row["shape"]["batch"] == 8}
    quarter, half, dense = (of[plan] for plan in ("standard-25", "standard-50", "dense"))
    assert f"{quarter['ours']:,.0f} tokens/s at 25% and {half['ours']:,.0f} at 50%" in README
    assert f"{quarter['ratio']:.2f} and {half['ratio']:.2f} times vLLM's rate" in " ".join(README.split())
    assert f"the dense model, {dense['ratio']:.2f}" in README


def test_the_readme_quotes_the_records_of_ruler() -> None:
    found: dict[str, dict[tuple[str, int], float]] = {}
    for name in ("dense", "moa-50", "uniform-50", "moa-25", "uniform-25"):
        rows = json.loads((ROOT / f"data/ruler/qwen2.5-coder-0.5b/{name}.json").read_text(encoding="utf-8"))["rows"]
        assert {row["n"] for row in rows} == {64}
        found[name] = {(row["task"], row["length"]): row["value"] for row in rows}
    tasks = list(dict.fromkeys(task for task, _ in found["dense"]))
    lengths = (4096, 8192)
    for task in tasks:
        assert " | ".join([f"| {task}", *(" / ".join(f"{of[task, n]:.3f}" for n in lengths) for of in found.values())]) + " |" in README
    means = [" / ".join(f"{sum(of[task, n] for task in tasks) / len(tasks):.3f}" for n in lengths) for of in found.values()]
    assert f"| mean | {' | '.join(means)} |" in README
    single, keys, identifiers = ([found["moa-25"][f"niah_{task}", n] for n in lengths] for task in ("single_1", "multikey_2", "multikey_3"))
    assert min(single) == 1
    assert 1 / 2 < min(keys) <= max(keys) < 0.68
    assert all(found["dense"]["niah_multikey_3", n] > 1 / 2 for n in lengths)
    assert all(share == pytest.approx(1 / 7, abs=0.015) for share in identifiers)
    assert "one of many keys in half to two thirds of the cases, and in a seventh where keys and values are long identifiers" in README


PRESSES = {
    "the plan": ("q50", "q25"), "the plan, after dense reading": ("q50 after reading", "q25 after reading"),
    **{
        told: (f"{name}-50", f"{name}-25")
        for told, name in {
            "StreamingLLM": "streaming", "SnapKV": "snapkv", "AdaKV, ExpectedAttention": "adakv", "DuoAttention on the fly": "duo",
            "the same, floor of 192": "duo-192", "KVzip": "kvzip", "KVzip per head": "kvzip-heads",
        }.items()
    },
}  # fmt: skip


def test_the_readme_quotes_the_records_of_presses() -> None:
    lengths = (2048, 4096)
    records = [Measurements.load(ROOT / f"data/presses/qwen2.5-coder-0.5b/{length}.json") for length in lengths]
    found = [{row.plan: row for row in record} for record in records]
    assert {row.n for rows in found for row in rows.values()} == {48}
    assert set(found[0]) == set(found[1]) == {"dense", *(name for names in PRESSES.values() for name in names)}
    for told, names in PRESSES.items():
        cells = []
        for name in names:
            of = [rows[name] for rows in found]
            cells += [" / ".join(f"{row.value:.3f}" for row in of), " / ".join(f"{row.detail['footprint']:.3f}" for row in of)]
            assert all({"spans": "| spans, ", "dense": "| dense, "}[row.detail["needs"]["reads"]] in line_of(told) for row in of)
            assert all(f", {row.detail['needs']['passes']} |" in line_of(told) for row in of)
        assert line_of(told).endswith(f"| {' | '.join(cells)} |")
    dense = found[0]["dense"]
    assert dense.value == found[1]["dense"].value == 1
    assert f"where all are found the interval is [{dense.low:.2f}, {dense.high:.2f}]" in README
    half = found[0]["streaming-50"]
    assert (half.value, f"where half are it is [{half.low:.2f}, {half.high:.2f}]" in README) == (0.5, True)
    again = [rows[name].detail["footprint"] for rows in found for name in ("kvzip-50", "kvzip-25")]
    assert f"has {min(again):.1f} to {max(again):.1f} times the dense model's" in README
    lost = [48 - sum(rows["adakv-25"].detail["per_sample"]) for rows in found]
    assert f"AdaKV loses {lost[0]} and {lost[1]} of 48 at 25%" in README
    kept = [row.density for rows in found for row in rows.values() if row.plan != "dense"]
    quarter = sorted(share for share in kept if share < 0.4)
    assert f"Kept are {100 * quarter[0]:.1f} to {100 * quarter[-1]:.1f}% and 50.0%" in README
    assert {f"{share:.1%}" for share in kept if share > 0.4} == {"50.0%"}


def test_the_plans_among_presses_are_those_of_the_runs() -> None:
    for length in (2048, 4096):
        record = Measurements.load(ROOT / f"data/presses/qwen2.5-coder-0.5b/{length}.json")
        for density in (50, 25):
            plan = Plan.load(ROOT / f"data/runs/qwen2.5-coder-0.5b-{density}/plan.json")
            assert plan.search["origin"] == "learned"
            for row in (*record.select(plan=f"q{density}"), *record.select(plan=f"q{density} after reading")):
                assert row.detail["plan"] == plan.identity()
                assert row.density == pytest.approx(plan.density(length), abs=1e-3)


def test_the_readme_says_how_many_heads_the_floors_of_duoattention_leave_whole() -> None:
    # Question and answer took 32 to 47 tokens.
    whole = {
        floor: [
            {48 - split_heads(round(length / 4) - asked, length - asked, 48, floor)[0] for asked in range(32, 48)}
            for length in (2048, 4096)
        ]
        for floor in (384, 192)
    }
    assert whole == {384: [{2}, {7}], 192: [{7}, {9}]}
    assert "floor of 384 tokens leaves two of 48 heads whole at 25% of 2,048 tokens and seven at 25% of 4,096" in README
    assert "the floor of 192 leaves seven and nine." in README


def line_of(method: str) -> str:
    (line,) = [line for line in README.splitlines() if line.startswith(f"| {method} | ")]
    return line
