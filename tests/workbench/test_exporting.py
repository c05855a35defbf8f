"""Export: what is written is what is read back, and nothing is overwritten unasked."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from figure_records import make_plan

from moa_lab.plan import Plan
from moa_lab.workbench.exporting import FORMATS, export


def test_every_format_holds_the_plan(tmp_path: Path) -> None:
    plan = make_plan()
    card, published, table, code = export(plan, tmp_path / "new", "mine", tuple(FORMATS), 2048)
    assert Plan.load(card).identity() == plan.identity()
    assert Plan.load(card).name == "mine"
    assert Plan.from_published(published, plan.geometry).rules == plan.rules
    spans = pd.read_csv(table).pivot(index="layer", columns="kv_head", values="span_tokens_at_2048").to_numpy()
    assert np.array_equal(spans, plan.spans(2048))
    ast.parse(code.read_text())
    assert "mine.json" in code.read_text()


def test_nothing_is_overwritten_unless_asked(tmp_path: Path) -> None:
    export(make_plan(), tmp_path, "mine", ("config card",), 2048)
    before = (tmp_path / "mine.json").read_text()
    with pytest.raises(FileExistsError, match=r"mine\.json"):
        export(make_plan(seed=5), tmp_path, "mine", tuple(FORMATS), 2048)
    assert (tmp_path / "mine.json").read_text() == before
    assert len(list(tmp_path.iterdir())) == 1, "nothing is written where anything would be replaced"
    export(make_plan(seed=5), tmp_path, "mine", ("config card",), 2048, replace=True)
    assert (tmp_path / "mine.json").read_text() != before


@pytest.mark.parametrize("name", ["", "..", "a/b", "../up", "a\\b"])
def test_a_name_that_leaves_the_folder_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no file name"):
        export(make_plan(), tmp_path, name, ("config card",), 2048)


def test_unknown_formats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pickle"):
        export(make_plan(), tmp_path, "mine", ("pickle",), 2048)
