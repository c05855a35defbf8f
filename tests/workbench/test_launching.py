"""Engines: the command that each is started with, and the plans that it does not take."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from figure_records import SMOL, make_plan
from typer.main import get_command

from moa_lab.commands.app import app
from moa_lab.plan import dense_plan, uniform_plan
from moa_lab.provenance import Provenance
from moa_lab.workbench.export_panel import ExportPanel
from moa_lab.workbench.exporting import FORMATS
from moa_lab.workbench.launching import LAUNCHERS, launch
from moa_lab.workbench.state import State


@pytest.mark.parametrize("engine", LAUNCHERS)
def test_an_engine_reads_formats_that_are_written_and_its_command_is_one_that_there_is(engine: str) -> None:
    assert set(LAUNCHERS[engine].needs) <= set(FORMATS)
    words = shlex.split(launch(engine, make_plan(), Path("out") / "my_plan.json"))
    if words[0] != "moa-lab":
        assert words == ["cd", "out", "&&", "python", "my_plan.py"]
        return
    command = get_command(app).commands[words[1]]  # type: ignore[attr-defined]
    known = {name for option in command.params for name in option.opts}
    assert {word for word in words if word.startswith("--")} <= known


def test_a_server_takes_the_windows_of_each_requests_own_length_and_stored_bits() -> None:
    for plan in (make_plan(), dense_plan(SMOL), make_plan().with_bits(8)):
        assert launch("vLLM", plan, "card.json") == "moa-lab serve --model smollm2 --plan card.json"


def test_names_of_files_and_models_cannot_become_commands() -> None:
    plan = replace(make_plan(), provenance=Provenance(model="x; rm -rf ~"))
    assert shlex.split(launch("vLLM", plan, "my plans/$(id).json"))[2:6] == [
        "--model",
        "x; rm -rf ~",
        "--plan",
        "my plans/$(id).json",
    ]


def test_a_plan_that_an_engine_does_not_take_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="sink 64 and floor 128"):
        launch("the authors' code", uniform_plan(SMOL, 0.5, sink_tokens=4), "card.json")
    with pytest.raises(ValueError, match=r"transformers, vLLM, .*got 'llama.cpp'"):
        launch("llama.cpp", make_plan(), "card.json")


def test_the_panel_ticks_what_the_engine_reads_and_shows_its_command_or_why_it_refuses(tmp_path: Path) -> None:
    state = State(plan=make_plan(), n_tokens=1024)
    panel = ExportPanel(state, tmp_path)
    assert {box.description for box in panel.formats if box.value} == set(LAUNCHERS[panel.engine.value].needs)
    panel.engine.value = "the authors' code"
    assert {"config card", "published {alphas, betas}"} <= {box.description for box in panel.formats if box.value}
    assert "my_plan.published.json" in panel.launch.value
    panel.name.value = "another"
    assert "another.published.json" in panel.launch.value
    state.set(plan=make_plan().with_bits(8))
    assert "does not take this plan" in panel.launch.value


def test_other_engines_are_told_with_what_they_allocate_and_why_they_do_not_take_it(tmp_path: Path) -> None:
    state = State(n_tokens=2048)
    panel = ExportPanel(state, tmp_path)
    with pytest.raises(ValueError, match="no plan is chosen"):
        panel.compare()
    plan = make_plan()
    state.set(plan=plan)
    panel.compare()
    assert f"{plan.density(state.n_tokens):.1%}" in panel.engines.value
    for name in ("moa-lab-vllm", "vllm", "llama.cpp", "rounded"):
        assert name in panel.engines.value
    state.set(plan=plan.with_bits(8))
    assert panel.engines.value == ""
    panel.compare()
    assert "vllm does not hold it: " in panel.engines.value
