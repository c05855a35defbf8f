from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import tiny_model
from tiny_plans import small_plan
from transformers import PreTrainedModel

from moa_lab.plan import Plan
from moa_lab.serving import PLAN_LENGTH_VARIABLE, PLAN_VARIABLE, ServedPlan, check_served, served_plan


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture
def card(model: PreTrainedModel, tmp_path: Path) -> Path:
    return small_plan(model).save(tmp_path / "plan.json")


def test_without_a_plan_nothing_is_served_under_one() -> None:
    assert served_plan({}) is None
    assert served_plan({PLAN_VARIABLE: ""}) is None


def test_the_environment_names_the_plan_and_the_length_of_its_windows(card: Path) -> None:
    plan = Plan.load(card)
    assert served_plan({PLAN_VARIABLE: str(card)}) == ServedPlan(plan)
    served = served_plan({PLAN_VARIABLE: str(card), PLAN_LENGTH_VARIABLE: "100"})
    assert served == ServedPlan(plan, 100)
    assert served.length(400) == 100
    assert ServedPlan(plan).length(400) == 400


@pytest.mark.parametrize("length", ["0", "-3", "1.5", "long"])
def test_a_length_that_is_none_is_refused(card: Path, length: str) -> None:
    with pytest.raises(ValueError, match=f"{PLAN_LENGTH_VARIABLE} must be a whole number of tokens"):
        served_plan({PLAN_VARIABLE: str(card), PLAN_LENGTH_VARIABLE: length})


@pytest.mark.parametrize("content", ["", "{", "[]", json.dumps({"schema": "moa-lab/plan/1"})])
def test_a_file_that_is_no_card_is_refused_by_name(content: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"broken\.json"):
        served_plan({PLAN_VARIABLE: str(path)})


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises((ValueError, OSError), match=r"none\.json"):
        served_plan({PLAN_VARIABLE: str(tmp_path / "none.json")})


def test_stored_bits_are_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    path = small_plan(model).with_bits(8).save(tmp_path / "bits.json")
    with pytest.raises(ValueError, match="serving knows no stored bits"):
        served_plan({PLAN_VARIABLE: str(path)})


def test_a_model_of_another_geometry_is_refused_with_both(model: PreTrainedModel) -> None:
    served = ServedPlan(small_plan(model))
    check_served(served, model.config, 256)
    with pytest.raises(ValueError, match=r"another geometry: plan has 2 layers .* model has 3 layers"):
        check_served(served, tiny_model("llama", layers=3).config, 256)


def test_windows_as_at_a_length_that_no_request_reaches_are_refused(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="takes requests of at most 256 tokens"):
        check_served(ServedPlan(small_plan(model), 300), model.config, 256)


def test_the_log_says_what_is_kept(model: PreTrainedModel) -> None:
    plan = small_plan(model)
    told = ServedPlan(plan, 100).told(400)
    assert plan.identity() in told
    assert f"windows as at 100 tokens: keeps {plan.density(100):.1%}" in told
