"""One folder, several densities: what does not depend on a setting is made once, what does is kept for every value of it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
from command_line import exit_code
from killed_run import TINY

from moa_lab import presets
from moa_lab.engines import ENGINES, fits
from moa_lab.pipeline import Run
from moa_lab.plan import Plan, mixes_of
from moa_lab.presets import SETTINGS_SCHEMA, RunSettings
from moa_lab.records import Front, Measurements
from moa_lab.run_folder import ON_TOP, RunFolder
from moa_lab.search import InfeasibleError
from moa_lab.storage import to_json
from moa_lab.workbench.opening import open_run

SMALL = replace(TINY, refine_rounds=0, validate_profiled=False, candidates=2, baselines=("ranked",), search_seconds=3.0)
RESULTS = ("front.json", "plan.json", "measurements.json", "summary.json", "report.html")


@pytest.fixture(scope="module", autouse=True)
def small() -> None:
    cast(dict[str, presets.Preset], presets.PRESETS)["small"] = SMALL


@pytest.fixture(scope="module")
def settings(inputs: tuple[Path, Path]) -> RunSettings:
    return RunSettings(str(inputs[0]), 0.6, preset="small", source=str(inputs[1]), columns="text=text,summary=summary")


@pytest.fixture(scope="module")
def done(settings: RunSettings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run at 0.6, and then one at 0.75, in one folder."""
    out = tmp_path_factory.mktemp("densities") / "run"
    Run(out, settings).everything()
    Run(out, replace(settings, density=0.75)).everything()
    return out


def stages(out: Path, settings: RunSettings) -> set[str]:
    """The stages that a run goes through; own answers are told of also where they are only read."""
    seen: set[str] = set()
    Run(out, settings, lambda stage, done, total: seen.add(stage) if done else None).everything()
    return {stage for stage in seen if stage != "load model" and "own answers" not in stage}


def copied(done: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(done, tmp_path / "run"))


def test_another_density_in_the_same_folder_uses_the_profile_again_and_keeps_both_results(done: Path) -> None:
    first, second = (done / f"density-{density}" for density in ("0.6", "0.75"))
    for name in RESULTS:
        assert (done / name).read_bytes() == (second / name).read_bytes() != (first / name).read_bytes()
    assert Plan.load(first / "plan.json").density(512) <= 0.6 < Plan.load(second / "plan.json").density(512) <= 0.75
    assert json.loads((done / "settings.json").read_text())["density"] == 0.75
    # One profile: its parts are as many as its samples.
    assert len(list((done / "parts" / "profile").glob("*.safetensors"))) == 8


def test_the_first_density_comes_back_without_a_stage_that_is_run_again(done: Path, settings: RunSettings, tmp_path: Path) -> None:
    out = copied(done, tmp_path)
    assert stages(out, settings) == set()
    for name in RESULTS[:-1]:
        assert (out / name).read_bytes() == (out / "density-0.6" / name).read_bytes()


@pytest.mark.parametrize(
    ("changes", "again"),
    [
        ({"test_seed": 1}, {"evaluate"}),
        ({"test_lengths": (640,)}, {"search", "validate moa", "evaluate"}),
        ({"use_lengths": (768,)}, {"search", "validate moa", "evaluate"}),
        # Every candidate was measured: only the choice is made anew.
        ({"prefer": "needles"}, {"evaluate"}),
        ({"max_rules_per_layer": 1}, {"search", "validate moa", "evaluate"}),
        ({"min_span": 96}, {"search", "validate moa", "evaluate"}),
        ({"engine": "tensorrt-llm"}, {"search", "validate moa", "evaluate"}),
    ],
)
def test_a_later_setting_runs_only_the_stages_that_depend_on_it(
    changes: dict[str, object], again: set[str], done: Path, settings: RunSettings, tmp_path: Path
) -> None:
    found = stages(copied(done, tmp_path), replace(settings, **changes))  # type: ignore[arg-type]
    # Where the same plan is chosen again, its scores are known.
    assert again - {"evaluate"} <= found <= again
    if "engine" in changes:
        (path,) = [path for path in tmp_path.rglob("plan.json") if "engine-tensorrt-llm" in path.parent.name]
        plan = Plan.load(path)
        assert all(fits(plan, ENGINES["tensorrt-llm"], n) for n in plan.lengths)
        assert plan.search["engine"]["name"] == "tensorrt-llm"


@pytest.mark.parametrize(("name", "value"), [("seed", 1), ("lengths", (384,)), ("preset", "quick"), ("supervision", "text")])
def test_a_setting_of_the_samples_is_refused_and_the_message_names_their_files(
    name: str, value: object, done: Path, settings: RunSettings
) -> None:
    with pytest.raises(ValueError, match=rf"another {name} \(.*\): its samples.safetensors and profile.safetensors .* another folder"):
        Run(done, replace(settings, **{name: value}))  # type: ignore[arg-type]


def test_a_folder_of_before_whose_results_lie_on_top_goes_on_and_keeps_them(done: Path, settings: RunSettings, tmp_path: Path) -> None:
    out = tmp_path / "old"
    shutil.copytree(done, out, ignore=shutil.ignore_patterns("density-*", "floor-*"))
    stored = {name: value for name, value in to_json(replace(settings, density=0.75)).items() if name != "min_span"}
    (out / "settings.json").write_text(json.dumps({"schema": SETTINGS_SCHEMA, **stored}))
    before = (out / "plan.json").read_bytes()
    RunFolder(out, settings).begin()
    assert (out / "density-0.75" / "plan.json").read_bytes() == before
    assert not (out / "plan.json").exists()
    assert stages(out, replace(settings, density=0.75)) == set()
    assert (out / "plan.json").read_bytes() == before


def test_a_switch_that_is_killed_half_way_mixes_nothing(done: Path, settings: RunSettings, tmp_path: Path) -> None:
    out = copied(done, tmp_path)
    for name in RESULTS[:2]:
        (out / name).unlink()
    assert stages(out, settings) == set()
    for name in ON_TOP[1:]:
        assert (out / name).read_bytes() == (out / "density-0.6" / name).read_bytes()


def test_two_densities_that_differ_in_the_seventh_digit_have_two_places(settings: RunSettings, tmp_path: Path) -> None:
    places = {RunFolder(tmp_path, replace(settings, density=density)).place("plan.json") for density in (0.3333333, 0.3333334)}
    assert len(places) == 2


def test_two_mixes_and_one_of_two_widths_have_two_places(settings: RunSettings, tmp_path: Path) -> None:
    places = {
        RunFolder(tmp_path, replace(settings, bits=bits)).place("plan.json") for bits in ("16", "16,8", "16+8", "16,8,8+4", "16+8,8,4")
    }
    assert len(places) == 5


def test_the_workbench_opens_the_folder_of_one_density_with_the_profile_above_it(done: Path) -> None:
    state = open_run(done / "density-0.6")
    assert state.profile is not None
    assert state.plan is not None
    assert state.plan.density(512) <= 0.6
    assert state.table is not None
    assert state.table.min_span == 128
    assert open_run(done).plan.identity() != state.plan.identity()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"density": 0.001},
            r"density 0.001 at length 384 .* min_span 128 needs at least 0.3334; raise density .to 0.1693 .* --min-span 65.",
        ),
        ({"density": 0.2}, r"density 0.2 at length 384 .* lower min_span \(--min-span\) to at most 76"),
        ({"density": 0.5, "lengths": (100,)}, r"density 0.5 at length 100 .* needs at least 1;"),
        ({"density": 0.35, "test_lengths": (256,)}, r"density 0.35 at length 256 .* needs at least 0.5;"),
    ],
)
def test_a_density_below_the_floor_is_refused_before_the_folder_is_touched(
    changes: dict[str, object], message: str, settings: RunSettings, tmp_path: Path
) -> None:
    with pytest.raises(InfeasibleError, match=message):
        Run(tmp_path / "run", replace(settings, **changes)).everything()  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


def test_a_lower_floor_makes_the_density_feasible_and_every_plan_keeps_it(settings: RunSettings, tmp_path: Path) -> None:
    lower = replace(settings, density=0.2, min_span=70)
    Run(tmp_path, lower).check_density()
    out = tmp_path / "run"
    summary = Run(out, replace(lower, test_lengths=(512,))).everything()
    assert {name: entry["density"] <= 0.2 for name, entry in summary["plans"].items()} == {
        "dense": False, "uniform": True, "moa": True, "ranked": True,
    }  # fmt: skip
    assert Plan.load(out / "plan.json").min_span == 70


def test_a_run_searches_spans_in_every_mix_of_bits_and_measuring_chooses(settings: RunSettings, tmp_path: Path) -> None:
    mixed = replace(settings, density=0.4, bits="16,8", test_lengths=(512,))
    run = Run(tmp_path, mixed)
    summary = run.everything()
    assert set(summary["plans"]) == {"dense", "dense@8", "uniform", "uniform@8", "ranked", "moa"}
    assert 0.5 < summary["plans"]["dense@8"]["density"] < 0.7
    assert not any("dense@8" in clause for clause in summary["unequal"])
    validated = {row.plan for row in Measurements.load(tmp_path / "validation.json").rows}
    assert {"uniform", "uniform@8", "layers", "layers@8"} <= validated
    assert any(name.endswith("@per-head") for name in validated)
    assert len(run.profile().rounding) == len(run.profile().keys)
    by_head = next(point.plan for point in Front.load(run.records.place("front.json")) if len(mixes_of(point.plan)) == 2)
    assert {row.plan for row in run.measure([by_head])} == {by_head.name}
    for name in ("uniform", "uniform@8"):
        assert 0.38 < summary["plans"][name]["density"] <= 0.4
    assert run.plan().density(512) <= 0.4
    assert run.records.place("plan.json") != Run(tmp_path, replace(mixed, bits="16")).records.place("plan.json")
    assert run.records.place("plan.json") == Run(tmp_path, replace(mixed, bits="8, 16")).records.place("plan.json")
    assert Run(tmp_path, replace(mixed, bits="8,16")).plan() == run.plan()


def test_a_budget_that_only_fewer_bits_can_keep_is_a_run_without_the_plans_of_16_bits(settings: RunSettings, tmp_path: Path) -> None:
    tight = replace(settings, density=0.22, bits="8,4+16", test_lengths=(512,))
    summary = Run(tmp_path, tight).everything()
    assert set(summary["plans"]) == {"dense", "dense@8", "dense@4+16", "uniform@8", "moa"}
    assert all(entry["density"] <= 0.22 for name, entry in summary["plans"].items() if not name.startswith("dense"))
    with pytest.raises(InfeasibleError, match=r"density 0.15 at length 384 .* needs at least 0.2084; .* at most 92"):
        Run(tmp_path, replace(tight, density=0.15)).everything()


def test_a_shorter_sink_leaves_room_for_a_lower_floor_and_wants_a_folder_of_its_own(settings: RunSettings, tmp_path: Path) -> None:
    short = replace(settings, density=0.1, min_span=20, sink_tokens=4, test_lengths=(512,))
    run = Run(tmp_path, short)
    run.everything()
    assert (run.profile().sink_tokens, run.table().sink_tokens) == (4, 4)
    assert {(plan.sink_tokens, plan.min_span) for plan in (run.plan(), *run.baselines()) if not plan.is_dense} == {(4, 20)}
    assert run.plan().density(512) <= 0.1
    with pytest.raises(ValueError, match="another sink_tokens"):
        Run(tmp_path, replace(short, sink_tokens=8))
    with pytest.raises(ValueError, match="exceed the sink of 4"):
        replace(short, min_span=4)


@pytest.mark.parametrize(("option", "message"), [("--min-span=64", "sink of 64"), ("--max-rules-per-layer=0", "at least 1")])
def test_a_floor_within_the_sink_and_no_rules_at_all_are_refused_at_once(
    option: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(monkeypatch, "run", option, "--out", tmp_path / "run") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_stages_of_their_own_refuse_an_infeasible_density_before_the_model_is_loaded(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = ("--profile", done / "profile.safetensors", "--model", tmp_path / "no-model", "--density", "0.1")
    learn = ("learn", done / "samples.safetensors", *shared)
    refine = ("refine", done / "plan.json", "--samples", done / "samples.safetensors", *shared)
    search = ("search", done / "profile.safetensors", "--density", "0.1")
    for command in (learn, refine, search):
        assert exit_code(monkeypatch, *command, "--out", tmp_path / "front.json") == 2
        error = capsys.readouterr().err
        assert "density 0.1 at length 384 is infeasible: min_span 128 needs at least 0.3334" in error
        assert "--min-span" in error
    assert exit_code(monkeypatch, *search[:2], "--density", "0.2", "--min-span", "70", "--out", tmp_path / "front.json") == 0


def test_learning_where_all_tokens_fit_in_fewer_bits_is_refused_before_the_model_is_loaded(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = ("--profile", done / "profile.safetensors", "--model", tmp_path / "no-model", "--density", "0.8", "--bits", "8,4")
    assert exit_code(monkeypatch, "learn", done / "samples.safetensors", *shared, "--out", tmp_path / "front.json") == 2
    assert "density 0.8 holds all tokens in 8,4 bits" in capsys.readouterr().err
    assert not (tmp_path / "front.json").exists()


def test_a_study_that_no_density_is_feasible_for_is_refused_before_its_folder_is_touched(
    settings: RunSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = ("--model", settings.model, "--preset", "sketch", "--source", settings.source, "--columns", settings.columns)
    asked = ("study", "retrieval", *chosen, "--densities", "0.001,0.1", "--work", tmp_path / "work", "--out", tmp_path / "record.json")
    assert exit_code(monkeypatch, *asked) == 2
    assert "density 0.1 at length 512 is infeasible: min_span 128 needs at least 0.25" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()
