"""Rows that come to a cache in turn: afterwards it is as if all had come at once, whatever it stores."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model

from moa_lab.models import geometry_of
from moa_lab.plan import Plan, uniform_plan
from moa_lab.runtime import apply_plan, ring_cache
from moa_lab.runtime.hf_cache import RingCache

LENGTHS = (40, 17, 33, 40, 5)


def tokens_of(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and mask, padded on the left."""
    tokens = torch.randint(5, 60, (rows, columns), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(columns) >= columns - torch.tensor(LENGTHS[:rows])[:, None]).long()
    return tokens, mask


def filled(model: torch.nn.Module, groups: list[slice] | None, n_tokens: int = 64) -> tuple[RingCache, torch.Tensor]:
    """A cache after the prompts, and the logits of every row's last token."""
    cache = ring_cache(model, n_tokens)
    tokens, mask = tokens_of(5, 40)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    if groups is None:
        return cache, model(tokens, attention_mask=mask, position_ids=positions, past_key_values=cache).logits[:, -1]
    last = [
        model(tokens[rows], attention_mask=mask[rows], position_ids=positions[rows], past_key_values=cache).logits[:, -1]
        for rows in cache.in_turn(groups)
    ]
    return cache, torch.cat(last)


def plan_of(model: torch.nn.Module, bits: int) -> Plan:
    plan = uniform_plan(geometry_of(model), 0.4, sink_tokens=2, min_span=6)
    return plan if bits == 16 else plan.with_bits(bits)


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("groups", [[slice(0, 2), slice(2, 4), slice(4, 5)], [slice(0, 5)], [slice(i, i + 1) for i in range(5)]])
@torch.no_grad()
def test_turns_leave_what_all_rows_at_once_leave(groups: list[slice], bits: int) -> None:
    model = tiny_model("llama")
    with apply_plan(model, plan_of(model, bits), 64):
        (one, at_once), (other, in_turn) = filled(model, None), filled(model, groups)
        torch.testing.assert_close(in_turn, at_once)
        assert torch.equal(one.lengths, other.lengths)
        assert (one.get_seq_length(), one.allocated_bytes, one.batch_size) == (other.get_seq_length(), other.allocated_bytes, 5)
        for ring, same in zip(one.rings, other.rings, strict=True):
            for head in range(len(ring.layout.windows)):
                for ours, theirs in zip(ring.held(head), same.held(head), strict=True):
                    torch.testing.assert_close(ours, theirs)
        # And they go on alike, also with other rows and padding of the prompt told once more.
        rows = torch.tensor([3, 1, 0])
        _, mask = tokens_of(5, 40)
        more = torch.tensor([[7, 8], [9, 10], [11, 12]])
        found = []
        for cache in (one, other):
            cache.batch_select_indices(rows)
            whole = torch.cat([mask[rows], torch.ones(3, 2, dtype=torch.long)], dim=1)
            positions = (whole.cumsum(1) - 1)[:, -2:]
            found.append(model(more, attention_mask=whole, position_ids=positions, past_key_values=cache).logits)
        torch.testing.assert_close(found[0], found[1])


@torch.no_grad()
def test_a_cache_that_holds_or_records_tokens_takes_no_turns() -> None:
    model = tiny_model("llama")
    with apply_plan(model, plan_of(model, 16), 64):
        cache, _ = filled(model, None)
        with pytest.raises(RuntimeError, match="to an empty cache"):
            next(cache.in_turn([slice(0, 1)]))
        cache = ring_cache(model, 64)
        cache.activate_past_recording()
        with pytest.raises(RuntimeError, match="records nothing"):
            next(cache.in_turn([slice(0, 1)]))
