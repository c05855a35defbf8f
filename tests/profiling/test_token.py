"""Influence on one token, held against the change that is measured when a head's output really moves towards a cut."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from tiny import FAMILIES, random_tokens, tiny_model
from tiny_plans import mixed_plan, small_plan, stored_plan
from transformers import DynamicCache, PreTrainedModel

from moa_lab.interface import AttentionCall, Handler, route_attention
from moa_lab.kernels.reference import dense_attention, windowed_attention
from moa_lab.models import geometry_of
from moa_lab.plan import Plan, dense_plan
from moa_lab.profiling.token import SOURCES, prefix_of, token_influence
from moa_lab.runtime import apply_plan

torch.set_num_threads(1)
N, ROWS = 70, 12


def tokens_of(n: int = N, seed: int = 0) -> np.ndarray:
    return random_tokens(1, n, seed)[0].numpy()


def log_odds(model: PreTrainedModel, tokens: np.ndarray, first: int, turned: Callable[[int, AttentionCall], torch.Tensor]) -> float:
    """Of the last token, with `turned` as the attention of the rows from `first` on."""
    cache = DynamicCache(list(prefix_of(model, tokens[:first], N).pairs))
    ids = torch.from_numpy(tokens[first:-1])[None]

    def handler(layer: int) -> Handler:
        return lambda call: turned(layer, call)

    with torch.no_grad(), route_attention(model, handler):
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0, -1]
    rest = np.delete(np.arange(len(logits)), tokens[-1])
    return float(logits[tokens[-1]] - logits[rest].logsumexp(dim=0))


def towards_a_cut(at: tuple[int, int], plan: Plan, step: float) -> Callable[[int, AttentionCall], torch.Tensor]:
    """Attention in which one KV head's output goes `step` of the way to what it is under the plan."""

    def turned(layer: int, call: AttentionCall) -> torch.Tensor:
        whole = dense_attention(call.query, call.key, call.value, call.mask, call.scale, call.softcap, call.sink_logits)
        if layer != at[0]:
            return whole
        cut = windowed_attention(
            call.query, call.key, call.value, call.query_positions, call.positions, plan.sink_tokens, plan.windows(N)[layer],
            call.scale, call.softcap, sink_logits=call.sink_logits,
        )  # fmt: skip
        group = call.query.shape[1] // call.key.shape[1]
        heads = slice(at[1] * group, (at[1] + 1) * group)
        whole[:, heads] += step * (cut - whole)[:, heads]
        return whole

    return turned


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_cut_costs_is_the_slope_as_the_head_is_really_cut(family: str) -> None:
    model = tiny_model(family, dtype=torch.float64)
    plan, tokens, first = small_plan(model), tokens_of(), N - ROWS
    found = token_influence(model, tokens, prefix_of(model, tokens[:first], N), [plan.windows(N)], plan.sink_tokens)
    geometry = geometry_of(model)
    assert found.cuts.shape == (1, geometry.layers, geometry.kv_heads)
    # Models normalise in single precision, which a smaller step would show.
    step = 2e-3
    for layer in range(geometry.layers):
        for head in range(geometry.kv_heads):
            up, down = (log_odds(model, tokens, first, towards_a_cut((layer, head), plan, s)) for s in (step, -step))
            assert found.cuts[0, layer, head] == pytest.approx((down - up) / (2 * step), rel=2e-3, abs=1e-4)


@pytest.mark.parametrize("family", ["llama", "mqa", "gemma3", "gpt_oss"])
def test_the_rows_that_count_do_not_depend_on_how_the_prefix_was_run(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = tiny_model(family), tokens_of()
    whole = token_influence(model, tokens, prefix_of(model, tokens[: N - ROWS], N), [small_plan(model).windows(N)], 4)
    monkeypatch.setattr("moa_lab.profiling.token.PREFIX_TOKENS", 16)
    monkeypatch.setattr("moa_lab.profiling.token_rows.ROW_ELEMENTS", {"cpu": 1})
    parts = token_influence(model, tokens, prefix_of(model, tokens[: N - ROWS], N), [small_plan(model).windows(N)], 4)
    np.testing.assert_allclose(parts.cuts, whole.cuts, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(parts.by_key, whole.by_key, rtol=1e-3, atol=1e-5)


def test_without_a_prefix_all_rows_count_and_a_short_text_has_few_sources() -> None:
    model, tokens = tiny_model("llama"), tokens_of(6)
    found = token_influence(model, tokens, prefix_of(model, tokens[:0], 6))
    assert found.rows == (0, 5)
    assert found.sources.shape[-1] == SOURCES
    assert (found.sources[..., 5:] == -1).all()
    assert found.by_key.shape == (5,)
    with pytest.raises(ValueError, match="after the prefix"):
        token_influence(model, tokens, prefix_of(model, tokens[:5], 6))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("make", [small_plan, mixed_plan, stored_plan])
def test_under_a_plan_no_source_lies_beyond_what_the_head_sees(family: str, make: Callable[[PreTrainedModel], Plan]) -> None:
    model, tokens = tiny_model(family), tokens_of()
    plan = make(model)
    found = token_influence(model, tokens, prefix_of(model, tokens[: N - ROWS], N, plan))
    windows = plan.windows(N)
    for (layer, head, rank), source in np.ndenumerate(found.sources):
        if source >= 0:
            reader = found.readers[layer, head, rank]
            assert found.rows[0] <= reader < found.rows[1]
            assert source < plan.sink_tokens or reader - source < windows[layer, head]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("make", [lambda model: dense_plan(geometry_of(model)), small_plan, stored_plan])
def test_the_token_is_as_likely_as_the_model_says_under_the_plan(family: str, make: Callable[[PreTrainedModel], Plan]) -> None:
    model, tokens = tiny_model(family), tokens_of()
    plan = make(model)
    found = token_influence(model, tokens, prefix_of(model, tokens[: N - ROWS], N, plan))
    with torch.no_grad(), apply_plan(model, plan, N):
        logits = model(input_ids=torch.from_numpy(tokens[:-1])[None]).logits[0, -1]
    assert found.probability == pytest.approx(float(logits.softmax(dim=-1)[tokens[-1]]), rel=1e-3)


def test_a_plan_that_keeps_everything_costs_nothing() -> None:
    model, tokens = tiny_model("gemma2"), tokens_of()
    windows = dense_plan(geometry_of(model)).windows(N)
    found = token_influence(model, tokens, prefix_of(model, tokens[: N - ROWS], N), [windows])
    assert (found.cuts == 0).all()
