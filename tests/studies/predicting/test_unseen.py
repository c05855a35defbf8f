"""`moa-lab study unseen` goes on after a kill: nothing that was measured is measured again, and the record is the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from moa_lab.calibration import dataset
from moa_lab.evaluate import effects
from moa_lab.learning import checkpoint
from moa_lab.learning.slopes import SlopeSampler
from moa_lab.pipeline import Run
from moa_lab.presets import RunSettings
from moa_lab.studies import StudyRecord, scale_of
from moa_lab.studies.predicting.unseen import unseen

PLANS, SLOPES = "unseen: random plans", "unseen: slopes"
KILLS = ((PLANS, 2, 1), (SLOPES, 2, 1), (SLOPES, 3, 2), (SLOPES, 1, 2))
"""Where an attempt dies: in a stage, with so many done, when that is told for the first or second time. So among the first density's plans,
within its first sum of slopes, within its second one, and within the second density's first."""


class Killed(BaseException):
    pass


def dying(stage: str, done: int, time: int) -> Callable[[str, int, int], None]:
    seen = 0

    def progress(name: str, now: int, total: int) -> None:
        nonlocal seen
        seen += (name, now) == (stage, done)
        if seen == time:
            raise Killed

    return progress


def test_a_killed_study_measures_nothing_twice_and_leaves_the_same_record(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worked: list[str] = []

    def counted(owner: object, name: str) -> None:
        work = getattr(owner, name)

        def counting(*args: object, **kwargs: object) -> object:
            found = work(*args, **kwargs)
            worked.append(name)
            return found

        monkeypatch.setattr(owner, name, counting)

    for owner, name in ((SlopeSampler, "__call__"), (effects, "score_samples"), (dataset, "answer_greedily")):
        counted(owner, name)
    monkeypatch.setattr(checkpoint, "SAVE_S", 0.0)
    monkeypatch.setattr("moa_lab.studies.predicting.unseen.STEPS_PER_PLAN", 1)
    settings = RunSettings(model=str(inputs[0]), preset="sketch", source=str(inputs[1]), columns="text=text,summary=summary")
    # At two densities, as it is meant.
    scale = replace(scale_of("sketch"), density=0.75)

    def study(folder: Path, progress: Callable[[str, int, int], None] = lambda *_: None) -> StudyRecord:
        run = Run(folder, settings, progress)
        run.begin()
        return unseen(run, scale)

    whole = study(tmp_path / "whole")
    assert {row.task for row in whole.rows} == {"random plans of 75%", "random plans of 50%"}
    unbroken = sorted(worked)
    assert {name: unbroken.count(name) for name in ("__call__", "score_samples")} == {"__call__": 18, "score_samples": 8}
    worked.clear()
    broken = tmp_path / "broken"
    for kill in KILLS:
        kept = _parts(broken)
        with pytest.raises(Killed):
            study(broken, dying(*kill))
        assert kept.items() <= _parts(broken).items()
    resumed = study(broken)
    assert sorted(worked) == unbroken
    assert (resumed.rows, resumed.goals, resumed.answer, resumed.settings) == (whole.rows, whole.goals, whole.answer, whole.settings)


def _parts(folder: Path) -> dict[Path, int]:
    """Finished files and when they were made; sums of slopes are written anew as they grow."""
    return {path: path.stat().st_mtime_ns for path in (folder / "parts").rglob("*.*") if path.parent.name != "slopes"}
