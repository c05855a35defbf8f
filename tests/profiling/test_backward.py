"""The backward pass of a whole model: its influence is what the loss really does when one value is turned down."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from tiny import VOCABULARY, tiny_model
from transformers import PreTrainedModel

from moa_lab.calibration.samples import Sample
from moa_lab.interface import AttentionCall, attention_sites, route_attention
from moa_lab.masks import visible
from moa_lab.profiling.backward import backward_pass, checkpointed
from moa_lab.profiling.influence import LayerInfluence, influence

torch.set_num_threads(1)

HEADS = 4
SINK = 8


class ExactNorm(torch.nn.Module):
    """An RMS norm that stays in float64: those of transformers compute in float32, which a small change of a loss drowns in."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * torch.rsqrt(hidden.pow(2).mean(dim=-1, keepdim=True) + self.eps) * self.weight


def exact_model(family: str) -> PreTrainedModel:
    model = tiny_model(family, dtype=torch.float64)
    norms = {name: module for name, module in model.named_modules() if type(module).__name__.endswith("RMSNorm")}
    for name, norm in norms.items():
        gemma = type(norm).__name__.startswith("Gemma")
        eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, ExactNorm(norm.weight + 1 if gemma else norm.weight, eps))
    return model


def random_sample(n_tokens: int, answers: tuple[tuple[int, int], ...], seed: int = 0) -> Sample:
    return Sample("random", np.random.default_rng(seed).integers(5, VOCABULARY, n_tokens), answers)


Change = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
"""Takes a layer, its attention weights and expanded values; returns the layer's output."""


def attending(change: Change, windows: np.ndarray | None = None) -> Callable[[int], Callable[[AttentionCall], torch.Tensor]]:
    """Handlers in float64 that write the attention out, with a change made to it."""

    def make(layer: int) -> Callable[[AttentionCall], torch.Tensor]:
        def handler(call: AttentionCall) -> torch.Tensor:
            group = call.query.shape[1] // call.key.shape[1]
            key, value = call.key.repeat_interleave(group, dim=1), call.value.repeat_interleave(group, dim=1)
            scores = call.query @ key.transpose(-1, -2) * call.scale
            if call.softcap is not None:
                scores = call.softcap * torch.tanh(scores / call.softcap)
            shown = call.positions >= 0
            if windows is not None:
                window = torch.from_numpy(np.repeat(windows[layer], group))[:, None, None]
                shown = shown & visible(call.query_positions, call.positions, SINK, window)
            dense, weights = (softmax(scores.masked_fill(~seen, float("-inf")), call.sink_logits) for seen in (call.positions >= 0, shown))
            return change(layer, weights, value) if windows is None else change_both(change, layer, weights, dense, value)

        return handler

    return make


def softmax(scores: torch.Tensor, sink_logits: torch.Tensor | None) -> torch.Tensor:
    """Weights of the keys; a sink logit takes the rest."""
    if sink_logits is None:
        return scores.softmax(dim=-1)
    return torch.cat([scores, sink_logits.expand(*scores.shape[:-1], 1)], dim=-1).softmax(dim=-1)[..., :-1]


def change_both(change: Change, layer: int, weights: torch.Tensor, dense: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """For changes that need the dense weights beside those under a plan: two stacked along the batch."""
    return change(layer, torch.cat([weights, dense]), value)


def loss_under(model: PreTrainedModel, sample: Sample, change: Change, windows: np.ndarray | None = None) -> torch.Tensor:
    tokens = torch.from_numpy(sample.tokens)[None]
    with route_attention(model, attending(change, windows)):
        logits = model(input_ids=tokens, use_cache=False).logits[0]
    where = torch.from_numpy(sample.answer_positions)
    return torch.nn.functional.cross_entropy(logits[where - 1], tokens[0, where])


def influence_of_entries(model: PreTrainedModel, sample: Sample) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Weights A and influence E of every layer, (heads, n, n) each, by autograd through full matrices."""
    kept: dict[int, torch.Tensor] = {}

    def keep(layer: int, weights: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        kept[layer] = weights if weights.requires_grad else weights.requires_grad_(True)
        return kept[layer] @ value

    with torch.enable_grad():
        loss = loss_under(model, sample, keep)
        gradients = torch.autograd.grad(loss, [kept[layer] for layer in sorted(kept)])
    weights = [kept[layer][0].detach() for layer in sorted(kept)]
    return weights, [influence(a, g[0]) for a, g in zip(weights, gradients, strict=True)]


def received_from(
    model: PreTrainedModel, batch: list[Sample], windows: np.ndarray | None = None, sink_tokens: int = SINK
) -> list[LayerInfluence]:
    received: dict[int, LayerInfluence] = {}
    backward_pass(model, batch, received.__setitem__, sink_tokens, windows)
    return [received[layer] for layer in range(len(received))]


FAMILIES_HERE = ["llama", "mqa", "gpt_neox", "gemma2", "mistral", "gpt_oss"]


@pytest.mark.parametrize("family", FAMILIES_HERE)
def test_influence_of_single_entries_equals_the_measured_change_of_the_loss(family: str) -> None:
    model = exact_model(family)
    sample = random_sample(70, ((60, 70),))
    all_weights, all_influence = influence_of_entries(model, sample)
    step = 0.03
    random = np.random.default_rng(0)
    for layer, (weights, found) in enumerate(zip(all_weights, all_influence, strict=True)):
        assert found.abs().max() > 1e-4
        # The strongest entries of every head, and some at random.
        entries = [(head, *divmod(int(found[head].abs().argmax()), 70)) for head in range(HEADS)]
        entries += [(int(random.integers(HEADS)), i, int(random.integers(i + 1))) for i in random.integers(1, 70, 4)]
        for head, i, j in entries:

            def turned_down(
                at: int, a: torch.Tensor, v: torch.Tensor, t: float, layer: int = layer, head: int = head, i: int = i, j: int = j
            ) -> torch.Tensor:
                if at == layer:
                    a = a.clone()
                    lost = t * a[0, head, i, j]
                    a[0, head, i, j] -= lost
                    a[0, head, i] /= 1 - lost
                return a @ v

            losses = [loss_under(model, sample, lambda at, a, v, t=t: turned_down(at, a, v, t)) for t in (step, -step)]
            measured = float(losses[0] - losses[1]) / (2 * step)
            assert measured == pytest.approx(float(found[head, i, j] * (1 - weights[head, i, j])), rel=0.03, abs=1e-7)


@pytest.mark.parametrize("family", FAMILIES_HERE)
def test_what_is_received_is_the_magnitude_of_every_entry_reduced(family: str) -> None:
    model = exact_model(family)
    sample = random_sample(150, ((100, 104), (140, 150)))
    _, expected = influence_of_entries(model, sample)
    for layer, found in enumerate(received_from(model, [sample])):
        full = torch.nn.functional.pad(expected[layer].abs(), (0, 42, 0, 42))
        # A soft-capped softmax is taken in float32.
        torch.testing.assert_close(found.blocks[0], full.reshape(HEADS, 3, 64, 3, 64).sum(dim=(2, 4)), atol=1e-6, rtol=1e-4)
        distance = torch.arange(192)[:, None] - torch.arange(192)[None]
        for b in range(3):
            counted = (distance // 64 == b) & (distance >= 0) & (torch.arange(192) >= SINK)
            torch.testing.assert_close(found.distances[0, :, b], (full * counted).sum(dim=(1, 2)), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("planned", [False, True], ids=["dense", "under a plan"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2"])
def test_span_effect_is_the_slope_of_the_loss_as_a_window_is_blended_in(family: str, planned: bool) -> None:
    model = exact_model(family)
    sample = random_sample(150, ((130, 150),))
    kv_heads = model.config.get_text_config().num_attention_heads if family == "gpt_neox" else 2
    windows = np.linspace(20, 90, 2 * kv_heads).astype(np.int64).reshape(2, kv_heads) if planned else None
    effects = received_from(model, [sample], windows)
    position = torch.arange(150)
    step = 1e-3
    for layer in range(2):
        for head in range(HEADS):
            for b in (0, 1):
                seen = visible(position[:, None], position[None], SINK, 64 * b)

                def blended(
                    at: int, a: torch.Tensor, v: torch.Tensor, t: float,
                    layer: int = layer, head: int = head, seen: torch.Tensor = seen,
                ) -> torch.Tensor:  # fmt: skip
                    now, dense = a[:1], a[-1:]
                    output = now @ v
                    if at == layer:
                        kept = dense[0, head] * seen
                        total = kept.sum(dim=-1, keepdim=True)
                        output[0, head] += t * (kept @ v[0, head] / total.clamp(min=1e-30) - dense[0, head] @ v[0, head])
                    return output

                losses = [loss_under(model, sample, lambda at, a, v, t=t: blended(at, a, v, t), windows) for t in (step, -step)]
                measured = float(losses[0] - losses[1]) / (2 * step)
                assert float(effects[layer].span_effects[0, head, b]) == pytest.approx(measured, rel=0.01, abs=2e-6)


def test_a_plan_leaves_no_influence_to_what_it_hides() -> None:
    model = tiny_model("llama")
    sample = random_sample(256, ((200, 256),))
    windows = np.array([[64, 256], [256, 64]])
    for layer, found in enumerate(received_from(model, [sample], windows)):
        for head in range(HEADS):
            hidden = windows[layer, head // 2] == 64
            assert (found.distances[0, head, 1:].sum() == 0) == hidden


def test_samples_of_a_batch_get_the_influence_they_have_alone() -> None:
    model = tiny_model("llama")
    one, other = random_sample(100, ((90, 100),)), random_sample(100, ((50, 53), (80, 100)), seed=1)
    together = received_from(model, [one, other])
    for index, sample in enumerate((one, other)):
        for batch, alone in zip(together, received_from(model, [sample]), strict=True):
            for name in ("blocks", "distances", "span_effects"):
                torch.testing.assert_close(getattr(batch, name)[index], getattr(alone, name)[0], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("trainable", [False, True])
def test_parameters_get_no_gradient(trainable: bool) -> None:
    model = tiny_model("llama").requires_grad_(False)
    if trainable:
        model.model.norm.weight.requires_grad_(True)
    received_from(model, [random_sample(70, ((60, 70),))])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_recomputed_activations_give_the_same_influence() -> None:
    model = tiny_model("llama", attention_dropout=0.5)
    sample = random_sample(150, ((130, 150),))
    attention_sites(model)  # which runs the model too, once
    passes = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda module, inputs: passes.append(module))
    plain = received_from(model, [sample])
    assert len(passes) == 2
    with checkpointed(model, True):
        recomputed = received_from(model, [sample])
    assert len(passes) == 2 + 4, "every layer runs once more in backward"
    for found, expected in zip(recomputed, plain, strict=True):
        torch.testing.assert_close(found.blocks, expected.blocks)
        torch.testing.assert_close(found.span_effects, expected.span_effects)


def test_checkpointing_is_undone_on_exit_and_after_an_exception() -> None:
    model = tiny_model("llama")
    before = {name: module.training for name, module in model.named_modules()}

    def interrupted() -> None:
        with checkpointed(model, True):
            assert model.is_gradient_checkpointing
            raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        interrupted()
    assert not model.is_gradient_checkpointing
    assert {name: module.training for name, module in model.named_modules()} == before


def test_denormal_numbers_are_back_after_a_pass() -> None:
    received_from(tiny_model("llama"), [random_sample(70, ((60, 70),))])
    assert float(torch.tensor(1e-40) * 1) > 0
