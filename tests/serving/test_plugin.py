"""How the plugin stands in for methods of vLLM, which need not be there."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_model
from tiny_plans import small_plan

from moa_lab.serving.vllm.plugin import _replace


def wrapped(own: Callable[..., Any]) -> Callable[..., Any]:
    """As vLLM wraps methods that it times."""
    return functools.wraps(own)(lambda *arguments: own(*arguments))


class Engine:
    @wrapped
    def answer(self, question: str) -> str:
        return f"own {question}"


def test_methods_are_replaced_once_also_where_they_are_wrapped_and_only_under_a_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        _replace(Engine, "answer", lambda own, served, self, question: f"{served.plan.name}, {own(self, question)}")
    monkeypatch.delenv("MOA_LAB_PLAN", raising=False)
    assert Engine().answer("one") == "own one"
    card = small_plan(tiny_model("llama")).save(tmp_path / "plan.json")
    monkeypatch.setenv("MOA_LAB_PLAN", str(card))
    assert Engine().answer("two") == "plan, own two"
