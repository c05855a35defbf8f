"""Layers that are compiled for long work: the same numbers, under plans and for slopes, and layers as they were afterwards."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import random_tokens, tiny_model
from tiny_plans import small_plan
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import PreTrainedModel

from moa_lab.calibration.samples import Sample
from moa_lab.interface import compiled
from moa_lab.interface.compiled import compiled_layers, compiling
from moa_lab.learning.slopes import drawn_slopes
from moa_lab.models import geometry_of
from moa_lab.runtime import apply_plan

torch.set_num_threads(1)
FAMILIES = ("llama", "gemma3")


def logits(model: PreTrainedModel, tokens: torch.Tensor, plan: bool) -> torch.Tensor:
    with torch.no_grad():
        if not plan:
            return model(tokens, use_cache=False).logits
        with apply_plan(model, small_plan(model), tokens.shape[1]):
            return model(tokens, use_cache=False).logits


def slopes(model: PreTrainedModel) -> np.ndarray:
    geometry = geometry_of(model)
    batch = [Sample("questions", random_tokens(1, 130, seed).numpy()[0], ((120, 130),)) for seed in (1, 2)]
    counts = torch.ones(geometry.layers, 2, geometry.kv_heads, dtype=torch.int32)
    return drawn_slopes(model, batch, counts, [1.0, 1.0], sink_tokens=4)[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_layers_compute_what_they_did_in_few_graphs(family: str) -> None:
    model = tiny_model(family)
    counter = CompileCounterWithBackend("aot_eager")
    texts = [random_tokens(batch, length) for batch, length in ((2, 60), (3, 70), (2, 90), (4, 60))]
    wanted = [logits(model, tokens, plan) for tokens in texts for plan in (False, True)]
    slope = slopes(model)
    with compiling(model, counter):
        found = [logits(model, tokens, plan) for tokens in texts for plan in (False, True)]
        told, made = slopes(model), counter.frame_count
        again = logits(model, texts[1], True)
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    assert np.allclose(told, slope, atol=1e-6)
    assert 0 < made == counter.frame_count, "a length that was not seen before is no new graph"
    assert torch.allclose(again, wanted[3], atol=1e-5)


def test_layers_are_afterwards_what_they_were_and_the_users_stay_compiled() -> None:
    model = tiny_model("llama")
    first, *others = compiled._layers(model)
    first.compile(backend="eager")
    own: Any = first._compiled_call_impl
    with compiling(model, "eager"):
        assert first._compiled_call_impl is own
        assert all(layer._compiled_call_impl is not None for layer in others)
    assert first._compiled_call_impl is own
    assert all(layer._compiled_call_impl is None for layer in others)


def test_what_cannot_be_compiled_runs_as_it_is_written() -> None:
    model, tokens = tiny_model("llama"), random_tokens(1, 40)

    def broken(*_: Any) -> Any:
        raise RuntimeError("no compiler")

    wanted = logits(model, tokens, True)
    with compiling(model, broken):
        assert torch.equal(logits(model, tokens, True), wanted)


def test_layers_are_compiled_on_a_gpu_once_many_tokens_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Any] = []
    monkeypatch.setattr(compiled, "compiling", lambda model: taken.append(model) or compiling(model, "eager"))
    model: Any = tiny_model("llama")
    with compiled_layers(model, 10 * compiled.HOT_TOKENS):
        assert not taken, "a CPU gains nothing"

    class OnGpu(torch.nn.Module):
        device = SimpleNamespace(type="cuda")

    monkeypatch.setattr(compiled, "plain_model", lambda model: model)
    monkeypatch.setattr(compiled, "_layers", lambda model: [])
    model = OnGpu()
    for begun in (0, 0, 1):
        with compiled_layers(model, compiled.HOT_TOKENS * 2 // 5):
            assert len(taken) == begun
