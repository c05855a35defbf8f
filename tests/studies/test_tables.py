"""Tables of studies, as text in data frames."""

from __future__ import annotations

from pathlib import Path

import pytest

from moa_lab.evaluate.compare import difference, row_of
from moa_lab.evaluate.intervals import Interval
from moa_lab.records import Measurement
from moa_lab.studies import StudyRecord
from moa_lab.studies.calibrating.answer import over_fewer
from moa_lab.studies.densities.speed import decode_table
from moa_lab.studies.predicting.objectives import predictor_table, solver_table
from moa_lab.studies.record import StudyGoal
from moa_lab.studies.searching.rules import against_linear
from moa_lab.studies.tables import by_density, change_table, closer_table, gain_table, goal_table, score_table, scored

STUDIES = Path(__file__).resolve().parents[2] / "data" / "studies"


def row(plan: str, task: str, length: int, samples: list[float], metric: str = "retrieval") -> Measurement:
    value = sum(samples) / len(samples)
    detail = {"per_sample": samples, "samples": "same"}
    return Measurement(plan, metric, task, length, value, len(samples), value - 0.1, value + 0.1, 0.5, detail)


ROWS = [
    row("moa-25", "needles", 512, [1, 1, 1, 0]), row("moa-25", "needles", 1024, [1, 0, 1, 0]),
    row("dense", "needles", 512, [1, 1, 1, 1]), row("dense", "needles", 1024, [1, 1, 1, 1]),
    row("moa-25", "documents", 512, [2.0, 2.5, 3.0, 3.5], "cross_entropy"),
    row("dense", "documents", 512, [1.0, 1.5, 2.0, 2.5], "cross_entropy"),
]  # fmt: skip


def test_scores_stand_by_plan_and_length_under_the_names_that_are_given() -> None:
    table = score_table(ROWS, {"ours": "moa-25", "dense": "dense"}, "needles", [512, 1024])
    assert table.to_dict("index") == {"ours": {"512": "75%", "1,024": "50%"}, "dense": {"512": "100%", "1,024": "100%"}}
    assert score_table(ROWS, ["moa-25"], "needles", [512], ".2f", interval=True).loc["moa-25", "512"] == "0.75 [0.65, 0.85]"
    assert by_density(ROWS, ["moa"], ["25"], "needles", [512, 1024]).loc["25%", ("1,024", "moa")] == "50%"
    with pytest.raises(KeyError, match="was not measured"):
        score_table(ROWS, ["uniform"], "needles", [512])


def test_gains_are_paired_over_all_lengths_and_say_their_unit() -> None:
    table = gain_table(ROWS, {"moa on dense": ("moa-25", "dense")}, ["needles"], [512, 1024])
    assert list(table) == ["needles gained"]
    assert table.iloc[0, 0].startswith("-0.375 [")
    lost = gain_table(ROWS, {"moa on dense": ("moa-25", "dense")}, ["documents"], [512])
    assert list(lost) == ["documents, nats saved"]
    assert lost.iloc[0, 0] == "-1.000 [-1.000, -1.000] *"


def test_a_difference_is_starred_where_its_interval_leaves_out_nothing_less_than_0() -> None:
    rows = [row("a", "needles", 0, [0.5]), row("b", "needles", 0, [0.05])]
    table = change_table(rows, ["needles"])
    assert (table.loc["a", "needles"], table.loc["b", "needles"]) == ("+0.500 [+0.400, +0.600] *", "+0.050 [-0.050, +0.150]")


def test_goals_say_what_was_aimed_at_and_whether_that_is_met_and_decided() -> None:
    goals = [StudyGoal.of("needles", Interval(0.9, 10, 0.8, 1.0), 0.85), StudyGoal("speed", 2.0, 1.5, at_most=True)]
    table = goal_table(goals)
    assert table.loc["needles"].tolist() == ["0.900 [0.800, 1.000]", "≥ 0.85", True, False]
    assert table.loc["speed"].tolist() == ["2.000", "≤ 1.5", False, True]
    assert scored(goals[0], "+.1f") == "+0.9 [+0.8, +1.0]"


def test_who_is_closer_to_the_dense_model_is_said_where_an_interval_decides() -> None:
    quality = StudyRecord.load(STUDIES / "quality.json")
    table = closer_table(quality.rows, ["25", "50"], "summaries", [2048, 8192])
    for p, told in table.iterrows():
        for n in (2048, 8192):
            kind = p.removesuffix("%")
            found = difference(*(row_of(quality.rows, f"{name}-{kind}", "summaries", n, "kl") for name in ("moa", "uniform")))
            assert (f"{n:,}" in told["kl: chosen"]) == (found.high < 0)
            assert (f"{n:,}" in told["kl: uniform"]) == (found.low > 0)


def test_tables_of_records_hold_what_the_records_do() -> None:
    records = {name: StudyRecord.load(STUDIES / f"{name}.json") for name in ("speed", "calibration", "rules", "search")}
    speeds = decode_table(records["speed"].rows)
    assert speeds.loc["dense", "times dense"] == "1"
    assert speeds.loc["moa-25", "times dense"].startswith("3.18 [")
    fewer = over_fewer(records["calibration"])
    assert {name: found.length for name, found in fewer["needles"].items()} == {
        "all over samples-4": 0, "all over samples-16": 0, "all over length-2048": 2048, "all over length-4096": 0,
    }  # fmt: skip
    linear = against_linear(records["rules"])
    assert {(n, against.replace(f"linear as {plan}", "bytes")) for n, plan, against in linear.index} == {
        ("2,048", "linear"), ("4,096", "linear"), ("8,192", "bytes"),
    }  # fmt: skip
    found = records["search"].mean_score("learned", "needles", "retrieval", [2048, 4096])
    assert solver_table(records["search"], [2048, 4096]).index.tolist() == ["epsilon", "pymoo", "budget", "search"]
    predicted = predictor_table(records["search"], "25%", [2048, 4096])
    assert predicted.loc["slopes under drawn plans", "needles"] == f"{found:.3f}"
    assert [float(value) for value in predicted.iloc[:, 0]] == sorted(float(value) for value in predicted.iloc[:, 0])
