"""Weights with heads in another order: the same model, and its plan in that order the same plan."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from tiny import random_tokens, tiny_model
from tiny_plans import mixed_plan
from transformers import PreTrainedModel

from moa_lab.models import geometry_of
from moa_lab.runtime import apply_plan
from moa_lab.serving.head_weights import FAMILIES, HeadWeights

TINY = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3")
ORDER = ((2, 0, 3, 1), (0, 3, 1, 2))


def model_of(family: str, **settings: object) -> PreTrainedModel:
    """Two layers of four KV heads, read by two query heads each."""
    model = tiny_model(family, num_attention_heads=8, num_key_value_heads=4, **({} if family == "phi3" else {"head_dim": 16}), **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                # Made as zeros, which are alike in any order.
                torch.nn.init.normal_(parameter)
    return model


def test_every_family_that_is_named_is_tried() -> None:
    assert {tiny_model(family).config.model_type for family in TINY} == FAMILIES


@pytest.mark.parametrize("family", TINY)
@torch.no_grad()
def test_a_model_whose_heads_have_moved_answers_as_before_and_a_plan_moves_with_them(family: str) -> None:
    model, tokens = model_of(family), random_tokens(2, 70)
    weights = HeadWeights(ORDER, geometry_of(model))
    moved = copy.deepcopy(model)
    moved.load_state_dict(dict(weights.reordered(model.state_dict().items())))
    weights.check_complete()
    assert not torch.equal(next(x for name, x in moved.named_parameters() if "o_proj" in name), _output(model))
    torch.testing.assert_close(moved(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-4)
    plan = mixed_plan(model)
    reordered = replace(plan, rules=tuple(tuple(row[head] for head in heads) for row, heads in zip(plan.rules, ORDER, strict=True)))
    with apply_plan(model, plan, 70):
        wanted = model(tokens).logits
    with apply_plan(moved, reordered, 70):
        torch.testing.assert_close(moved(tokens).logits, wanted, rtol=1e-4, atol=1e-4)
    with apply_plan(moved, plan, 70):
        assert not torch.allclose(moved(tokens).logits, wanted, rtol=1e-2, atol=1e-2)


def _output(model: PreTrainedModel) -> torch.Tensor:
    return next(x for name, x in model.named_parameters() if "o_proj" in name)


def test_biases_move_with_their_rows() -> None:
    model = model_of("llama", attention_bias=True)
    weights = HeadWeights(ORDER, geometry_of(model))
    moved = dict(weights.reordered(model.state_dict().items()))
    bias = model.state_dict()["model.layers.0.self_attn.k_proj.bias"]
    assert torch.equal(moved["model.layers.0.self_attn.k_proj.bias"], bias.view(4, 16)[list(ORDER[0])].flatten())
    output = "model.layers.0.self_attn.o_proj.bias"
    assert torch.equal(moved[output], model.state_dict()[output])


def test_weights_of_attention_that_are_not_known_are_refused_by_name() -> None:
    model = model_of("llama")
    for name, shape in (("self_attn.gate.weight", (4, 64)), ("self_attn.q_proj.weight", (127, 64)), ("self_attn.q_proj.qweight", (128, 8))):
        weights = HeadWeights(ORDER, geometry_of(model))
        with pytest.raises(ValueError, match=rf"weight model\.layers\.1\.{name} of shape .* its heads cannot be moved"):
            list(weights.reordered([(f"model.layers.1.{name}", torch.zeros(shape))]))


def test_a_checkpoint_that_calls_its_heads_otherwise_is_refused() -> None:
    model = model_of("llama")
    weights = HeadWeights(ORDER, geometry_of(model))
    given = {name.replace("layers.1.self_attn.v_proj", "layers.1.attention.wv"): x for name, x in model.state_dict().items()}
    list(weights.reordered(given.items()))
    with pytest.raises(ValueError, match=r"has no v_proj\.weight in layer 1"):
        weights.check_complete()
