"""Studies run tiny models: one thread is faster than two that wait for each other, and one run of all studies serves every test."""

from functools import cache
from pathlib import Path

import pytest
import torch
from command_line import exit_code

from moa_lab import run_inputs
from moa_lab.pipeline import Run
from moa_lab.presets import RunSettings
from moa_lab.studies import MODULES, StudyRecord
from tests.studies.sketch import Sketch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def sketch(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Sketch:
    """`moa-lab study all` with a tiny model, done; its run holds the very model that the studies had."""
    folder = tmp_path_factory.mktemp("studies")
    settings = RunSettings(model=str(inputs[0]), preset="sketch", source=str(inputs[1]), columns="text=text,summary=summary")
    found = Sketch(folder / "records", Run(folder / "work", settings))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_inputs, "load_model", cache(run_inputs.load_model))
        assert exit_code(patch, *found.line("all", found.records)) == 0
        assert found.run.model is run_inputs.load_model(settings.model, plain_prompts=settings.plain_prompts)[0]
    return found


@pytest.fixture(scope="session")
def records(sketch: Sketch) -> dict[str, StudyRecord]:
    """The record of every study, by name."""
    return {name: StudyRecord.load(sketch.records / f"{name}.json") for name in MODULES}


@pytest.fixture(scope="session")
def run(sketch: Sketch) -> Run:
    """The run that the studies shared."""
    return sketch.run
