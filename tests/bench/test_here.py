"""This machine's own GPU: named, measured once, and offered where there is one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from command_line import exit_code

from moa_lab.bench import here
from moa_lab.bench.lifelike import lifelike_table
from moa_lab.capacity import GPUS
from moa_lab.workbench.on_gpu import OnGpu
from moa_lab.workbench.state import State

GPU = torch.cuda.is_available()


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A machine whose GPU is told and measured as written here: what was measured, in order."""
    measured: list[str] = []
    monkeypatch.setattr(here, "is_here", lambda: True)
    monkeypatch.setattr("moa_lab.workbench.on_gpu.is_here", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(name="Some GPU", total_memory=8 * 10**9))
    monkeypatch.setattr(here, "read_rate", lambda _: measured.append("read") or 1e12)
    monkeypatch.setattr(here, "matmul_rate", lambda _: measured.append("products") or 1e14)
    here.this_gpu.cache_clear()
    return measured


def test_it_is_measured_once_and_what_is_given_counts_instead(pretended: list[str]) -> None:
    found = here.gpu_named("here")
    assert (found.name, found.memory_bytes, found.read_bytes_s, found.matmul_flops_s, found.measured) == (
        "Some GPU (here)", 8 * 10**9, 1e12, 1e14, True,
    )  # fmt: skip
    assert here.gpu_named("here", 4.0, 500.0).memory_bytes == 4 * 10**9
    assert here.gpu_named("here", 4.0, 500.0).read_bytes_s == 5e11
    assert pretended == ["read", "products"]
    assert here.gpu_named("h200") is GPUS["h200"]
    here.this_gpu.cache_clear()


def test_a_panel_offers_it_and_measures_when_it_is_chosen(pretended: list[str]) -> None:
    panel = OnGpu(State(table=lifelike_table(quick=True)), "budget", lambda: None)
    assert "here" in {key for _, key in panel.gpu.options}
    assert panel.device.name != "Some GPU (here)"
    assert pretended == []
    panel.gpu.value = "here"
    assert panel.device.name == "Some GPU (here)"
    here.this_gpu.cache_clear()


@pytest.mark.skipif(GPU, reason="there is a GPU")
def test_without_one_it_is_refused_and_not_offered(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    here.this_gpu.cache_clear()
    plan = Path(__file__).parents[2] / "data" / "runs" / "standard-50" / "plan.json"
    assert exit_code(monkeypatch, "capacity", "--plan", plan, "--weights-gb", 1, "--gpu", "here") == 2
    assert "this machine has no GPU" in capsys.readouterr().err
    assert "here" not in {key for _, key in OnGpu(State(table=lifelike_table(quick=True)), "budget", lambda: None).gpu.options}


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_a_real_one_reads_and_multiplies() -> None:
    here.this_gpu.cache_clear()
    found = here.this_gpu()
    assert 5e10 < found.read_bytes_s < 5e13
    assert 1e12 < found.matmul_flops_s < 1e17
