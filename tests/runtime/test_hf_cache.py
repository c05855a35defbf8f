"""transformers over the ring: the same tokens as over a cache that keeps everything and masks, in a fraction of the memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny import FAMILIES, random_tokens, tiny_model
from tiny_plans import mixed_plan, small_plan, stored_plan
from transformers import DynamicCache, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from moa_lab.models import geometry_of
from moa_lab.plan import Plan, dense_plan, uniform_plan
from moa_lab.runtime import RingCache, apply_plan, ring_cache

torch.set_num_threads(1)

FOUR_FAMILIES = ["llama", "gemma2", "mistral", "gpt_neox"]


def ragged(lengths: list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of `lengths` tokens, padded on the left, and their mask."""
    longest = max(lengths)
    mask = (torch.arange(longest)[None] >= longest - torch.tensor(lengths)[:, None]).long()
    return random_tokens(len(lengths), longest, seed) * mask, mask


def model_of(family: str) -> PreTrainedModel:
    # Tied to its embeddings, a random model says the last token over and over.
    return tiny_model(family, tie_word_embeddings=False)


def generated(model: PreTrainedModel, plan: Plan, tokens: torch.Tensor, *, ring: bool, new: int = 20, **settings: Any) -> list[Any]:
    """What `generate` says under the plan, over the ring that it makes itself or over a whole cache."""
    if not ring:
        settings["past_key_values"] = DynamicCache(config=model.config)
    settings = {"attention_mask": torch.ones_like(tokens), "do_sample": False, "min_new_tokens": new, "max_new_tokens": new, **settings}
    torch.manual_seed(0)
    with apply_plan(model, plan, n_tokens=tokens.shape[1] + new):
        found = model.generate(tokens, return_dict_in_generate=True, **settings)
        assert isinstance(found.past_key_values, RingCache if ring else DynamicCache)
    return found.sequences.tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("plan", [small_plan, mixed_plan, stored_plan])
def test_a_ragged_batch_generates_the_same_tokens_as_over_a_whole_cache(family: str, plan: Any) -> None:
    model = model_of(family)
    tokens, mask = ragged([60, 41, 7])
    found = generated(model, plan(model), tokens, ring=True, new=40, attention_mask=mask)
    assert found == generated(model, plan(model), tokens, ring=False, new=40, attention_mask=mask)


@pytest.mark.parametrize("family", FOUR_FAMILIES)
@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True, "temperature": 2.0},
        {"num_beams": 3},
        {"num_return_sequences": 2, "do_sample": True},
        {"prompt_lookup_num_tokens": 4},
    ],
    ids=["sampling", "beams", "several answers", "prompt lookup"],
)
@pytest.mark.parametrize("plan", [mixed_plan, stored_plan])
def test_every_way_to_generate_says_the_same(family: str, settings: dict[str, Any], plan: Any) -> None:
    model = model_of(family)
    rows = 1 if "prompt_lookup_num_tokens" in settings else 2
    tokens = random_tokens(rows, 12).repeat(1, 4)
    found = generated(model, plan(model), tokens, ring=True, **settings)
    assert found == generated(model, plan(model), tokens, ring=False, **settings)


def test_a_copy_of_a_cache_with_bits_goes_on_and_neither_changes_the_other() -> None:
    model = model_of("llama")
    prefix, turns = random_tokens(2, 40), [random_tokens(2, 5, seed) for seed in (1, 2)]
    with apply_plan(model, stored_plan(model), n_tokens=80), torch.no_grad():
        cache = ring_cache(model)
        model(prefix, past_key_values=cache)
        twin = copy.deepcopy(cache)
        found = [model(turn, past_key_values=one).logits for turn, one in zip(turns, (cache, twin), strict=True)]
        for turn, logits in zip(turns, found, strict=True):
            alone = ring_cache(model)
            model(prefix, past_key_values=alone)
            assert torch.equal(model(turn, past_key_values=alone).logits, logits)


def test_bits_of_a_plan_change_what_is_stored_and_the_bytes_by_as_much() -> None:
    model = model_of("llama")
    tokens = random_tokens(2, 60)
    logits, held = {}, {}
    for bits in (16, 8, 4):
        plan = mixed_plan(model).with_bits(bits)
        with apply_plan(model, plan, n_tokens=60), torch.no_grad():
            whole = model(tokens).logits
            cache = ring_cache(model)
            parts = [model(part, past_key_values=cache).logits for part in tokens.split([37, 1, 1, 21], dim=1)]
        # Chunks of any size see the same as one pass.
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=1e-5)
        assert cache.allocated_bytes == 2 * plan.kv_bytes(60, 4)
        logits[bits], held[bits] = whole, cache.allocated_bytes
    off = {bits: float((logits[bits] - logits[16]).abs().max()) for bits in (8, 4)}
    assert off[4] > 4 * off[8] > 0
    assert held[4] < held[8] < held[16] / 2


def test_an_assistant_with_its_own_plan_changes_no_token() -> None:
    model, assistant = model_of("llama"), tiny_model("llama", tie_word_embeddings=False, layers=1, seed=1)
    tokens = random_tokens(1, 50)
    plan = mixed_plan(model)
    alone = generated(model, plan, tokens, ring=True)
    assert generated(model, plan, tokens, ring=True, assistant_model=assistant) == alone
    with apply_plan(assistant, small_plan(assistant)):
        assert generated(model, plan, tokens, ring=True, assistant_model=assistant) == alone


def test_a_streamer_hears_every_token() -> None:
    class Kept(BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.tokens.append(-1)

    model, heard = model_of("llama"), Kept()
    found = generated(model, mixed_plan(model), random_tokens(1, 40), ring=True, streamer=heard)
    assert heard.tokens == [*found[0], -1]


@torch.no_grad()
def turns(model: PreTrainedModel, cache: Any, steps: list[tuple[torch.Tensor, torch.Tensor]], *, masked: bool = True) -> list[torch.Tensor]:
    """Logits of chunk after chunk: (tokens, mask) each, positions counted over what is real."""
    seen, found = torch.zeros(len(steps[0][0]), 0, dtype=torch.long), []
    for tokens, mask in steps:
        seen = torch.cat([seen, mask], dim=1)
        positions = (seen.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        settings = {"attention_mask": seen} if masked else {}
        logits = model(input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=True, **settings).logits
        found.append(logits * mask[..., None])
    return found


@pytest.mark.parametrize("family", FOUR_FAMILIES)
@pytest.mark.parametrize("lengths", [[(50, 50), (1, 1), (1, 1), (30, 30), (1, 1)], [(50, 21), (1, 1), (9, 30), (1, 1), (64, 2)]])
def test_turns_of_unequal_lengths_give_every_row_what_it_gets_alone(family: str, lengths: list[tuple[int, int]]) -> None:
    model = model_of(family)
    plan = mixed_plan(model)
    steps = [ragged(list(pair), seed) for seed, pair in enumerate(lengths)]
    with apply_plan(model, plan, n_tokens=130):
        together = turns(model, ring_cache(model), steps)
        for row in range(2):
            alone = [(tokens[row : row + 1, -pair[row] :], mask[row : row + 1, -pair[row] :])
                     for (tokens, mask), pair in zip(steps, lengths, strict=True)]  # fmt: skip
            for found, expected in zip(together, turns(model, DynamicCache(), alone, masked=False), strict=True):
                torch.testing.assert_close(found[row : row + 1, -expected.shape[1] :], expected, atol=2e-4, rtol=1e-4)


def test_padding_on_the_right_and_between_tokens_is_never_kept() -> None:
    model = model_of("llama")
    tokens = random_tokens(2, 60)
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[0, 40:] = 0
    mask[1, 10:20] = 0
    steps = [(tokens, mask), ragged([5, 5], 7), (tokens[:, :30], mask[:, -30:]), ragged([1, 1], 8)]
    plan = mixed_plan(model)
    with apply_plan(model, plan, n_tokens=130):
        together = turns(model, ring_cache(model), steps)
        for row in range(2):
            alone = [(tokens[row : row + 1, mask[row].bool()], mask[row : row + 1, mask[row].bool()]) for tokens, mask in steps]
            kept = [step for step in alone if step[0].shape[1]]
            expected = iter(turns(model, DynamicCache(), kept, masked=False))
            for (_, real), found in zip(steps, together, strict=True):
                if real[row].any():
                    torch.testing.assert_close(found[row : row + 1, real[row].bool()], next(expected), atol=2e-4, rtol=1e-4)


def test_the_cache_holds_the_bytes_that_the_plan_predicts_and_no_more() -> None:
    model = model_of("llama")
    plan = mixed_plan(model)
    with apply_plan(model, plan, n_tokens=100):
        cache = ring_cache(model)
        turns(model, cache, [ragged([60, 60])])
    assert cache.allocated_bytes == 2 * plan.kv_bytes(100, dtype_bytes=4)
    assert cache.allocated_bytes < 2 * dense_plan(plan.geometry).kv_bytes(100, dtype_bytes=4)


def test_a_cache_that_nobody_sized_grows_and_says_the_same() -> None:
    model = model_of("llama")
    plan = uniform_plan(geometry_of(model), 0.5, sink_tokens=4, min_span=5)
    tokens = random_tokens(1, 300)
    steps = [(tokens[:, :10], torch.ones(1, 10, dtype=torch.long))]
    steps += [(tokens[:, at : at + 29], torch.ones(1, 29, dtype=torch.long)) for at in range(10, 300, 29)]
    for chosen in (plan, mixed_plan(model)):
        with apply_plan(model, chosen):
            found = turns(model, ring_cache(model), steps, masked=False)
            expected = turns(model, DynamicCache(), steps, masked=False)
        torch.testing.assert_close(torch.cat(found, dim=1), torch.cat(expected, dim=1), atol=2e-4, rtol=1e-4)


def test_a_forward_pass_makes_its_own_cache_and_goes_on_with_it() -> None:
    model = model_of("llama")
    tokens = random_tokens(1, 60)
    with apply_plan(model, small_plan(model)), torch.no_grad():
        first = model(tokens[:, :50])
        second = model(tokens[:, 50:], past_key_values=first.past_key_values)
        expected = model(tokens, use_cache=False)
    assert isinstance(first.past_key_values, RingCache)
    assert first.past_key_values.get_seq_length() == 60
    torch.testing.assert_close(second.logits, expected.logits[:, 50:], atol=2e-4, rtol=1e-4)


def test_a_gradient_goes_through_the_pass_and_not_through_the_cache() -> None:
    model = model_of("llama").requires_grad_(True)
    tokens = random_tokens(1, 40)
    with apply_plan(model, small_plan(model)):
        found = model(tokens)
        found.logits.sum().backward()
        kept = [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad()
        model(tokens, use_cache=False).logits.sum().backward()
    for with_cache, parameter in zip(kept, model.parameters(), strict=True):
        torch.testing.assert_close(with_cache, parameter.grad)
    assert not any(ring.keys.requires_grad for ring in found.past_key_values.rings)


# --- taking tokens back


@pytest.mark.parametrize("removed", [0, 1, 7])
def test_recorded_tokens_can_be_taken_back(removed: int) -> None:
    model = model_of("llama")
    tokens = random_tokens(1, 80)
    with apply_plan(model, mixed_plan(model), n_tokens=100), torch.no_grad():
        cache = ring_cache(model)
        model(tokens[:, :50], past_key_values=cache)
        cache.activate_past_recording()
        model(tokens[:, 50:55], past_key_values=cache)
        model(tokens[:, 55:60], past_key_values=cache)
        # Prompt lookup of some versions counts in tensors.
        cache.crop(torch.tensor(-removed))
        assert isinstance(cache.get_seq_length(), int)
        assert cache.get_seq_length() == 60 - removed
        found = model(tokens[:, 60 - removed : 80], past_key_values=cache).logits
        expected = model(tokens, use_cache=False).logits[:, 60 - removed :]
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


def test_what_overwrote_older_tokens_cannot_be_taken_back() -> None:
    model = model_of("llama")
    with apply_plan(model, small_plan(model)), torch.no_grad():
        cache = ring_cache(model)
        model(random_tokens(1, 8), past_key_values=cache)
        cache.crop(-3)
        assert cache.get_seq_length() == 5
        model(random_tokens(1, 40), past_key_values=cache)
        with pytest.raises(RuntimeError, match="activate_past_recording"):
            cache.crop(-1)


# --- refused


def test_a_cache_is_refused_outside_its_plan() -> None:
    model = model_of("llama")
    with pytest.raises(ValueError, match="apply_plan"):
        ring_cache(model)
    with apply_plan(model, small_plan(model)), torch.no_grad():
        cache = model(random_tokens(1, 20)).past_key_values
    with pytest.raises(RuntimeError, match="no longer applied"):
        model(random_tokens(1, 1), past_key_values=cache)
    with apply_plan(model, small_plan(model)), pytest.raises(RuntimeError, match="no longer applied"):
        model(random_tokens(1, 1), past_key_values=cache)


def test_a_mask_of_ones_own_is_taken_for_one_pass_and_refused_beyond() -> None:
    model = model_of("llama")
    tokens, mask = random_tokens(1, 20), torch.ones(1, 1, 20, 20, dtype=torch.bool).tril()
    with apply_plan(model, small_plan(model)), torch.no_grad():
        once = model(tokens, attention_mask=mask)
        torch.testing.assert_close(once.logits, model(tokens, use_cache=False).logits)
        with pytest.raises(ValueError, match="DynamicCache"):
            model(tokens[:, :1], past_key_values=once.past_key_values)
        begun = model(tokens).past_key_values
        with pytest.raises(ValueError, match="DynamicCache"):
            model(tokens[:, :1], attention_mask=torch.ones(1, 1, 1, 21, dtype=torch.bool), past_key_values=begun)


def test_a_pass_that_failed_leaves_no_trace_in_the_next() -> None:
    model = model_of("llama")
    tokens = random_tokens(1, 20)
    with apply_plan(model, small_plan(model)), torch.no_grad():
        before = model(tokens, use_cache=False).logits
        begun = model(tokens).past_key_values
        with pytest.raises(ValueError, match="DynamicCache"):
            model(tokens[:, :1], attention_mask=torch.ones(1, 1, 1, 21, dtype=torch.bool), past_key_values=begun)
        torch.testing.assert_close(model(tokens, use_cache=False).logits, before)


def test_generate_is_the_models_own_again_afterwards() -> None:
    model = model_of("llama")
    before = dict(vars(model))
    with apply_plan(model, small_plan(model)):
        model.generate(random_tokens(1, 20), max_new_tokens=2, attention_mask=torch.ones(1, 20, dtype=torch.long))
    assert vars(model).keys() == before.keys()
    assert not model._forward_pre_hooks
    found = model.generate(random_tokens(1, 20), max_new_tokens=2, return_dict_in_generate=True)
    assert type(found.past_key_values) is DynamicCache
