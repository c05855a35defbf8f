"""Gates: closed where nothing is lost, open where the answers need the far past, and the model left as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import VOCABULARY, tiny_model
from transformers import PreTrainedModel

from moa_lab.calibration.samples import Sample, SampleSet
from moa_lab.profiling.gates import train_gates

N = 192


def sample(model: PreTrainedModel, seed: int) -> Sample:
    tokens = np.random.default_rng(seed).integers(5, VOCABULARY, N)
    return Sample("questions", tokens, ((N - 8, N),))


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model("llama")


def samples(model: PreTrainedModel) -> SampleSet:
    return SampleSet(tuple(sample(model, seed) for seed in range(2)))


def test_without_a_penalty_nothing_closes(model: PreTrainedModel) -> None:
    # At 1 the divergence is 0, its least: there is no slope to follow but rounding.
    gates = train_gates(model, samples(model), span_tokens=80, steps=3, penalty=0.0)
    assert gates.shape == (2, 2)
    assert gates.min() > 0.9


def test_a_penalty_above_all_that_can_be_lost_closes_every_gate(model: PreTrainedModel) -> None:
    gates = train_gates(model, samples(model), span_tokens=80, steps=20, penalty=1e4, learning_rate=0.1)
    assert gates.max() == 0.0


def test_heads_that_lose_nothing_close_before_those_that_do(model: PreTrainedModel) -> None:
    # Values of zero in one KV head: its output is nothing, whatever it sees.
    attention = model.model.layers[1].self_attn
    with torch.no_grad():
        attention.v_proj.weight[16:] = 0
    gates = train_gates(model, samples(model), span_tokens=80, steps=25, penalty=0.02, learning_rate=0.05)
    assert gates[1, 1] == 0.0
    assert gates[1, 1] < gates[1, 0]


def test_the_model_is_as_before(model: PreTrainedModel) -> None:
    tokens = torch.arange(10, 30)[None]
    before = model(input_ids=tokens).logits
    train_gates(model, samples(model), span_tokens=80, steps=1)
    assert torch.equal(model(input_ids=tokens).logits, before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_no_steps_and_no_samples_are_refused(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="at least one step"):
        train_gates(model, samples(model), steps=0)
    with pytest.raises(ValueError, match="at least one step"):
        train_gates(model, SampleSet(()))
