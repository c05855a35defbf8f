"""How JupyterLab is started: for this machine alone, with its token, with settings a user may change."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest

from moa_lab.workbench import launch


def test_it_listens_on_the_loopback_and_keeps_its_token() -> None:
    line = " ".join(launch.command(port=9000, browser=False))
    assert "--ServerApp.ip=127.0.0.1" in line
    assert "--ServerApp.port=9000" in line
    assert "--no-browser" in line
    assert "token" not in line
    assert "00_tour.ipynb" in line


@pytest.mark.parametrize(("user", "told"), [(0, True), (1000, False)])
def test_it_starts_in_a_container_too_where_people_are_root(monkeypatch: pytest.MonkeyPatch, user: int, told: bool) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: user, raising=False)
    assert ("--allow-root" in launch.command()) is told


def test_what_is_missing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="checkout"):
        launch.command(notebooks=tmp_path)
    with pytest.raises(ValueError, match="moa-lab run --out"):
        launch.environment(tmp_path / "no run", tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"moa-lab\[lab\]"):
        launch.command()


def test_settings_are_written_once_and_then_the_users(tmp_path: Path) -> None:
    found = launch.environment(tmp_path, tmp_path / "settings")
    assert found["JUPYTERLAB_SETTINGS_DIR"] == str(tmp_path / "settings")
    assert found["MOA_LAB_RUN"] == str(tmp_path.resolve())
    written = tmp_path / "settings" / "@jupyterlab" / "notebook-extension" / "tracker.jupyterlab-settings"
    assert json.loads(written.read_text()) == {"windowingMode": "defer"}
    written.write_text("{}")
    launch.environment(tmp_path, tmp_path / "settings")
    assert written.read_text() == "{}"
