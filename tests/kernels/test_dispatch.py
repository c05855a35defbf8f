"""The kernel and the reference are one attention: a model gives the same logits by either."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import random_tokens, tiny_model
from tiny_plans import stored_plan
from transformers import DynamicCache, PreTrainedModel

from moa_lab.kernels import dispatch, prefill
from moa_lab.models import geometry_of
from moa_lab.plan import full_or_floor_plan
from moa_lab.runtime import apply_plan, ring_cache

N = 300
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], list[int]]:
    """Switches the kernel on or off; the list says how many queries each kernel call was for."""
    calls: list[int] = []
    compute = prefill.prefill_attention

    def counting(query: torch.Tensor, *arguments: Any, **settings: Any) -> torch.Tensor:
        calls.append(query.shape[2])
        return compute(query, *arguments, **settings)

    def switch(on: bool) -> list[int]:
        monkeypatch.setattr(dispatch, "kernel_applies", lambda *tensors: on)
        monkeypatch.setattr(prefill, "prefill_attention", counting)
        return calls

    return switch


@torch.no_grad()
def logits(model: PreTrainedModel, tokens: torch.Tensor, **settings: Any) -> torch.Tensor:
    plan = full_or_floor_plan(geometry_of(model), whole=[(1, 0)], floor_tokens=128)
    with apply_plan(model, plan, N):
        found: torch.Tensor = model(input_ids=tokens, **settings).logits
    return found


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral", "qwen3", "gpt_oss"])
def test_a_model_gives_the_same_logits_by_kernel_and_by_reference(family: str, counted: Callable[[bool], list[int]]) -> None:
    model = tiny_model(family).to(DEVICE)
    tokens = random_tokens(2, N).to(DEVICE)
    counted(False)
    expected = logits(model, tokens)
    calls = counted(True)
    torch.testing.assert_close(logits(model, tokens), expected, atol=2e-4, rtol=1e-4)
    assert calls == [N] * geometry_of(model).layers, "the kernel takes every layer, those with a window of their own too"


@pytest.mark.parametrize("padding", [0, 90])
def test_padding_and_caches_give_the_same_logits_by_kernel(padding: int, counted: Callable[[bool], list[int]]) -> None:
    model = tiny_model("llama").to(DEVICE)
    tokens = random_tokens(2, N).to(DEVICE)
    mask = torch.ones(2, N, dtype=torch.long, device=DEVICE)
    mask[1, :padding] = 0
    counted(False)
    expected = logits(model, tokens, attention_mask=mask)
    calls = counted(True)
    cache = DynamicCache(config=model.config)
    first = logits(model, tokens[:, :200], attention_mask=mask[:, :200], past_key_values=cache, use_cache=True)
    second = logits(model, tokens[:, 200:], attention_mask=mask, past_key_values=cache, use_cache=True)
    assert set(calls) == {200, 100}
    real = mask.bool()
    torch.testing.assert_close(torch.cat([first, second], dim=1)[real], expected[real], atol=2e-4, rtol=1e-4)


@torch.no_grad()
def test_a_cache_with_bits_gives_the_same_logits_by_kernel(counted: Callable[[bool], list[int]]) -> None:
    model = tiny_model("llama").to(DEVICE)
    tokens = random_tokens(2, 60).to(DEVICE)
    found = []
    for by_kernel in (False, True):
        counted(by_kernel)
        with apply_plan(model, stored_plan(model), 60):
            cache = ring_cache(model)
            found.append(torch.cat([model(part, past_key_values=cache).logits for part in tokens.split([40, 1, 1, 18], dim=1)], dim=1))
    torch.testing.assert_close(found[1], found[0], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["right padding", "hole", "own mask"])
def test_what_a_first_key_cannot_tell_is_left_to_the_reference(kind: str, counted: Callable[[bool], list[int]]) -> None:
    model = tiny_model("llama").to(DEVICE)
    tokens = random_tokens(1, 40).to(DEVICE)
    mask = torch.ones(1, 40, dtype=torch.long, device=DEVICE)
    if kind == "own mask":
        mask = torch.ones(1, 1, 40, 40, dtype=torch.bool, device=DEVICE).tril()
        mask[..., 5] = False
        mask[..., 5, 5] = True
    else:
        mask[:, slice(30, 40) if kind == "right padding" else slice(5, 8)] = 0
    calls = counted(True)
    logits(model, tokens, attention_mask=mask)
    assert not calls


def test_the_kernel_is_for_gpus_and_for_inference() -> None:
    query = torch.zeros(1, 1, 4, 8)
    assert not dispatch.kernel_applies(query)
    if torch.cuda.is_available():
        assert dispatch.kernel_applies(query.cuda())
        assert not dispatch.kernel_applies(query.cuda().requires_grad_())
        assert not dispatch.kernel_applies(query.cuda(), query.cuda(), query.cuda().requires_grad_())
        assert not dispatch.kernel_applies(query.cuda().double())


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """FlashAttention-4 as if it were installed and faster from 200 tokens on: the lengths of the prompts that it takes."""
    from moa_lab.kernels import flash as module

    taken: list[int] = []

    def attend(query: torch.Tensor, *arguments: Any) -> torch.Tensor:
        taken.append(query.shape[2])
        return prefill.prefill_attention(query, *arguments)

    monkeypatch.setattr(module, "flash_applies", lambda query, key: query.shape[2] == key.shape[2] >= 200)
    monkeypatch.setattr(module, "flash_prefill", attend)
    monkeypatch.setattr(dispatch, "HAS_FLASH", True)
    return taken


@pytest.mark.parametrize(
    ("family", "padding", "taken"), [("llama", 0, 3), ("llama", 90, 0), ("mistral", 0, 0), ("gemma2", 0, 0), ("gpt_oss", 0, 0)]
)
def test_a_library_takes_whole_prompts_that_nothing_is_special_about(
    family: str, padding: int, taken: int, counted: Callable[[bool], list[int]], flash: list[int]
) -> None:
    model = tiny_model(family, layers=3).to(DEVICE)
    tokens = random_tokens(2, N).to(DEVICE)
    mask = torch.ones_like(tokens)
    mask[0, :padding] = 0
    counted(False)
    expected = logits(model, tokens, attention_mask=mask)
    counted(True)
    found = logits(model, tokens, attention_mask=mask)
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=2e-4, rtol=1e-4)
    assert flash == [N] * taken


def test_a_library_that_cannot_run_is_told_of_and_not_taken(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from moa_lab.kernels import flash as module

    query, key = torch.zeros(1, 4, 8192, 128, dtype=torch.float16), torch.zeros(1, 2, 8192, 128, dtype=torch.float16)
    monkeypatch.setattr(module, "nvidia_capability", lambda _: (9, 0))
    module.works.cache_clear()
    assert not module.flash_applies(query, key)
    assert not module.flash_applies(query, key)
    (told,) = caplog.messages
    assert "flash_attn" in told
    assert "our own kernel" in told
    monkeypatch.setattr(module, "works", lambda *_: True)
    assert module.flash_applies(query, key)
    assert not module.flash_applies(query[:, :, :4096], key)
    assert not module.flash_applies(query[:, :, :4096], key[:, :, :4096])
    assert not module.flash_applies(query.float(), key.float())
    assert not module.flash_applies(query[..., :64], key[..., :64])
    monkeypatch.setattr(module, "nvidia_capability", lambda _: (10, 0))
    assert not module.flash_applies(query, key)
