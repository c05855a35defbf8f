"""The table of chips that kernels were compiled for: what was run, and who spills where it was not."""

from __future__ import annotations

from pathlib import Path

import pytest

from moa_lab.bench import BenchRecord
from moa_lab.bench.compiled import COMPILED_SCHEMA, chips_table
from moa_lab.storage import RecordError, write_json

RECORDS = Path(__file__).resolve().parents[2] / "data" / "benchmarks"


def row(chip: str, kernel: str, spilled: int) -> dict[str, object]:
    return {"chip": chip, "case": "ring", "kernel": kernel, "shared": 2048 + spilled, "registers": 100, "spilled": spilled}


@pytest.fixture
def compiled(tmp_path: Path) -> Path:
    rows = [row("sm_90", "a", 40), row("sm_90", "b", 0), row("gfx942", "a", 16), row("gfx942", "b", 1024)]
    chips = {name: {"shared": 65536, "registers": 255} for name in ("sm_90", "gfx942")}
    return write_json(tmp_path / "compiled.json", {"schema": COMPILED_SCHEMA, "chips": chips, "rows": rows})


def test_a_chip_is_told_with_what_was_run_and_with_what_spills_on_it_alone(compiled: Path) -> None:
    here, other = chips_table(compiled, [BenchRecord((), {"device": "NVIDIA H200"}), BenchRecord((), {"device": "NVIDIA H200"})])
    assert (here["run on"], other["run on"]) == ("NVIDIA H200", "compiled only")
    assert (here["spill"], here["spill here alone"], here["bytes"]) == (1, 0, 0)
    assert (other["spill"], other["spill here alone"], other["bytes"]) == (2, 1, 1024)
    assert (other["shared KiB"], other["registers"]) == ("3 of 64", "100 of 255")


def test_a_record_that_tells_its_architecture_needs_no_known_name(compiled: Path) -> None:
    _, other = chips_table(compiled, [BenchRecord((), {"device": "Some GPU", "architecture": "gfx942"})])
    assert other["run on"] == "Some GPU"


def test_another_kind_of_record_is_refused() -> None:
    with pytest.raises(RecordError, match="schema"):
        chips_table(RECORDS / "decode.json", [])
