"""`moa-lab` in this process, for the tests of its commands."""

from __future__ import annotations

import pytest

from moa_lab.commands import app


def exit_code(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run `moa-lab` with `arguments` and return its exit code."""
    monkeypatch.setattr("sys.argv", ["moa-lab", *map(str, arguments)])
    with pytest.raises(SystemExit) as ending:
        app.main()
    return ending.value.code if isinstance(ending.value.code, int) else 0
