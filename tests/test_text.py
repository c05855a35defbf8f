"""Words for errors and for what ends alike."""

from __future__ import annotations

from pathlib import Path

import pytest

from moa_lab.text import one_line, told_apart


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        ([], []),
        (["/a/demo"], ["demo"]),
        (["/a/demo", "/b/demo", "/b/other"], ["a/demo", "b/demo", "other"]),
        (["/x/runs/demo", "/x/data/runs/demo"], ["x/runs/demo", "data/runs/demo"]),
        (["/demo", "/a/demo"], ["/demo", "a/demo"]),
    ],
)
def test_paths_are_named_by_what_tells_them_apart(paths: list[str], names: list[str]) -> None:
    assert told_apart([Path(path) for path in paths]) == names


def test_what_the_system_refuses_is_told_without_its_number(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError) as refused:
        (tmp_path / "file").mkdir()
    assert one_line(refused.value) == f"{tmp_path / 'file'}: File exists"
    assert one_line(FileExistsError("it is there")) == "it is there"
