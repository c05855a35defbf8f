"""Captured attention: the same output and gradients as autograd's, and the influence of the naive full matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moa_lab.interface import AttentionCall
from moa_lab.masks import KeyMask, visible
from moa_lab.profiling import row_blocks
from moa_lab.profiling.capture import capturing
from moa_lab.profiling.influence import LayerInfluence, influence, naive_influence

torch.set_num_threads(1)

SCALE = 0.3
BATCH, HEADS, HEAD_DIM = 2, 4, 8


def random_call(
    n_tokens: int,
    kv_heads: int,
    *,
    softcap: float | None = None,
    own_window: int | None = None,
    dtype: torch.dtype = torch.float64,
    sinks: bool = False,
) -> tuple[AttentionCall, torch.Tensor]:
    """A prefill whose inputs need gradients, and a gradient of its output."""
    generator = torch.Generator().manual_seed(n_tokens)

    def draw(heads: int) -> torch.Tensor:
        return (2 * torch.randn(BATCH, heads, n_tokens, HEAD_DIM, generator=generator, dtype=torch.float64)).to(dtype)

    query, key, value, output_gradient = draw(HEADS), draw(kv_heads), draw(kv_heads), draw(HEADS)
    mask = KeyMask(1, n_tokens, n_tokens, query.device, reach=own_window)
    inputs = [x.requires_grad_(True) for x in (query, key, value)]
    sink_logits = torch.tensor([0.5, -1.0, 2.0, 4.0], dtype=dtype)[:, None, None] if sinks else None
    return AttentionCall(*inputs, mask=mask, scale=SCALE, softcap=softcap, sink_logits=sink_logits), output_gradient


def shown_under(call: AttentionCall, windows: np.ndarray | None, sink_tokens: int) -> torch.Tensor:
    """(1, 1 or query_heads, n, n): what each head sees, straight from the definition."""
    own = call.positions >= 0
    if windows is None:
        return own
    n = own.shape[-1]
    per_query_head = np.repeat(windows, HEADS // len(windows))
    heads = [visible(torch.arange(n)[:, None], torch.arange(n)[None], sink_tokens, int(window)) for window in per_query_head]
    return torch.stack(heads)[None] & own


def by_autograd(call: AttentionCall, shown: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, weights of the keys and expanded values, with every step left to autograd."""
    group = HEADS // call.key.shape[1]
    key, value = call.key.repeat_interleave(group, dim=1), call.value.repeat_interleave(group, dim=1)
    scores = call.query @ key.transpose(-1, -2) * SCALE
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    scores = scores.masked_fill(~shown, float("-inf"))
    if call.sink_logits is not None:
        scores = torch.cat([scores, call.sink_logits.expand(*scores.shape[:-1], 1)], dim=-1)
    weights = scores.softmax(dim=-1)[..., : key.shape[2]]
    return weights @ value, weights, value


def captured(
    call: AttentionCall, output_gradient: torch.Tensor, sink_tokens: int, windows: np.ndarray | None
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], LayerInfluence]:
    received: dict[int, LayerInfluence] = {}
    output = capturing(3, received.__setitem__, sink_tokens, windows)(call)
    assert not received, "influence is known in backward only"
    gradients = torch.autograd.grad(output, (call.query, call.key, call.value), output_gradient)
    assert list(received) == [3]
    return output, gradients, received[3]


@pytest.fixture(params=[1, 2**19], ids=["row blocks of 64", "one row block"])
def _row_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(row_blocks.ROW_BLOCK_ELEMENTS, "cpu", request.param)


CASES = [
    pytest.param(4, None, None, None, False, id="MHA"),
    pytest.param(2, None, None, None, False, id="GQA"),
    pytest.param(1, None, None, None, False, id="MQA"),
    pytest.param(2, 1.0, None, None, False, id="soft-capped"),
    pytest.param(2, None, 48, None, False, id="own window"),
    pytest.param(2, 1.0, 48, None, False, id="soft-capped, own window"),
    pytest.param(2, None, None, (30, 100), False, id="plan"),
    pytest.param(2, 1.0, 80, (30, 100), False, id="plan, soft-capped, own window"),
    pytest.param(2, None, None, None, True, id="sink logits"),
    pytest.param(2, None, 80, (30, 100), True, id="plan, sink logits, own window"),
]


@pytest.mark.usefixtures("_row_blocks")
@pytest.mark.parametrize("n_tokens", [128, 150, 40])
@pytest.mark.parametrize(("kv_heads", "softcap", "own_window", "windows", "sinks"), CASES)
def test_block_wise_path_equals_full_matrices(
    n_tokens: int, kv_heads: int, softcap: float | None, own_window: int | None, windows: tuple[int, ...] | None, sinks: bool
) -> None:
    sink_tokens = 10
    call, output_gradient = random_call(n_tokens, kv_heads, softcap=softcap, own_window=own_window, sinks=sinks)
    per_head = None if windows is None else np.array(windows)
    shown = shown_under(call, per_head, sink_tokens)
    expected, weights, value = by_autograd(call, shown)
    expected_gradients = torch.autograd.grad(expected, (call.query, call.key, call.value), output_gradient)

    output, gradients, result = captured(call, output_gradient, sink_tokens, per_head)

    # transformers takes the soft-capped softmax in float32, as the reference does.
    exact = 1e-9 if softcap is None else 2e-5
    torch.testing.assert_close(output, expected, atol=exact, rtol=exact)
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-9, rtol=1e-9)

    weights_gradient = (output_gradient @ value.transpose(-1, -2)).detach()
    full = influence(weights.detach(), weights_gradient).abs()
    tiles = -(-n_tokens // 64)
    padded = torch.nn.functional.pad(full, (0, 64 * tiles - n_tokens, 0, 64 * tiles - n_tokens))
    torch.testing.assert_close(result.blocks, padded.reshape(BATCH, HEADS, tiles, 64, tiles, 64).sum(dim=(3, 5)), atol=1e-9, rtol=1e-9)
    distance = torch.arange(n_tokens)[:, None] - torch.arange(n_tokens)[None]
    beyond = torch.arange(n_tokens) >= sink_tokens
    for b in range(tiles):
        in_bin = (distance >= 64 * b) & (distance < 64 * (b + 1)) & beyond
        torch.testing.assert_close(result.distances[..., b], (full * in_bin).sum(dim=(-1, -2)), atol=1e-9, rtol=1e-9)

    # Every window of 64 b tokens: the output recomputed with it, less the dense one, whatever the model itself runs under.
    _, dense, value = (x.detach() for x in by_autograd(call, call.positions >= 0))
    for b in range(tiles):
        kept = dense * visible(torch.arange(n_tokens)[:, None], torch.arange(n_tokens)[None], sink_tokens, 64 * b)
        # What a sink logit weighs, no window loses.
        total = kept.sum(dim=-1, keepdim=True) + (1 - dense.sum(dim=-1, keepdim=True) if sinks else 0)
        change = kept @ value / total.clamp(min=1e-300) - dense @ value
        wanted = (output_gradient * change).sum(dim=(-1, -2))
        torch.testing.assert_close(result.span_effects[..., b], wanted, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize(("kv_heads", "sinks"), [(4, False), (2, False), (2, True)])
def test_captured_influence_equals_the_naive_twin(kv_heads: int, sinks: bool) -> None:
    call, output_gradient = random_call(128, kv_heads, sinks=sinks)
    _, _, result = captured(call, output_gradient, 64, None)
    tensors = (x.detach() for x in (call.query, call.key, call.value))
    full = naive_influence(*tensors, output_gradient, call.positions >= 0, SCALE, call.sink_logits).abs()
    torch.testing.assert_close(result.blocks, full.reshape(BATCH, HEADS, 2, 64, 2, 64).sum(dim=(3, 5)), atol=1e-9, rtol=1e-9)


def test_half_precision_inputs_get_gradients_of_their_dtype_and_float32_influence() -> None:
    exact_call, exact_gradient = random_call(100, 2)
    _, exact, wanted = captured(exact_call, exact_gradient, 10, None)
    call, output_gradient = random_call(100, 2, dtype=torch.bfloat16)
    output, gradients, result = captured(call, output_gradient, 10, None)
    assert {x.dtype for x in (output, *gradients)} == {torch.bfloat16}
    assert result.blocks.dtype == torch.float32
    torch.testing.assert_close(result.blocks.double(), wanted.blocks, atol=0.5, rtol=0.05)
    torch.testing.assert_close(gradients[0].double(), exact[0], atol=0.3, rtol=0.1)


def test_a_sink_over_the_whole_sequence_leaves_nothing_to_lose() -> None:
    call, output_gradient = random_call(64, 2)
    # All but one key are sink: a window of 0 costs the last query its newest key.
    assert (captured(call, output_gradient, 63, None)[2].span_effects.abs() > 1e-9).all()
    effects = captured(call, output_gradient, 64, None)[2].span_effects
    torch.testing.assert_close(effects, torch.zeros_like(effects), atol=1e-12, rtol=0)


def test_a_call_over_a_cache_is_refused() -> None:
    call, _ = random_call(20, 2)
    continued = AttentionCall(call.query[:, :, 5:], call.key, call.value, KeyMask(1, 15, 20, call.query.device), SCALE, None)
    with pytest.raises(ValueError, match="use_cache=False"):
        capturing(0, lambda layer, reduced: None, 64)(continued)
