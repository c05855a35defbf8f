from pathlib import Path

import numpy as np
import pytest
from figure_records import SMOL, make_plan
from hypothesis import given, settings
from hypothesis import strategies as st

from moa_lab import figures
from moa_lab.figures.plan import MAX_BLOCKS, visible_share
from moa_lab.geometry import ModelGeometry
from moa_lab.masks import visible
from moa_lab.plan import dense_plan, uniform_plan


def test_span_map_shows_every_span_with_its_rule() -> None:
    plan = make_plan()
    heat = figures.span_map(plan, 2048).data[0]
    assert np.array_equal(heat.z, plan.spans(2048).T)
    layer, head, span, share, alpha, beta = heat.customdata[2, 7]
    rule = plan.rules[7][2]
    assert (layer, head, span, alpha, beta) == (7, 2, plan.spans(2048)[7, 2], rule.alpha, rule.beta)
    assert share == pytest.approx(100 * span / 2048)


def test_a_figure_takes_the_path_of_a_card_for_its_plan(tmp_path: Path) -> None:
    plan, other = make_plan(), uniform_plan(SMOL, 0.25)
    path, beside = plan.save(tmp_path / "plan.json"), str(other.save(tmp_path / "other.json"))
    assert figures.span_map(path, 2048, compared_with=beside) == figures.span_map(plan, 2048, compared_with=other)
    assert figures.mask_preview(path, 0, 0, 512) == figures.mask_preview(plan, 0, 0, 512)
    assert figures.rule_curves(path, 512) == figures.rule_curves(plan, 512)
    assert figures.kv_bytes_bars([path, beside], 512) == figures.kv_bytes_bars([plan, other], 512)


def test_differences_are_coloured_symmetrically_around_zero() -> None:
    plan, other = make_plan(), uniform_plan(SMOL, 0.25)
    heat = figures.span_map(plan, 2048, compared_with=other).data[0]
    assert np.array_equal(heat.z, (plan.spans(2048) - other.spans(2048)).T)
    assert heat.zmin == -heat.zmax == -np.abs(heat.z).max()


def test_comparing_plans_of_two_geometries_is_refused() -> None:
    with pytest.raises(ValueError, match="geometry"):
        figures.span_map(make_plan(), 2048, compared_with=dense_plan(ModelGeometry(2, 2, 2, 8, 512)))


@settings(max_examples=60, deadline=None)
@given(
    n_tokens=st.integers(1, 400),
    sink=st.integers(0, 70),
    window=st.integers(1, 450),
    own=st.none() | st.integers(1, 450),
)
def test_visible_share_equals_the_mask_aggregated_to_blocks(n_tokens: int, sink: int, window: int, own: int | None) -> None:
    edges, share = visible_share(n_tokens, sink, window, own)
    query, key = np.arange(n_tokens)[:, None], np.arange(n_tokens)[None, :]
    seen = visible(query, key, sink, window) & (query - key < (own or n_tokens))
    causal = key <= query
    for row in range(len(edges) - 1):
        for column in range(len(edges) - 1):
            block = np.s_[edges[row] : edges[row + 1], edges[column] : edges[column + 1]]
            pairs = causal[block].sum()
            expected = seen[block].sum() / pairs if pairs else np.nan
            assert share[row, column] == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("n_tokens", [1, 127, 128, 129, 4096, 1_000_000])
def test_mask_preview_never_holds_more_than_128_blocks_a_side(n_tokens: int) -> None:
    z = figures.mask_preview(make_plan(), 0, 0, n_tokens).data[0].z
    assert z.shape[0] == z.shape[1] <= MAX_BLOCKS


def test_mask_preview_refuses_a_head_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="kv_head must be below 30 and 3"):
        figures.mask_preview(make_plan(), 0, 3, 512)


def test_rules_are_drawn_as_spans_over_lengths_wider_for_more_heads() -> None:
    plan = make_plan()
    fig = figures.rule_curves(plan, 4096)
    rules = {rule for row in plan.rules for rule in row}
    assert len(fig.data) == len(rules)
    for trace in fig.data:
        assert trace.x[-1] == 4096
        assert trace.y[-1] in {rule.span_tokens(4096, plan.min_span) for rule in rules}
        assert all(span <= n for span, n in zip(trace.y, trace.x, strict=True))
    assert max(trace.line.width for trace in fig.data) == 6
    with pytest.raises(ValueError, match="longest"):
        figures.rule_curves(plan, 0)
