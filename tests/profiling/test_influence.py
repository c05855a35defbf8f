"""The formulas of influence, held against losses that are really measured as one attention value is turned down."""

from __future__ import annotations

import pytest
import torch

from moa_lab.profiling.influence import LayerInfluence, influence, logit_slopes, naive_influence, reduce_rows, span_effect

torch.set_num_threads(1)

N, SINK = 12, 3


def random_head(n_tokens: int = N, heads: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal scores and values in float64: (heads, n, n), (heads, n, 5)."""
    generator = torch.Generator().manual_seed(seed)
    scores = 1.5 * torch.randn(heads, n_tokens, n_tokens, generator=generator, dtype=torch.float64)
    causal = torch.ones(n_tokens, n_tokens).bool().tril()
    return scores.masked_fill(~causal, float("-inf")), torch.randn(heads, n_tokens, 5, generator=generator, dtype=torch.float64)


def loss_of(output: torch.Tensor) -> torch.Tensor:
    """A loss that is not linear in the attention output."""
    direction = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape)
    return torch.log1p((output * direction).sum().square()) + output.pow(3).mean()


def weights_and_gradient(scores: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    weights = scores.softmax(dim=-1).requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss_of(weights @ values), weights)
    return weights.detach(), gradient


def test_influence_is_the_slope_of_the_loss_as_a_value_is_masked_per_weight_it_leaves() -> None:
    scores, values = random_head()
    weights, gradient = weights_and_gradient(scores, values)
    found = influence(weights, gradient)
    # Multiplying weight (i, j) by 1 - t and renormalising its row changes the loss by t * E * (1 - A) to first order.
    step = 1e-4
    for head in range(2):
        for i in range(N):
            for j in range(i + 1):
                measured = []
                for t in (step, -step):
                    turned = scores.clone()
                    turned[head, i, j] += torch.log1p(torch.tensor(-t, dtype=torch.float64))
                    measured.append(loss_of(turned.softmax(dim=-1) @ values))
                slope = (measured[0] - measured[1]) / (2 * step)
                torch.testing.assert_close(slope, found[head, i, j] * (1 - weights[head, i, j]), atol=1e-8, rtol=1e-6)


def test_with_a_sink_logit_a_masked_value_leaves_its_weight_to_the_keys_and_to_the_sink() -> None:
    scores, values = random_head(seed=3)
    sink = torch.tensor([0.7, 3.0], dtype=torch.float64)[:, None, None].expand(2, N, 1)
    direction = torch.randn(2, N, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def output_of(scores: torch.Tensor) -> torch.Tensor:
        return torch.cat([scores, sink], dim=-1).softmax(dim=-1)[..., :N] @ values

    weights = torch.cat([scores, sink], dim=-1).softmax(dim=-1)[..., :N]
    found = influence(weights, direction @ values.transpose(-1, -2))
    before = (output_of(scores) * direction).sum()
    # Also (0, 0): a row's only key, whose whole weight goes to the sink.
    for i in range(N):
        for j in range(i + 1):
            masked = scores.clone()
            masked[:, i, j] = float("-inf")
            change = (output_of(masked) * direction).sum() - before
            torch.testing.assert_close(change, found[:, i, j].sum(), atol=1e-10, rtol=1e-8)


def test_influence_is_the_effect_of_masking_on_a_loss_that_is_linear_in_the_output() -> None:
    scores, values = random_head(seed=1)
    direction = torch.randn(2, N, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    weights = scores.softmax(dim=-1)
    found = influence(weights, direction @ values.transpose(-1, -2))
    before = (weights @ values * direction).sum()
    for i in range(1, N):
        for j in range(i + 1):
            masked = scores.clone()
            masked[1, i, j] = float("-inf")
            change = (masked.softmax(dim=-1) @ values * direction).sum() - before
            torch.testing.assert_close(change, found[1, i, j], atol=1e-10, rtol=1e-8)


def test_influence_is_zero_where_nothing_is_masked_or_nothing_remains() -> None:
    scores, values = random_head()
    weights, gradient = weights_and_gradient(scores, values)
    found = influence(weights, gradient)
    assert (found[:, 0] == 0).all(), "the first query has one key only"
    assert (found.masked_select(torch.ones(N, N).bool().triu(1)) == 0).all()
    assert found.isfinite().all()


def test_the_paper_writes_the_same_influence_as_two_terms() -> None:
    weights, gradient = weights_and_gradient(*random_head(seed=3))
    weights, gradient = weights[:, 1:], gradient[:, 1:]
    pairs = weights * gradient
    others = pairs.sum(dim=-1, keepdim=True) - pairs
    torch.testing.assert_close(influence(weights, gradient), -pairs + weights / (1 - weights) * others)


def test_naive_influence_reads_the_kv_head_of_the_group() -> None:
    generator = torch.Generator().manual_seed(4)
    query, output_gradient = (torch.randn(1, 4, 9, 6, dtype=torch.float64, generator=generator) for _ in range(2))
    key, value = (torch.randn(1, 2, 9, 6, dtype=torch.float64, generator=generator) for _ in range(2))
    shown = torch.ones(9, 9).bool().tril()
    found = naive_influence(query, key, value, output_gradient, shown, 0.5)
    for head in range(4):
        weights = (query[0, head] @ key[0, head // 2].T * 0.5).masked_fill(~shown, float("-inf")).softmax(dim=-1)
        torch.testing.assert_close(found[0, head], influence(weights, output_gradient[0, head] @ value[0, head // 2].T))


@pytest.mark.parametrize("sink_tokens", [0, 10, 64, 70])
def test_rows_reduce_to_blocks_and_to_distances_beyond_the_sink(sink_tokens: int) -> None:
    n = 256
    rows = torch.rand(1, 2, n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).tril()
    result = LayerInfluence(torch.zeros(1, 2, 4, 4).double(), torch.zeros(1, 2, 4).double(), torch.zeros(1, 2, 4).double())
    for start, stop in [(0, 128), (128, 192), (192, 256)]:
        reduce_rows(result, rows[:, :, start:stop, :stop].clone(), start, sink_tokens)
    torch.testing.assert_close(result.blocks, rows.reshape(1, 2, 4, 64, 4, 64).sum(dim=(3, 5)))
    distance = torch.arange(n)[:, None] - torch.arange(n)[None]
    for b in range(4):
        counted = (distance >= 64 * b) & (distance < 64 * (b + 1)) & (torch.arange(n) >= sink_tokens)
        torch.testing.assert_close(result.distances[..., b], (rows * counted).sum(dim=(-1, -2)))


@pytest.mark.parametrize("sink_tokens", [0, 5, 64, 400])
def test_span_effect_equals_the_output_recomputed_with_every_window(sink_tokens: int) -> None:
    n = 200
    scores, values = random_head(n, seed=6)
    direction = torch.randn(2, n, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    weights = scores.softmax(dim=-1)
    gradient = direction @ values.transpose(-1, -2)
    dense = weights @ values
    found = torch.zeros(2, 4, dtype=torch.float64)
    for start, stop in [(0, 64), (64, 200)]:
        part = slice(start, stop)
        own = weights[:, part, :stop].clone()
        found += span_effect(own, *logit_slopes(own, gradient[:, part, :stop]), start, sink_tokens, 4)
    i, j = torch.arange(n)[:, None], torch.arange(n)[None]
    for b in range(4):
        seen = (j <= i) & ((j < sink_tokens) | (i - j < 64 * b))
        kept = weights * seen
        total = kept.sum(dim=-1, keepdim=True)
        change = kept @ values / total.clamp(min=1e-300) - dense
        torch.testing.assert_close(found[:, b], (change * direction).sum(dim=(-1, -2)), atol=1e-9, rtol=1e-9)
    assert sink_tokens == 400 or (found[:, 1:3].abs() > 1e-3).all()


@pytest.mark.parametrize("logit", [5.0, 15.0, 30.0])
def test_a_head_with_nearly_all_its_weight_on_one_far_key_loses_its_whole_effect(logit: float) -> None:
    n, needle = 256, 100
    scores = torch.zeros(1, n, n).masked_fill(torch.ones(n, n).triu(1).bool(), float("-inf"))
    scores[:, -1, needle] = logit
    weights = scores.softmax(dim=-1)
    gradient = torch.zeros(1, n, n)
    # Only the needle's value helps the last row: losing it raises the loss by the weight it had.
    gradient[:, -1, needle] = -1.0
    far = float(weights[0, -1, needle])
    slopes = logit_slopes(weights[:, 192:], gradient[:, 192:])
    assert float(span_effect(weights[:, 192:], *slopes, 192, 64, 4)[0, 1]) == pytest.approx(far, rel=1e-5)
