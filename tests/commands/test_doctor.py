"""The doctor says what works here, changes nothing, and names a cure for what does not."""

import hashlib
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from moa_lab import models
from moa_lab.commands import doctor
from moa_lab.commands.doctor import Finding, diagnose, find_chromium
from moa_lab.models import EmbeddedModel


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOA_LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delitem(models.EMBEDDED, "smollm2")
    entry = EmbeddedModel("tiny-weights==1.0", "tiny/tiny.gguf", hashlib.sha256(b"weights").hexdigest())
    monkeypatch.setitem(models.EMBEDDED, "tiny", entry)
    return tmp_path / "cache"


def finding(name: str) -> Finding:
    return next(found for found in diagnose() if found.name == name)


def test_every_finding_has_a_detail_and_a_cure_exactly_where_something_is_wrong(cache: Path) -> None:
    findings = diagnose()
    assert len({found.name for found in findings}) == len(findings)
    assert all(found.detail for found in findings)
    assert all(bool(found.cure) is not found.ok for found in findings)
    assert {"Python", "torch", "transformers", "device", "Triton", "Chromium", "disk", "memory"} <= {found.name for found in findings}
    assert not cache.exists()


def test_the_model_cache_is_missing_damaged_or_intact(cache: Path) -> None:
    assert not finding("model tiny").ok
    assert "not there yet" in finding("model tiny").detail
    cache.mkdir()
    (cache / "tiny.gguf").write_bytes(b"weight")
    assert "damaged" in finding("model tiny").detail
    (cache / "tiny.gguf").write_bytes(b"weights")
    assert finding("model tiny").ok


def test_an_old_or_missing_package_gets_the_command_that_cures_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"transformers": "5.9.1", "numpy": "2.10.0rc1"}

    def version(name: str) -> str:
        if name == "pymoo":
            raise metadata.PackageNotFoundError(name)
        return found.get(name, "99.0")

    monkeypatch.setattr(metadata, "version", version)
    assert finding("transformers") == Finding("transformers", False, "5.9.1", 'pip install -U "transformers>=5.17"')
    assert finding("pymoo") == Finding("pymoo", False, "not installed", 'pip install "pymoo>=0.6.1"')
    assert finding("numpy").ok


def test_chromium_is_what_browser_path_says_or_what_the_search_path_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    browser = tmp_path / "chromium"
    browser.touch(mode=0o755)
    monkeypatch.delenv("BROWSER_PATH", raising=False)
    monkeypatch.setattr(doctor, "CHROMIUM_PLACES", ())
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_chromium() == str(browser)
    monkeypatch.setenv("BROWSER_PATH", str(tmp_path / "none"))
    assert find_chromium() is None
    assert not finding("Chromium").ok
    assert not finding("Chromium").required


def test_too_little_disk_or_memory_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1 << 20))
    monkeypatch.setattr(doctor.psutil, "virtual_memory", lambda: SimpleNamespace(available=1 << 30))
    assert not finding("disk").ok
    assert not finding("memory").ok
    assert "MOA_LAB_CACHE" in finding("disk").cure
