from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import tiny_model
from tiny_plans import small_plan, stored_plan
from transformers import PreTrainedModel

from moa_lab.plan import Plan
from moa_lab.serving import (
    GPU_VARIABLE,
    PLAN_LENGTH_VARIABLE,
    PLAN_VARIABLE,
    ServedPlan,
    check_device,
    check_served,
    served_plan,
)


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
    assert served.lengths(400) == (100,)


def test_windows_are_those_of_a_requests_own_length_in_steps_of_pages(card: Path) -> None:
    assert ServedPlan(Plan.load(card)).lengths(400, 64) == (64, 128, 192, 256, 320, 384, 400)


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


def test_heads_may_store_other_bits(model: PreTrainedModel, tmp_path: Path) -> None:
    for name, plan in (("same", small_plan(model).with_bits(8)), ("other", stored_plan(model))):
        assert served_plan({PLAN_VARIABLE: str(plan.save(tmp_path / f"{name}.json"))}) == ServedPlan(plan)


def test_a_gpu_takes_the_version_that_was_seen_there_others_and_stored_bits_when_asked_to(model: PreTrainedModel) -> None:
    served = ServedPlan(small_plan(model))
    check_device(served, "cpu", "0.32.0", {})
    check_device(served, "cuda", "0.26.1", {})
    check_device(served, "cuda", "0.32.0", {GPU_VARIABLE: "1"})
    with pytest.raises(ValueError, match=rf"by vLLM 0\.26\.x, and this is 0\.32\.0; {GPU_VARIABLE}=1 tries it"):
        check_device(served, "cuda", "0.32.0", {})
    with pytest.raises(ValueError, match="type tpu cannot be combined with a plan"):
        check_device(served, "tpu", "0.26.0", {GPU_VARIABLE: "1"})
    stored = ServedPlan(small_plan(model).with_bits(8))
    check_device(stored, "cpu", "0.32.0", {})
    check_device(stored, "cuda", "0.26.0", {GPU_VARIABLE: "1"})
    with pytest.raises(ValueError, match=rf"stored bits were not yet seen to be served on a GPU, .* {GPU_VARIABLE}=1 to try it"):
        check_device(stored, "cuda", "0.26.0", {})


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
    assert f"windows as at 100 tokens: keeps {plan.density(100):.1%} of 100 tokens" in told
    own = ServedPlan(plan).told(400)
    assert f"rounded up to a multiple of 64 tokens: keeps {plan.density(400):.1%} of 400 tokens" in own
