"""What needs vLLM, in its own environment (make serving-env); elsewhere these tests are not collected."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from served_engine import Engine, Start
from tiny import tiny_model
from transformers import PreTrainedModel

from moa_lab.plan import Plan

collect_ignore_glob = [] if find_spec("vllm") else ["test_*.py"]

# In one process: a test can look at the scheduler, and an engine starts in seconds.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Start]:
    """Start vLLM on a model under a plan."""

    def make(model: PreTrainedModel, plan: Plan | None, **settings: Any) -> Engine:
        model.save_pretrained(tmp_path / "model")
        if plan is not None:
            monkeypatch.setenv("MOA_LAB_PLAN", str(plan.save(tmp_path / "plan.json")))
        return Engine(tmp_path / "model", **settings)

    yield make
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()
    gc.collect()


@pytest.fixture(scope="session")
def llama() -> PreTrainedModel:
    """Two layers of two KV heads."""
    return tiny_model("llama", max_length=1024)
