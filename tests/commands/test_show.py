"""`moa-lab show`: what a file says is shown on any terminal, and only what can be a measurement as one."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from figure_records import make_measurements, make_validation

from moa_lab.commands.show import describe, kind_of
from moa_lab.geometry import ModelGeometry
from moa_lab.plan import Plan, uniform_plan
from moa_lab.storage import RecordError

CARD = uniform_plan(ModelGeometry(2, 4, 2, 16, 4096), 0.5, [1024]).card()


def shown(path: Path, data: Any) -> str:
    path.write_text(json.dumps(data))
    return describe(path, kind_of(path))


@pytest.mark.parametrize("name", ["r\x1b[2J", "r\nneedles: 1.000 [1.000, 1.000] (n = 99)"])
def test_a_name_neither_steers_the_terminal_nor_forges_a_line(name: str, tmp_path: Path) -> None:
    plain = shown(tmp_path / "card.json", {**CARD, "scores": {"r": 0.5}})
    nasty = shown(tmp_path / "card.json", {**CARD, "scores": {name: 0.5}, "provenance": {"model": "\x1b[31m"}})
    assert "\x1b" not in nasty
    assert len(nasty.splitlines()) == len(plain.splitlines())


@pytest.mark.parametrize(
    "score",
    [
        {"value": True, "low": None, "high": None, "n": 4},
        {"value": 0.5, "low": 0.4, "high": 0.6, "n": True},
        {"value": 0.5, "low": 0.4, "high": 0.6, "n": -5},
        {"value": 0.5, "low": 0.9, "high": 0.1, "n": 5},
        {"value": 0.5, "low": 0.4, "high": 0.6, "n": 10**900},
        {"value": 0.5, "n": 5},
    ],
)
def test_a_score_that_no_measurement_can_give_is_shown_as_it_is(score: dict[str, Any], tmp_path: Path) -> None:
    assert "(as the card has it, without interval or n)" in shown(tmp_path / "card.json", {**CARD, "scores": {"r": score}})


def test_a_card_with_bits_is_shown_with_them(tmp_path: Path) -> None:
    stored = Plan.from_card(CARD).with_bits(np.array([[[8, 4], [8, 4]], [[16, 16], [8, 4]]]))
    text = shown(tmp_path / "card.json", stored.card())
    assert "3 heads store K in 8 bits, V in 4" in text
    assert "1 heads store K in 16 bits, V in 16" in text
    assert "store K" not in shown(tmp_path / "card.json", CARD)


def test_candidates_of_a_validation_are_listed_by_score_with_their_kind_and_what_they_lose(tmp_path: Path) -> None:
    path = make_validation().save(tmp_path / "validation.json")
    head, *rows = describe(path, kind_of(path)).splitlines()[2:-1]
    assert head.split("  ")[0] == "candidate"
    assert [row.split()[0] for row in rows] == ["refined-1", "milp-00", "learned", "layers", "far-5", "uniform", "ranked-128"]
    assert re.split(r"  +", rows[0]) == ["refined-1", "refined spans", "0.301", "12.5%", "0.0700", "0.0340", "chosen"]
    assert re.split(r"  +", rows[3]) == ["layers", "a span per layer", "0.733", "50.0%", "0.6000", "0.0700"]


def test_other_measurements_have_no_candidates_and_losses_without_numbers_are_refused_by_name(tmp_path: Path) -> None:
    path = make_measurements().save(tmp_path / "measurements.json")
    assert "candidates" not in describe(path, kind_of(path))
    found = make_validation()
    flat = {**found.settings, "losses": {"refined-1": {"needles": 0.1}}}
    path = replace(found, settings=flat).save(tmp_path / "validation.json")
    with pytest.raises(RecordError, match=r"validation\.json: field losses"):
        describe(path, kind_of(path))


@pytest.mark.parametrize("grid", [[], [[]], [[0.5, 0.5], [0.5]]])
def test_an_authors_plan_without_heads_or_of_uneven_layers_is_refused(grid: list[list[float]], tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"two equal grids of numbers|2 layers of \[1, 2\] heads"):
        shown(tmp_path / "plan.json", {"alphas": grid, "betas": grid})
