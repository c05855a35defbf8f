"""What is wrapped around a model: the plan and its ring reach the model inside, or the wrapper is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from tiny import random_tokens, tiny_model, tiny_tokenizer
from tiny_plans import small_plan
from transformers import LlamaForCausalLM, PreTrainedModel

from moa_lab.models import geometry_of, weights_fingerprint
from moa_lab.runtime import RingCache, apply_plan, generate, ring_cache

torch.set_num_threads(1)

TOKENS = random_tokens(1, 60)
SETTINGS: dict[str, Any] = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5, "return_dict_in_generate": True}


class PeftModel(torch.nn.Module):
    """Calls its model as PEFT's does: `generate` of the one inside, and `forward` past the hooks of its `__call__`."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.base_model = torch.nn.Module()
        self.base_model.model = model

    def forward(self, *arguments: Any, **settings: Any) -> Any:
        return self.base_model.model.forward(*arguments, **settings)

    def generate(self, *arguments: Any, **settings: Any) -> Any:
        return self.base_model.model.generate(*arguments, **settings)


class Scaled(LlamaForCausalLM):
    """A user's subclass with a forward pass of its own."""

    def forward(self, *arguments: Any, **settings: Any) -> Any:
        found = super().forward(*arguments, **settings)
        found.logits = found.logits * 2
        return found


def distributed(model: PreTrainedModel) -> torch.nn.Module:
    # Without a process group: what it wraps is looked at, the wrapper is not run.
    wrapper = torch.nn.parallel.DistributedDataParallel.__new__(torch.nn.parallel.DistributedDataParallel)
    torch.nn.Module.__init__(wrapper)
    wrapper.module = model
    return wrapper


def dispatched(model: PreTrainedModel) -> PreTrainedModel:
    parts = ["model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head"]
    return dispatch_model(model, dict.fromkeys(parts, "cpu"), main_device="cpu", force_hooks=True)


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "peft": PeftModel, "peft, compiled": lambda model: torch.compile(PeftModel(model), backend="eager"),
    "data parallel": torch.nn.DataParallel, "accelerate": dispatched,
    "compiled": lambda model: torch.compile(model, backend="eager"),
}  # fmt: skip


def tiny() -> PreTrainedModel:
    return tiny_model("llama", tie_word_embeddings=False)


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_ring_reaches_the_model_inside_however_it_is_called(name: str) -> None:
    model = tiny()
    wrapped, plan = WRAPPERS[name](tiny()), small_plan(model)
    assert geometry_of(wrapped) == geometry_of(model)
    assert weights_fingerprint(wrapped) == weights_fingerprint(model)
    with torch.no_grad(), apply_plan(model, plan):
        expected, said = model(TOKENS).logits, model.generate(TOKENS, **SETTINGS).sequences
    with torch.no_grad(), apply_plan(wrapped, plan) as planned:
        assert planned is wrapped
        found = wrapped(TOKENS)
        assert isinstance(found.past_key_values, RingCache)
        # Data parallel moves the model to a GPU where there is one.
        torch.testing.assert_close(found.logits.cpu(), expected, atol=1e-5 if found.logits.device.type == "cpu" else 1e-2, rtol=1e-5)
        assert isinstance(ring_cache(wrapped), RingCache)
        if hasattr(wrapped, "generate"):
            answer = wrapped.generate(TOKENS, **SETTINGS)
            assert isinstance(answer.past_key_values, RingCache)
            assert answer.sequences.tolist() == said.tolist()


@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, distributed, PeftModel])
def test_generation_takes_a_wrapped_model(wrap: Callable[[Any], Any]) -> None:
    model, tokenizer = tiny(), tiny_tokenizer()
    found = [generate(whole, tokenizer, "a prompt", max_new_tokens=4, plan=small_plan(model)).tokens for whole in (model, wrap(model))]
    assert found[0] == found[1]


def test_the_model_within_a_model_makes_the_ring_too() -> None:
    model = tiny()
    with apply_plan(model, small_plan(model)):
        assert isinstance(model.model(TOKENS).past_key_values, RingCache)
        assert isinstance(model.forward(TOKENS).past_key_values, RingCache)
        assert isinstance(model(TOKENS, use_cache=None).past_key_values, RingCache)
        given = ring_cache(model)
        assert model(TOKENS, None, None, given).past_key_values is given
        assert isinstance(model(TOKENS, None, None, None).past_key_values, RingCache)


def test_a_subclass_with_a_forward_of_its_own_gets_the_ring_and_keeps_its_forward() -> None:
    plain = tiny()
    model = Scaled(plain.config).eval()
    model.load_state_dict(plain.state_dict())
    with torch.no_grad():
        with apply_plan(plain, small_plan(plain)):
            expected = plain(TOKENS).logits
        with apply_plan(model, small_plan(plain)):
            torch.testing.assert_close(model(TOKENS).logits, 2 * expected)
            assert isinstance(model(TOKENS).past_key_values, RingCache)
            assert isinstance(model.generate(TOKENS, **SETTINGS).past_key_values, RingCache)


def test_adapters_of_peft_are_under_the_plan() -> None:
    peft = pytest.importorskip("peft", reason="peft is no dependency; a wrapper that calls as it does is tested above")
    model = tiny()
    plan = small_plan(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)).eval()
    with torch.no_grad(), apply_plan(adapted, plan):
        found = adapted(input_ids=TOKENS)
        assert isinstance(found.past_key_values, RingCache)
        assert isinstance(adapted.generate(input_ids=TOKENS, **SETTINGS).past_key_values, RingCache)
    merged = adapted.merge_and_unload()
    with torch.no_grad(), apply_plan(merged, plan):
        torch.testing.assert_close(merged(TOKENS).logits, found.logits, atol=1e-4, rtol=1e-4)


# --- what is refused


class Prompted(PeftModel):
    """Stands for prefix and prompt tuning."""

    class active_peft_config:
        is_prompt_learning = True


class Holder:
    """Stands for a pipeline."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model


def on_two_devices(model: PreTrainedModel) -> torch.nn.Module:
    wrapper = torch.nn.DataParallel(model)
    wrapper.device_ids = [0, 1]
    return wrapper


def offloaded(model: PreTrainedModel) -> PreTrainedModel:
    return cpu_offload(model, execution_device="cpu")


@pytest.mark.parametrize(
    ("wrap", "kind", "cure"),
    [
        (Prompted, ValueError, "Prompted: .* use LoRA"),
        (on_two_devices, ValueError, "pass model.module"),
        (lambda model: torch.nn.Sequential(torch.nn.Sequential(model)), ValueError, "Sequential .* pass the one inside it, .0.0"),
        (lambda model: torch.nn.Linear(2, 2), ValueError, "Linear .* load one"),
        (Holder, TypeError, "got Holder: pass its .model"),
        (lambda model: "smollm2", TypeError, "got str: load one with moa_lab.load_model"),
        (offloaded, ValueError, "load it without offloading"),
    ],
)
def test_what_no_plan_can_be_applied_to_is_refused_in_one_line(wrap: Callable[[Any], Any], kind: type[Exception], cure: str) -> None:
    model = tiny()
    plan = small_plan(model)
    with pytest.raises(kind, match=cure) as caught, apply_plan(wrap(model), plan):
        pass
    assert "\n" not in str(caught.value)
