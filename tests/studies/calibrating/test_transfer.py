from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from moa_lab.calibration.domains import DOMAINS
from moa_lab.evaluate.intervals import Interval
from moa_lab.geometry import ModelGeometry
from moa_lab.pipeline import Run
from moa_lab.records import InfluenceProfile, Measurement
from moa_lab.studies import StudyRecord
from moa_lab.studies.calibrating.transfer import FOREIGN, cost, cost_answer, ranks_answer
from moa_lab.studies.ranks import CORRELATION, SHARED, WIDTH, confidence_rows, correlation_rows, shared_top

LENGTHS = (512,)
GEOMETRY = ModelGeometry(layers=3, query_heads=4, kv_heads=4, head_dim=16, max_length=1024)


def profile_of(strength: np.ndarray, noise: float = 0.0, samples: int = 6, seed: int = 0) -> InfluenceProfile:
    """A profile whose heads lose `strength` (layers, query_heads) at every distance, plus noise of its own in every sample."""
    random = np.random.default_rng(seed)
    single = strength * (1 + noise * random.random((samples, *strength.shape)))
    distances = np.repeat(single[..., None], 8, axis=-1).astype(np.float32)
    effects = np.cumsum(distances[..., ::-1], axis=-1)[..., ::-1]
    key = ("questions", 512)
    return InfluenceProfile(GEOMETRY, 64, {key: np.ones((3, 4, 8, 8), np.float32)}, {key: distances}, span_effects={key: effects})


def row(plan: str, task: str, length: int, hits: list[int], metric: str = "retrieval") -> Measurement:
    return Measurement(plan, metric, task, length, float(np.mean(hits)), len(hits), 0, 1, 0.5, {"per_sample": hits})


def told(plan: str, pair: str, value: float) -> Measurement:
    return Measurement(plan, CORRELATION, pair, 0, value, 12, value, value, 1.0)


def test_domains_that_rank_heads_alike_correlate_and_reversed_ones_do_not() -> None:
    strength = np.random.default_rng(1).permutation(12).reshape(3, 4) + 1.0
    profiles = {"a": profile_of(strength), "b": profile_of(strength**2), "c": profile_of(13 - strength)}
    rows = {(r.plan, r.task): r.value for r in correlation_rows(profiles)}
    for estimator in ("span", "element"):
        assert rows[f"questions, {estimator}", "a/b"] == pytest.approx(1)
        assert rows[f"questions, {estimator}", "a/c"] == pytest.approx(-1)
        assert rows[f"questions, {estimator}", "a/a"] == pytest.approx(1)


def test_the_correlation_is_spearmans_of_what_heads_lose_beyond_the_floor() -> None:
    one, other = (np.random.default_rng(seed).random((3, 4)) for seed in (1, 2))
    (found,) = (
        r for r in correlation_rows({"a": profile_of(one), "b": profile_of(other)}) if (r.plan, r.task) == ("questions, span", "a/b")
    )
    assert found.value == pytest.approx(spearmanr(one.ravel(), other.ravel()).statistic)
    assert found.low <= found.value <= found.high
    assert found.n == 12


def test_noise_between_samples_lowers_the_agreement_of_a_domains_halves_and_widens_the_ranks() -> None:
    strength = np.random.default_rng(1).permutation(12).reshape(3, 4) + 1.0
    calm, noisy = {"a": profile_of(strength)}, {"a": profile_of(np.ones((3, 4)), noise=1.0)}
    halves = [next(r.value for r in correlation_rows(each) if r.task == "a/a") for each in (calm, noisy)]
    widths = [next(r.value for r in confidence_rows(each) if r.metric == WIDTH) for each in (calm, noisy)]
    assert halves[0] > 0.99 > halves[1]
    assert widths[0] == pytest.approx(0, abs=1e-6)
    assert widths[1] > 10


def test_every_head_has_a_rank_with_an_interval_over_all_samples_of_all_domains() -> None:
    strength = np.random.default_rng(1).permutation(12).reshape(3, 4) + 1.0
    rows = confidence_rows({"a": profile_of(strength), "b": profile_of(13 - strength, samples=2)})
    detail = next(r.detail for r in rows if r.metric == WIDTH)
    percent = 100 * (strength - 1) / 11
    # Six samples say one thing, two the opposite.
    np.testing.assert_allclose(detail["rank"], (6 * percent + 2 * (100 - percent)) / 8, atol=0.01)
    assert detail["samples"] == 8
    assert (np.array(detail["low"]) <= np.array(detail["rank"])).all()
    assert set(detail["influence"]) == {"a", "b"}


def test_shared_top_heads_are_those_strong_everywhere() -> None:
    strength = np.arange(20.0).reshape(4, 5)
    assert shared_top({"a": strength, "b": strength}).value == 1
    other = strength.copy()
    other[3, 4], other[0, 0] = 0, 19
    assert shared_top({"a": strength, "b": other})[:2] == (pytest.approx(1 / 3), 3)


def test_the_cost_pairs_the_mean_of_the_foreign_plans_with_the_own_one_on_each_sample() -> None:
    own = {"a": "a-25", "b": "b-25"}
    rows = [
        row("a-25", "a/needles", 512, [1, 1, 0, 1]), row("b-25", "a/needles", 512, [1, 0, 0, 0]),
        row("a-25", "b/needles", 512, [0, 0, 0, 0]), row("b-25", "b/needles", 512, [1, 1, 1, 1]),
        row("dense", "a/needles", 512, [1, 1, 1, 1]), row("a-25", "a/documents", 512, [5, 5, 5, 5], "cross_entropy"),
    ]  # fmt: skip
    found = cost(rows, own, ("a-25", "b-25"), "needles")
    assert found.n == 8
    assert found.value == pytest.approx(np.mean([0, -1, 0, -1, -1, -1, -1, -1]))
    assert found.high < 0
    third = [row("c-25", "a/needles", 512, [1, 1, 0, 1]), row("c-25", "b/needles", 512, [1, 1, 1, 1])]
    assert cost([*rows, *third], own, ("a-25", "b-25", "c-25"), "needles").value == pytest.approx(found.value / 2)


def test_the_answer_names_the_least_and_the_most_alike_and_the_ceiling() -> None:
    rows = [told("questions, span", "a/b", 0.9), told("text, span", "a/c", 0.2), told("text, element", "a/c", -0.5)]
    assert ranks_answer(rows) == (
        "Heads rank alike between domains to 0.20 (text, a and c) at the least and 0.90 (questions, a and b) at the most (Spearman)."
    )
    assert "one domain's own samples, to 0.70 to 0.80" in ranks_answer(
        [*rows, told("text, span", "a/a", 0.7), told("text, span", "b/b", 0.8)]
    )


@pytest.mark.parametrize(
    ("needles", "nats", "words"),
    [
        (
            (-0.1, -0.2, -0.05),
            (0.03, 0.01, 0.05),
            ("-0.100 needles found [-0.200, -0.050], decided", "+0.030 nats [+0.010, +0.050], decided"),
        ),
        ((0.1, 0.05, 0.2), (-0.03, -0.05, -0.01), ("+0.100 needles found [+0.050, +0.200], decided", "-0.030 nats")),
        ((-0.01, -0.05, 0.03), (0.0, 0.0, 0.0), ("[-0.050, +0.030], not decided", "[+0.000, +0.000], not decided")),
    ],
)
def test_the_answer_says_whether_the_cost_is_decided(
    needles: tuple[float, float, float], nats: tuple[float, float, float], words: tuple[str, str]
) -> None:
    found = {"needles": Interval(needles[0], 9, *needles[1:]), "documents": Interval(nats[0], 9, *nats[1:])}
    text = cost_answer({FOREIGN: found, "uniform": found}, 0.25)
    assert all(word in text for word in words)
    assert text.startswith("At 25.0% kept")


def test_without_a_feasible_plan_the_answer_says_so() -> None:
    assert cost_answer({}, 0.1) == "No plan is feasible at 10.0%."


def test_the_study_measures_every_plan_on_every_domain(run: Run, records: dict[str, StudyRecord]) -> None:
    found = records["transfer"]
    plans = {"dense", "uniform-50", *(f"{domain}-50" for domain in DOMAINS)}
    for domain in DOMAINS:
        for task, metric in (("needles", "retrieval"), ("documents", "cross_entropy")):
            rows = found.select(task=f"{domain}/{task}", metric=metric)
            assert {(r.plan, r.length) for r in rows} == {(plan, length) for plan in plans for length in LENGTHS}
            assert all(r.density <= 0.5 + 1e-9 for r in rows if r.plan != "dense")
        assert InfluenceProfile.load(run.folder / "transfer" / f"{domain}.safetensors").tasks == ("questions", "summaries", "text")
    pairs = {r.task for r in found.select(metric=CORRELATION, plan="questions, span")}
    assert {"addresses/code", "addresses/arithmetic", "code/arithmetic"} <= pairs
    assert len(found.select(metric=WIDTH)) == len(found.select(metric=SHARED)) == 3
    assert {r.plan for r in found.select(task="every domain/needles")} == {FOREIGN, "uniform"}
    assert found.answer.startswith("Heads rank alike")
    assert "nan" not in found.answer


def test_the_record_is_saved_and_read_again(records: dict[str, StudyRecord], tmp_path: Path) -> None:
    found = records["transfer"]
    assert StudyRecord.load(found.save(tmp_path / "transfer.json")).rows == found.rows
