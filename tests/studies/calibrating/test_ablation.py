from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moa_lab.evaluate.intervals import Interval
from moa_lab.pipeline import Run
from moa_lab.records import InfluenceProfile, Measurement
from moa_lab.search import loss_table, paper_goals, rule_grid
from moa_lab.studies import StudyRecord
from moa_lab.studies.calibrating.ablation import Variant, supervised_samples, supervision_variants, task_variants, variant_plans
from moa_lab.studies.calibrating.answer import LONG_RANGE, ORDER, PAPER, calibration_answer, compared, fair, verdict
from moa_lab.studies.gains import NEEDLES_GAINED, Gain
from moa_lab.studies.plans import solved_plan
from tests.search.tables import random_profile

LENGTHS = (512, 640)


@pytest.fixture(scope="module")
def record(records: dict[str, StudyRecord]) -> StudyRecord:
    return records["calibration"]


def profile_with(samples: dict[str, int], seed: int = 0) -> InfluenceProfile:
    """A random profile of so many samples of each task, at two lengths."""
    random, geometry = np.random.default_rng(seed), random_profile(0).geometry
    shape = (geometry.layers, geometry.query_heads)
    distances = {(t, n): random.random((count, *shape, n // 64)).astype(np.float32) for t, count in samples.items() for n in LENGTHS}
    effects = {key: np.cumsum(values[..., ::-1], axis=-1)[..., ::-1] for key, values in distances.items()}
    blocks = {key: np.ones((*shape, values.shape[-1], values.shape[-1]), np.float32) for key, values in distances.items()}
    return InfluenceProfile(geometry, 64, blocks, distances, span_effects=effects)


def gain_of(plan: str, against: str, low: float, high: float, task: str = "needles") -> Gain:
    return Gain(plan, against, NEEDLES_GAINED, task, LENGTHS, Interval((low + high) / 2, 9, low, high), 0.25, 0.25)


def rows_of(hits: dict[str, list[int]]) -> list[Measurement]:
    return [
        Measurement(plan, "retrieval", "needles", n, float(np.mean(found)), len(found), 0, 1, 0.25, {"per_sample": found})
        for plan, found in hits.items()
        for n in LENGTHS
    ]


def test_the_model_answers_the_very_prompts_of_the_human_in_as_many_tokens_and_only_once(
    run: Run, record: StudyRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise AssertionError("answered again")

    monkeypatch.setattr("moa_lab.studies.calibrating.ablation.fill_greedily", fails)
    samples = supervised_samples(run)
    for human, model in zip(samples.select("human"), samples.select("model"), strict=True):
        ((start, stop),) = human.answers
        assert human.answers == model.answers
        assert (start, stop) == (512 - run.preset.answer_tokens, 512)
        np.testing.assert_array_equal(human.tokens[:start], model.tokens[:start])
        assert (human.tokens[start:] != model.tokens[start:]).any()
    assert len(samples.select("whole-text")) == len(samples.select("human")) == run.preset.summaries


def test_variants_are_parts_of_one_profile() -> None:
    variants = task_variants(profile_with({"questions": 8, "summaries": 4, "text": 3}), samples=(1, 4, 8, 99))
    counts = {name: {key: len(values) for key, values in v.profile.distances.items()} for name, v in variants.items()}
    assert set(counts) == {"questions", "summaries", "text", LONG_RANGE, "samples-1", "samples-4", "length-512", "length-640"}
    assert counts["samples-4"] == {("questions", n): 4 for n in LENGTHS} | {("summaries", n): 2 for n in LENGTHS}
    assert counts["samples-1"] == {(task, n): 1 for task in ("questions", "summaries") for n in LENGTHS}
    assert counts["length-640"] == {("questions", 640): 8, ("summaries", 640): 4}
    assert counts["text"] == {("text", n): 3 for n in LENGTHS}
    assert {name for name, v in variants.items() if v.paper} == {"questions", "summaries", "text", LONG_RANGE}


def test_a_profile_of_one_length_has_no_choice_of_lengths() -> None:
    whole = profile_with({"questions": 2})
    part = InfluenceProfile(
        whole.geometry, 64, {}, {("questions", 512): whole.distances["questions", 512]},
        span_effects={("questions", 512): whole.span_effects["questions", 512]},
    )  # fmt: skip
    assert set(task_variants(part, samples=(2,))) == {"questions", LONG_RANGE}


def test_every_variant_keeps_to_the_density_at_every_length_also_where_it_was_not_profiled() -> None:
    profile = profile_with({"questions": 4, "text": 2})
    limits = dict.fromkeys((*LENGTHS, 1280), 0.5)
    plans, left_out = variant_plans(task_variants(profile, (1,)), rule_grid(LENGTHS), limits)
    assert not left_out
    assert {"length-512", "samples-1", "text/paper"} < {plan.name for plan in plans}
    assert all(plan.density(n) <= 0.5 + 1e-9 for plan in plans for n in limits)


def test_the_papers_way_takes_single_values_and_sums() -> None:
    profile = profile_with({"questions": 4})
    rules, limits = rule_grid(LENGTHS), dict.fromkeys(LENGTHS, 0.6)
    plans = {plan.name: plan for plan in variant_plans({"q": Variant(profile, paper=True)}, rules, limits)[0]}
    table = loss_table(profile, rules, estimator="element")
    assert plans["q/paper"].rules == solved_plan(table, limits, "same", paper_goals(table)).rules
    assert plans["q"].rules == solved_plan(loss_table(profile, rules), limits, "same").rules
    assert plans["q"].rules != plans["q/paper"].rules


def test_an_infeasible_density_leaves_variants_out_with_the_reason() -> None:
    plans, left_out = variant_plans(supervision_variants(profile_with(dict.fromkeys(("model", "human", "whole-text"), 1))), rule_grid(LENGTHS), {512: 0.1})  # fmt: skip # noqa: E501
    assert not plans
    assert set(left_out) == {"model", "human", "whole-text"}
    assert "infeasible" in left_out["human"]
    assert calibration_answer([], [], LENGTHS, 0.1) == "No plan is feasible at 10.0%."


def test_the_order_is_reproduced_where_every_pair_is_better_and_the_nearly_equal_one_is_not_worse() -> None:
    near = gain_of("model", "human", -0.1, 0.1)
    far = [gain_of(better, worse, 0.1, 0.2) for better, worse in ORDER[1:]]
    assert verdict([near, *far]) == "reproduced"
    assert verdict([near, *far[:-1], gain_of(*ORDER[-1], -0.1, 0.2)]) == "not decided"
    assert verdict([near, *far[:-1], gain_of(*ORDER[-1], -0.2, -0.1)]) == "not reproduced"
    assert verdict([gain_of("model", "human", -0.2, -0.1), *far]) == "not reproduced"
    assert verdict([gain_of("model/paper", "human/paper", -0.1, 0.1), gain_of("human/paper", "whole-text/paper", 0, 0)]) == "not decided"
    assert verdict([]) == "not measured"


def test_a_plan_that_leaves_bytes_where_it_was_not_profiled_is_compared_where_it_leaves_none() -> None:
    def against(lengths: tuple[int, ...], kept: float, low: float = 0.1) -> Gain:
        found = gain_of(LONG_RANGE, f"length-{LENGTHS[0]}", low, low + 0.1)
        return replace(found, lengths=lengths, density=0.25, against_density=kept)

    alone, other, both = against(LENGTHS[:1], 0.25, -0.3), against(LENGTHS[1:], 0.125), against(LENGTHS, 0.19)
    assert fair([alone, other, both], LENGTHS) == [alone]
    even = replace(other, against_density=0.25)
    assert fair([alone, even, both], LENGTHS) == [both]


@pytest.mark.parametrize(("text_hits", "words"), [(0, "reproduced"), (1, "not reproduced"), (2, "not decided")])
def test_the_answer_says_yes_no_and_undecided(text_hits: int, words: str) -> None:
    good = [1, 1, 1, 0, 1, 1, 1, 1]
    weak = {0: [0, 0, 0, 0, 0, 0, 1, 0], 1: [1] * 8, 2: [1, 1, 1, 1, 0, 1, 1, 1]}[text_hits]
    strong = good if text_hits != 1 else [0] * 8
    hits = {f"{name}{way}": strong for name in ("model", "human", LONG_RANGE) for way in (PAPER, "")}
    hits |= {f"{name}{way}": weak for name in ("whole-text", "text") for way in (PAPER, "")}
    rows = rows_of({**hits, "samples-4": weak})
    answer = calibration_answer(rows, compared(rows, LENGTHS), LENGTHS, 0.25)
    assert f"the paper's order is {words} in needles, not measured in documents" in answer
    assert f"; the order is {words} in needles" in answer
    scores = f"{np.mean(strong):.2f}, {np.mean(strong):.2f}, {np.mean(weak):.2f}"
    assert f"{scores} of the needles (the paper: 0.95, 0.87, 0.27)" in answer
    assert ("not decided to be better than fewer" in answer) == (text_hits == 2)
    assert ("are better than samples-4 in needles" in answer) == (text_hits == 0)


def test_the_study_measures_every_variant_beside_dense_and_equal_uniform(record: StudyRecord) -> None:
    plans = {row.plan for row in record.select(metric="retrieval")}
    supervision = {
        f"{name}{way}" for name in ("model", "human", "whole-text", "questions", "summaries", "text", LONG_RANGE) for way in ("", PAPER)
    }
    assert plans == {"dense", "uniform-50", "samples-1"} | supervision
    assert all(row.density <= 0.5 + 1e-9 for row in record.rows if row.plan != "dense")
    assert record.settings["samples"]["human"] == {"human@512": 1}
    assert "the paper's order is" in record.answer
    assert {row.detail["against"] for row in record.select(plan="model", metric=NEEDLES_GAINED)} == {"human", "whole-text"}


def test_the_record_is_saved_and_read_again(record: StudyRecord, tmp_path: Path) -> None:
    assert StudyRecord.load(record.save(tmp_path / "calibration.json")).answer == record.answer
