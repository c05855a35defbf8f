"""Which measured plan to take: the cheapest that is sure, never one that only seems to hold, and a reason with numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom
from typer.testing import CliRunner

from moa_lab.capacity import GPUS, plan_capacity
from moa_lab.commands.app import app
from moa_lab.evaluate.compare import share_of_hits
from moa_lab.evaluate.intervals import mean
from moa_lab.evaluate.options import Option, Wish, options_of
from moa_lab.evaluate.recommend import advice_table, recommend
from moa_lab.geometry import ModelGeometry
from moa_lab.plan import uniform_plan
from moa_lab.provenance import Provenance
from moa_lab.records import Measurement, Measurements
from moa_lab.records.intervals import proportion

GEOMETRY = ModelGeometry(layers=2, query_heads=4, kv_heads=2, head_dim=16, max_length=8192)


def hits(plan: str, per_sample: list[int], length: int = 4096, density: float = 0.5, samples: str | None = "same") -> Measurement:
    found = proportion(sum(per_sample), len(per_sample))
    detail = {"per_sample": per_sample, "samples": samples} if samples else {}
    return Measurement(plan, "retrieval", "needles", length, found.value, found.n, found.low, found.high, density, detail)


def nats(plan: str, per_sample: list[float], task: str = "documents", length: int = 4096) -> Measurement:
    found = mean(per_sample)
    detail = {"per_sample": per_sample, "samples": "same"}
    return Measurement(plan, "cross_entropy", task, length, found.value, found.n, found.low, found.high, 0.5, detail)


def option(density: float, ours: list[int], dense: list[int], rise: float | None = None, length: int = 4096) -> Option:
    plan = replace(uniform_plan(GEOMETRY, density), name="moa")
    rows = [hits("moa", ours, length), hits("dense", dense, length)]
    if rise is not None:
        texts = list(np.random.default_rng(0).normal(3, 0.3, 32))
        noise = np.random.default_rng(1).normal(rise, 0.002, 32)
        rows += [nats("dense", texts, length=length), nats("moa", list(texts + noise), length=length)]
    return Option(plan, tuple(rows), f"run-{density:g}")


ALL, NEARLY, HALF = [1] * 200, [1] * 197 + [0] * 3, [1] * 100 + [0] * 100


def test_where_the_dense_model_finds_nothing_no_share_is_told() -> None:
    advice = recommend([option(0.5, [0, 0, 1], [0, 0, 0])], Wish(needles=0.95))
    assert advice.plan is None
    assert "the dense model finds no needle at 4,096 tokens" in str(advice)
    assert "inf" not in str(advice)


@pytest.mark.parametrize("wish", [{"needles": 95.0}, {"density": 50.0}])
def test_per_cent_in_place_of_a_share_are_refused(wish: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"must be a share of the dense (model|cache)'s, at most 1, got (95|50)"):
        Wish(**wish)  # type: ignore[arg-type]


def test_the_cheapest_plan_that_is_sure_is_taken_and_the_next_one_is_told() -> None:
    advice = recommend([option(0.25, NEARLY, ALL), option(0.5, ALL, ALL), option(0.15, HALF, ALL)], Wish(needles=0.95))
    assert advice.plan is not None
    assert advice.plan.density(4096) == pytest.approx(0.25, abs=0.01)
    assert "Take moa (run-0.25): it keeps 25.0% of the bytes (of 3 measured plans" in str(advice)
    assert "The next, moa (run-0.15), keeps 15.0%, but is not sure to hold: needles 0.500 [" in str(advice)
    assert [row["verdict"] for row in advice_table(advice)] == ["holds", "take", "no"]


def test_few_samples_without_a_miss_promise_nothing() -> None:
    advice = recommend([option(0.5, [1] * 16, [1] * 16)], Wish(needles=0.95))
    assert advice.plan is None
    assert "(more test samples may decide)" in advice.reason
    assert advice_table(advice)[-1]["verdict"] == "not sure"
    assert "a run at another density" in advice.next_one


def test_a_plan_of_few_samples_stands_in_no_other_ones_way() -> None:
    few, half, quarter = option(0.6, [1] * 15 + [0], [1] * 16), option(0.5, ALL, ALL), option(0.25, NEARLY, ALL)
    assert recommend([few, half, quarter], Wish(needles=0.95)).plan is quarter.plan
    # Of equal bytes or more it is not taken either, however good it looks.
    many = option(0.6, [1] * 100, [1] * 100)
    assert recommend([many, half], Wish(needles=0.9)).plan is half.plan


def test_a_plan_of_fewer_bytes_stands_in_no_way_of_one_that_keeps_more_however_often_it_was_asked() -> None:
    half, quarter = option(0.5, ALL, ALL), option(0.25, HALF * 2, ALL * 2)
    assert recommend([quarter, half], Wish(needles=0.95)).plan is half.plan


def test_bytes_and_tokens_per_second_are_counted_and_end_no_sequence() -> None:
    dense, half, quarter = option(1.0, ALL, ALL), option(0.5, HALF, ALL), option(0.25, ALL, ALL)
    # The plan of 50% keeps too many bytes, so its needles do not matter.
    advice = recommend([dense, half, quarter], Wish(density=0.3, needles=0.95))
    assert advice.plan is quarter.plan
    speed = {"gpu": GPUS["l4"], "weights_bytes": 10**9, "n_tokens": 4096}
    assert recommend([dense, quarter], Wish(tokens_s=1.0, **speed)).plan is quarter.plan
    none = recommend([dense, quarter], Wish(tokens_s=1e12, **speed))
    assert none.plan is None
    assert "tokens/s foretold, 1,000,000,000,000 asked" in none.reason


def test_so_many_sequences_at_once_are_held_as_their_bytes_fit() -> None:
    dense, half, quarter = option(1.0, ALL, ALL), option(0.5, ALL, ALL), option(0.25, HALF, ALL)
    served = {"gpu": GPUS["l4"], "weights_bytes": 10**9, "n_tokens": 4096}
    held = {one.plan.density(4096): plan_capacity(one.plan, GPUS["l4"], 10**9, 4096).batch for one in (dense, half, quarter)}
    fits_dense, fits_half, fits_quarter = (held[key] for key in sorted(held, reverse=True))
    # As many as half the bytes let in, and one more, which only the quarter does, and that does not hold the needles.
    advice = recommend([dense, half, quarter], Wish(needles=0.95, sequences=fits_half, **served))
    assert advice.plan is half.plan
    assert f"{fits_half:,} sequences of 4,096 tokens at once on L4 24GB, {fits_half:,} asked" in advice.reason
    assert [row["verdict"] for row in advice_table(advice)] == ["no", "take", "no"]
    assert f"{fits_dense:,} sequences" in advice_table(advice)[0]["why"]
    assert recommend([dense, half, quarter], Wish(needles=0.95, sequences=fits_half + 1, **served)).plan is None
    assert recommend([dense, half, quarter], Wish(sequences=fits_quarter, **served)).plan is quarter.plan


def test_a_length_that_was_not_measured_is_told() -> None:
    told = "It was measured to 4,096 tokens; at 32,768 nobody knows what it loses."
    assert told in str(recommend([option(0.5, ALL, ALL)], Wish(needles=0.9, n_tokens=32_768)))
    assert "nobody knows" not in str(recommend([option(0.5, ALL, ALL)], Wish(needles=0.9, n_tokens=4096)))


def test_what_a_plan_loses_beside_what_was_asked_is_told() -> None:
    fine = option(0.5, NEARLY, ALL, rise=0.2)
    advice = recommend([fine], Wish(needles=0.9))
    assert advice.plan is fine.plan
    assert "Not asked for, but measured: perplexity of documents +22." in advice.beside
    assert "needles" not in advice.beside
    counted = recommend([fine], Wish(density=0.6)).beside
    assert "needles 0.985 [" in counted
    assert "perplexity of documents" in counted
    assert recommend([option(0.5, NEARLY, ALL)], Wish(needles=0.9)).beside == "", "nothing else was measured"
    assert recommend([fine], Wish(needles=0.9, perplexity=0.5)).beside == ""
    assert recommend([fine], Wish(needles=1.0)).beside == "", "no plan, nothing beside it"


def test_every_kind_of_text_and_every_length_must_hold() -> None:
    fine = option(0.5, ALL, ALL, rise=0.01)
    assert recommend([fine], Wish(perplexity=0.02)).plan is fine.plan
    assert recommend([fine], Wish(perplexity=0.005)).plan is None
    longer = Option(fine.plan, (*fine.rows, *option(0.5, HALF, ALL, rise=0.01, length=8192).rows))
    assert recommend([longer], Wish(needles=0.9)).plan is None
    assert recommend([longer], Wish(needles=0.9, lengths=(4096,))).plan is fine.plan


@pytest.mark.parametrize("theirs", [0.9, 1.0])
@pytest.mark.parametrize("n", [16, 64, 256])
def test_it_seldom_promises_what_does_not_hold(n: int, theirs: float) -> None:
    """Four plans, all of them just short of what is asked, on samples that the dense model answers alike."""
    rng, asked, trials, broken = np.random.default_rng(n), 0.95, 300, 0
    for _ in range(trials):
        dense = (rng.random(n) < theirs).astype(int)
        plans = [(dense & (rng.random(n) < asked - 0.002)).astype(int).tolist() for _ in range(4)]
        options = [option(density, ours, dense.tolist()) for density, ours in zip((0.6, 0.5, 0.4, 0.3), plans, strict=True)]
        broken += recommend(options, Wish(needles=asked)).plan is not None
    # 2.5% are allowed; three standard deviations of so many trials beyond.
    assert broken / trials <= 0.025 + 3 * (0.025 * 0.975 / trials) ** 0.5


def test_it_finds_what_holds() -> None:
    rng, trials, found = np.random.default_rng(0), 100, 0
    for _ in range(trials):
        dense = (rng.random(512) < 0.95).astype(int)
        ours = (dense & (rng.random(512) < 0.99)).astype(int).tolist()
        found += recommend([option(0.5, ours, dense.tolist())], Wish(needles=0.95)).plan is not None
    assert found >= 95


@pytest.mark.parametrize(("n", "theirs", "kept"), [(24, 0.9, 0.95), (24, 0.5, 0.6), (200, 0.9, 0.95), (200, 0.3, 1.0)])
def test_intervals_of_shares_of_hits_hold_the_true_share(n: int, theirs: float, kept: float) -> None:
    rng, trials, below, above = np.random.default_rng(n), 500, 0, 0
    for _ in range(trials):
        dense = (rng.random(n) < theirs).astype(int)
        # Some hits of the dense model's are lost, as many new ones as `kept` allows are found.
        ours = np.where(dense, rng.random(n) < 0.9 * kept, rng.random(n) < 0.1 * kept * theirs / (1 - theirs)).astype(int)
        found = share_of_hits(hits("moa", ours.tolist()), hits("dense", dense.tolist()))
        below, above = below + (found.high < kept), above + (found.low > kept)
    most = 0.025 + 3 * (0.025 * 0.975 / trials) ** 0.5
    assert max(below, above) / trials <= most


@pytest.mark.parametrize("n", [32, 128, 512])
def test_the_low_end_of_a_share_is_no_surer_than_it_says_where_the_dense_model_misses_nothing(n: int) -> None:
    lows = np.array([share_of_hits(hits("moa", [1] * found + [0] * (n - found)), hits("dense", [1] * n)).low for found in range(n + 1)])
    shares = np.linspace(0.5, 0.99, 197)
    chances = [float(binom.pmf(np.flatnonzero(lows > share), n, share).sum()) for share in shares]
    # Counts come in steps: no interval of theirs is exact at every share.
    assert max(chances) < 0.04
    assert np.mean(chances) < 0.025


def test_shares_of_hits_are_never_too_sure() -> None:
    # Without pairs, or with others' samples, both intervals count.
    apart = share_of_hits(hits("moa", ALL, samples=None), hits("dense", ALL, samples=None))
    assert apart.low == pytest.approx(proportion(200, 200).low)
    assert share_of_hits(hits("moa", ALL, samples="mine"), hits("dense", ALL)).low == pytest.approx(apart.low)
    nothing = share_of_hits(hits("moa", [0] * 9), hits("dense", [0] * 9))
    assert nothing.low == 0


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({}, "wish for something"),
        ({"needles": 0.0}, "needles must be above 0"),
        ({"needles": float("nan")}, "needles must be above 0"),
        ({"perplexity": -0.1}, "perplexity must be"),
        ({"tokens_s": 5.0}, "need a gpu"),
        ({"sequences": 4}, "need a gpu"),
        ({"sequences": 0}, "sequences must be above 0"),
    ],
)
def test_wishes_that_are_none_are_refused(wish: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Wish(**wish)


def test_what_was_not_measured_is_refused() -> None:
    fine = option(0.5, ALL, ALL)
    for wish, words in ((Wish(needles=0.9, lengths=(512,)), "not measured at 512 tokens"), (Wish(perplexity=0.1), "no running text")):
        with pytest.raises(ValueError, match=words):
            recommend([fine], wish)
    with pytest.raises(ValueError, match="dense: needles at 4096 tokens was not measured"):
        recommend([Option(fine.plan, fine.rows[:1])], Wish(needles=0.9))
    with pytest.raises(ValueError, match="no measured plan"):
        recommend([], Wish(needles=0.9))


def test_a_run_without_the_scores_of_a_wish_is_left_out_and_told() -> None:
    fine, bare = option(0.5, ALL, ALL), option(0.25, ALL, ALL)
    bare = Option(bare.plan, tuple(row for row in bare.rows if row.task != "needles"), "bare")
    advice = recommend([fine, bare], Wish(needles=0.9))
    assert advice.plan is fine.plan
    assert [one.option for one in advice.judged] == [fine]
    assert "Left out: " in advice.beside
    assert "(bare)" in advice.beside


def run_folder(path: Path, found: Option, weights: str) -> Path:
    path.mkdir(parents=True)
    found.plan.save(path / "plan.json")
    Measurements(found.rows, provenance=Provenance(weights=weights)).save(path / "measurements.json")
    return path


def test_options_are_read_from_runs_once_each_and_of_one_model(tmp_path: Path) -> None:
    half, quarter = option(0.5, ALL, ALL), option(0.25, NEARLY, ALL)
    run_folder(tmp_path / "run" / "density-0.5", half, "a")
    run_folder(tmp_path / "run" / "density-0.25", quarter, "a")
    (tmp_path / "run" / "plan.json").write_text((tmp_path / "run" / "density-0.25" / "plan.json").read_text())
    (tmp_path / "run" / "measurements.json").write_text((tmp_path / "run" / "density-0.25" / "measurements.json").read_text())
    assert len(options_of([tmp_path / "run"])) == 2
    shown = CliRunner().invoke(app, ["recommend", str(tmp_path / "run"), "--needles", "0.95"])
    assert shown.exit_code == 0, shown.output
    assert "Take moa (run): it keeps 25.0% of the bytes" in shown.output
    asked = ["--sequences", "4", "--gpu", "l4", "--weights-gb", "1"]
    served = CliRunner().invoke(app, ["recommend", str(tmp_path / "run"), *asked])
    assert "of 8,192 tokens at once on L4 24GB, 4 asked. Not asked for, but measured: needles 0." in served.output
    assert "It was measured to 4,096 tokens; at 8,192 nobody knows" in served.output
    unknown = CliRunner().invoke(app, ["recommend", str(tmp_path / "run"), *asked[:4]])
    assert "need --weights-gb" in str(unknown.exception)
    run_folder(tmp_path / "mine" / "run", half, "a")
    names = [one.source for one in options_of([tmp_path / "run", tmp_path / "mine"])]
    assert names == ["run", "density-0.5"], "what was found twice counts once"
    run_folder(tmp_path / "yours" / "run", option(0.4, NEARLY, ALL), "a")
    names = [one.source for one in options_of([tmp_path / "run", tmp_path / "yours"])]
    assert names == [f"{tmp_path.name}/run", "density-0.5", "yours/run"]
    with pytest.raises(ValueError, match="no measured plan"):
        options_of([tmp_path / "nothing"])
    run_folder(tmp_path / "other", half, "b")
    with pytest.raises(ValueError, match="different models"):
        options_of([tmp_path / "run", tmp_path / "other"])


def test_the_record_of_an_engine_is_shown(tmp_path: Path) -> None:
    record = Path(__file__).parents[2] / "data/benchmarks/engines/vllm-fp8.json"
    shown = CliRunner().invoke(app, ["show", str(record)])
    assert shown.exit_code == 0, shown.output
    assert "prompts of 4,096: 112 at once" in shown.output
    broken = json.loads(record.read_text())
    del broken["rows"][0]["batch"]
    (tmp_path / "broken.json").write_text(json.dumps(broken))
    failed = CliRunner().invoke(app, ["show", str(tmp_path / "broken.json")])
    assert isinstance(failed.exception, ValueError)
