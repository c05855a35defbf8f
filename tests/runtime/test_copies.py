"""A copy of a cache goes on as the original would, and neither changes the other; what cannot be copied or shared is refused."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import random_tokens, tiny_model
from tiny_plans import small_plan
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from moa_lab.models import geometry_of
from moa_lab.plan import Plan, dense_plan, uniform_plan
from moa_lab.runtime import RingCache, apply_plan, ring_cache

torch.set_num_threads(1)

COPIES = {"copy.copy": copy.copy, "copy.deepcopy": copy.deepcopy, "deepcopy of a list": lambda cache: copy.deepcopy([cache])[0]}


def model_of(family: str = "llama", **settings: Any) -> PreTrainedModel:
    # Tied to its embeddings, a random model says the last token over and over.
    return tiny_model(family, tie_word_embeddings=False, **settings)


def elastic(model: PreTrainedModel) -> Plan:
    return uniform_plan(geometry_of(model), 0.5, sink_tokens=4, min_span=5)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral", "gpt_neox"])
@pytest.mark.parametrize("plan_of", [small_plan, elastic, lambda model: dense_plan(geometry_of(model))], ids=["small", "elastic", "dense"])
def test_a_copied_cache_continues_as_the_original_would(family: str, copied: Callable[[Any], Any], plan_of: Callable[[Any], Plan]) -> None:
    model = model_of(family)
    prefix, first, second = random_tokens(2, 60), random_tokens(2, 10, 1), random_tokens(2, 30, 2)
    with apply_plan(model, plan_of(model), n_tokens=200), torch.no_grad():
        cache = model(prefix).past_key_values
        twin = copied(cache)
        rings = [ring.keys.clone() for ring in cache.rings]
        found = model(first, past_key_values=twin).logits
        close(found, model(torch.cat([prefix, first], dim=1), use_cache=False).logits[:, 60:])
        # What went into the copy is not in the original, which goes on with something else, and the other way round.
        assert (cache.get_seq_length(), twin.get_seq_length()) == (60, 70)
        assert all(torch.equal(ring.keys, before) for ring, before in zip(cache.rings, rings, strict=True))
        close(model(second, past_key_values=cache).logits, model(torch.cat([prefix, second], dim=1), use_cache=False).logits[:, 60:])
        again = model(second, past_key_values=twin).logits
        close(again, model(torch.cat([prefix, first, second], dim=1), use_cache=False).logits[:, 70:])


def test_a_prefix_that_was_kept_is_reused_by_generate_for_every_question() -> None:
    model = model_of()
    prefix = random_tokens(1, 60)
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 20, "min_new_tokens": 20}
    with apply_plan(model, small_plan(model), n_tokens=120), torch.no_grad():
        kept = ring_cache(model)
        model(prefix, past_key_values=kept)
        for seed in range(3):
            prompt = torch.cat([prefix, random_tokens(1, 8, seed)], dim=1)
            settings["attention_mask"] = torch.ones_like(prompt)
            found = model.generate(prompt, past_key_values=copy.deepcopy(kept), **settings)
            assert found.tolist() == model.generate(prompt, **settings).tolist()


def test_a_copy_keeps_the_length_its_spans_were_taken_at() -> None:
    model = model_of()
    prefix, more = random_tokens(1, 60), random_tokens(1, 20, 1)
    with apply_plan(model, elastic(model), n_tokens=60), torch.no_grad():
        expected = model(torch.cat([prefix, more], dim=1), use_cache=False).logits[:, 60:]
    for made in (RingCache, DynamicCache):
        with apply_plan(model, elastic(model)), torch.no_grad():
            kept = ring_cache(model) if made is RingCache else DynamicCache()
            model(prefix, past_key_values=kept)
            twin = copy.deepcopy(kept)
            # Another prompt, of another length, in between.
            model(random_tokens(1, 150, 2), past_key_values=DynamicCache())
            for cache in (twin, kept):
                close(model(more, past_key_values=cache).logits, expected)


def test_a_cache_may_be_copied_while_it_records_what_may_be_taken_back() -> None:
    model = model_of()
    tokens = random_tokens(1, 80)
    with apply_plan(model, small_plan(model), n_tokens=100):
        cache = ring_cache(model)
        with torch.no_grad():
            model(tokens[:, :50], past_key_values=cache)
        cache.activate_past_recording()
        # Under a gradient what was recorded hangs on a graph.
        model.requires_grad_(True)
        model(tokens[:, 50:60], past_key_values=cache)
        twin = copy.deepcopy(cache)
        cache.crop(-7)
        twin.crop(0)
        with torch.no_grad():
            expected = model(tokens, use_cache=False).logits
            close(model(tokens[:, 53:], past_key_values=cache).logits, expected[:, 53:])
            close(model(tokens[:, 60:], past_key_values=twin).logits, expected[:, 60:])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_copy_after_decoding_goes_on(mode: Any) -> None:
    model = model_of()
    tokens = random_tokens(2, 60)
    with apply_plan(model, small_plan(model), n_tokens=100), mode():
        cache = ring_cache(model)
        model(tokens[:, :40], past_key_values=cache)
        with cache.decoding():
            mask = torch.ones(2, 1, 1, 1, dtype=torch.bool)
            for at in range(40, 50):
                positions = torch.full((2, 1), at)
                model(tokens[:, at : at + 1], past_key_values=cache, attention_mask=mask, position_ids=positions)
            with pytest.raises(RuntimeError, match="decode loop"):
                copy.deepcopy(cache)
        cache.came(10)
        twin = copy.deepcopy(cache)
        expected = model(tokens, use_cache=False).logits[:, 50:]
        close(model(tokens[:, 50:], past_key_values=twin).logits, expected)
        close(model(tokens[:, 50:], past_key_values=cache).logits, expected)


def test_rows_of_a_copy_are_repeated_and_dropped_without_a_change_to_the_original() -> None:
    model = model_of()
    prefix, questions = random_tokens(1, 60), random_tokens(3, 10, 1)
    with apply_plan(model, small_plan(model), n_tokens=100), torch.no_grad():
        kept = model(prefix).past_key_values
        many = copy.deepcopy(kept)
        many.batch_repeat_interleave(3)
        expected = model(torch.cat([prefix.expand(3, -1), questions], dim=1), use_cache=False).logits[:, 60:]
        close(model(questions, past_key_values=many).logits, expected)
        for rows in (torch.tensor([2]), torch.tensor([-1]), [2], torch.tensor([False, False, True])):
            one = copy.deepcopy(many)
            one.batch_select_indices(rows)
            assert one.batch_size == 1
            close(one.rings[0].keys, many.rings[0].keys[2:])
        assert kept.batch_size == 1
        close(model(questions[:1], past_key_values=kept).logits, expected[:1])


def test_an_empty_copy_and_a_reset_one_begin_anew() -> None:
    model = model_of()
    tokens = random_tokens(1, 70)
    with apply_plan(model, small_plan(model), n_tokens=100), torch.no_grad():
        empty = ring_cache(model)
        empty.batch_select_indices(torch.tensor([0, 0]))
        used = model(random_tokens(2, 40, 3)).past_key_values
        twin = copy.deepcopy(used)
        used.reset()
        assert twin.get_seq_length() == 40
        for cache in (copy.copy(empty), used):
            model(tokens[:, :60], past_key_values=cache)
            close(model(tokens[:, 60:], past_key_values=cache).logits, model(tokens, use_cache=False).logits[:, 60:])


def test_a_row_that_began_later_keeps_its_count_when_tokens_are_taken_back() -> None:
    model = model_of()
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, :12] = 0
    tokens, more = random_tokens(2, 20) * mask, random_tokens(2, 6, 1)
    with apply_plan(model, dense_plan(geometry_of(model)), n_tokens=100), torch.no_grad():
        cache = model(tokens, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).past_key_values
        emptied = copy.deepcopy(cache)
        emptied.crop(-30)
        assert (emptied.get_seq_length(), emptied.lengths.tolist()) == (0, [0, 0])
        cache.crop(-10)
        assert cache.lengths.tolist() == [10, 0]
        seen = torch.cat([mask[:, :10], torch.ones(2, 6, dtype=torch.long)], dim=1)
        found = model(more, past_key_values=cache, attention_mask=seen, position_ids=(seen.cumsum(1) - 1)[:, -6:]).logits
        close(found[1:], model(more[1:], use_cache=False).logits)
        close(found[:1], model(torch.cat([tokens[:1, :10], more[:1]], dim=1), use_cache=False).logits[:, 10:])


def test_tokens_with_padding_between_them_are_not_taken_back() -> None:
    model = model_of()
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, 15:] = 0
    with apply_plan(model, dense_plan(geometry_of(model)), n_tokens=100), torch.no_grad():
        cache = model(random_tokens(2, 20), attention_mask=mask).past_key_values
        with pytest.raises(RuntimeError, match="padding between"):
            cache.crop(-2)


# --- refused


def saved(cache: Any) -> None:
    torch.save(cache, io.BytesIO())


@pytest.mark.parametrize("write", [pickle.dumps, saved, lambda cache: pickle.dumps(cache.layers[0])], ids=["pickle", "torch.save", "layer"])
def test_a_cache_is_not_written_to_disk(write: Callable[[Any], Any]) -> None:
    model = model_of()
    with apply_plan(model, small_plan(model)), torch.no_grad():
        cache = model(random_tokens(1, 20)).past_key_values
        with pytest.raises(RuntimeError, match="cannot be pickled or saved"):
            write(cache)


REFUSED: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "iterated": (list, TypeError, "DynamicCache"),
    "made a dynamic cache of": (DynamicCache, TypeError, "DynamicCache"),
    "offloaded": (lambda cache: cache.offload(0), RuntimeError, "stays on the model's device"),
    "prefetched": (lambda cache: cache.prefetch(0), RuntimeError, "stays on the model's device"),
    "a layer's keys": (lambda cache: cache.layers[0].keys, AttributeError, "cache.rings"),
    "a layer's values": (lambda cache: cache.layers[1].values, AttributeError, "cache.rings"),
    "a layer reset": (lambda cache: cache.layers[0].reset(), RuntimeError, "change together"),
    "a layer cropped": (lambda cache: cache.layers[0].crop(-1), RuntimeError, "change together"),
    "a layer offloaded": (lambda cache: cache.layers[0].offload(), RuntimeError, "change together"),
    "a layer reordered": (lambda cache: cache.layers[0].reorder_cache(torch.tensor([0])), RuntimeError, "change together"),
}


@pytest.mark.parametrize(("use", "kind", "words"), REFUSED.values(), ids=REFUSED)
def test_what_a_cache_cannot_do_it_says(use: Callable[[Any], Any], kind: type[Exception], words: str) -> None:
    model = model_of()
    with apply_plan(model, small_plan(model)), torch.no_grad():
        cache = model(random_tokens(1, 20)).past_key_values
        with pytest.raises(kind, match=words):
            use(cache)


def test_a_copy_ends_with_its_plan() -> None:
    model = model_of()
    with apply_plan(model, small_plan(model)), torch.no_grad():
        cache = model(random_tokens(1, 20)).past_key_values
        inside = copy.deepcopy(cache)
    for twin in (inside, copy.deepcopy(cache), copy.copy(cache)):
        with torch.no_grad(), pytest.raises(RuntimeError, match="no longer applied"):
            model(random_tokens(1, 1), past_key_values=twin)


@pytest.mark.parametrize("planned", [True, False])
@pytest.mark.parametrize("n_tokens", [0, 20])
def test_a_cache_is_refused_by_another_model(planned: bool, n_tokens: int) -> None:
    model, other = model_of(), model_of(seed=1)
    with apply_plan(model, small_plan(model)), torch.no_grad():
        cache = ring_cache(model)
        if n_tokens:
            model(random_tokens(1, n_tokens), past_key_values=cache)
        if planned:
            with apply_plan(other, small_plan(other)), pytest.raises(RuntimeError, match="another model"):
                other(random_tokens(1, 1), past_key_values=cache)
        else:
            with pytest.raises(RuntimeError, match="another model"):
                other(random_tokens(1, 1), past_key_values=cache)
        # The pass that was refused left nothing behind.
        model(random_tokens(1, 1), past_key_values=cache)


def test_plans_within_plans_have_caches_of_their_own() -> None:
    model = model_of()
    tokens = random_tokens(1, 70)
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 15, "min_new_tokens": 15, "attention_mask": torch.ones_like(tokens)}
    dense = dense_plan(geometry_of(model))
    with apply_plan(model, dense, n_tokens=100), torch.no_grad():
        expected, said = model(tokens, use_cache=False).logits[:, 60:], model.generate(tokens, **settings)
    with apply_plan(model, small_plan(model), n_tokens=100), torch.no_grad():
        outer = model(tokens[:, :60]).past_key_values
        with apply_plan(model, dense, n_tokens=100):
            inner = model(tokens[:, :60]).past_key_values
            close(model(tokens[:, 60:], past_key_values=inner).logits, expected)
            assert model.generate(tokens, **settings).tolist() == said.tolist()
            with pytest.raises(RuntimeError, match="another `apply_plan`"):
                model(tokens[:, 60:], past_key_values=outer)
        with pytest.raises(RuntimeError, match="no longer applied"):
            model(tokens[:, 60:], past_key_values=inner)
        close(model(tokens[:, 60:], past_key_values=outer).logits, model(tokens, use_cache=False).logits[:, 60:])


@pytest.mark.parametrize("use", ["forward", "generate", "apply_plan"])
@pytest.mark.parametrize("inside", [True, False])
def test_a_copy_of_a_model_that_a_plan_holds_says_what_it_is(use: str, inside: bool) -> None:
    model, tokens = model_of(), random_tokens(1, 20)
    with apply_plan(model, small_plan(model)):
        twin = copy.deepcopy(model)

    def used() -> None:
        if use == "apply_plan":
            with apply_plan(twin, small_plan(model)):
                twin(tokens)
        elif use == "generate":
            twin.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=2)
        else:
            twin(tokens)

    with apply_plan(model, small_plan(model)) if inside else contextlib.nullcontext():
        with pytest.raises((RuntimeError, ValueError), match=r"this is a copy of a model.*before `apply_plan`"):
            used()
        assert model(tokens).logits.shape[1] == 20


@pytest.mark.parametrize(("kept", "asked"), [(1, 2), (2, 1)])
def test_another_number_of_rows_is_refused(kept: int, asked: int) -> None:
    model = model_of()
    with apply_plan(model, small_plan(model)), torch.no_grad():
        cache = model(random_tokens(kept, 20)).past_key_values
        with pytest.raises(ValueError, match=f"{asked} rows over a cache of {kept}"):
            model(random_tokens(asked, 3), past_key_values=cache)
        assert cache.get_seq_length() == 20


def test_a_cache_whose_pass_failed_half_way_is_not_gone_on_from() -> None:
    model = model_of()
    tokens = random_tokens(1, 30)

    def fails(*_: Any) -> None:
        raise MemoryError("half-way")

    with apply_plan(model, small_plan(model)), torch.no_grad():
        cache = model(tokens[:, :20]).past_key_values
        hook = model.model.layers[1].register_forward_pre_hook(fails)
        with pytest.raises(MemoryError):
            model(tokens[:, 20:], past_key_values=cache)
        hook.remove()
        for use in (copy.deepcopy, lambda cache: model(tokens[:, 20:], past_key_values=cache)):
            with pytest.raises(RuntimeError, match=r"half-way|middle of a pass"):
                use(cache)
        cache.reset()
        close(model(tokens, past_key_values=cache).logits, model(tokens, use_cache=False).logits)


@pytest.mark.parametrize("wrong", [((torch.zeros(1),) * 2,), "static"], ids=["tuple", "name"])
def test_what_is_no_cache_is_refused(wrong: Any) -> None:
    model = model_of()
    with apply_plan(model, small_plan(model)), pytest.raises(ValueError, match="must be a transformers Cache"):
        model(random_tokens(1, 3), past_key_values=wrong)


def test_a_cache_of_an_encoder_and_a_decoder_is_refused() -> None:
    model = model_of()
    with apply_plan(model, small_plan(model)), pytest.raises(ValueError, match="one decoder"):
        model(random_tokens(1, 3), past_key_values=EncoderDecoderCache(ring_cache(model), DynamicCache()))


@pytest.mark.parametrize("bits", [16, 8])
def test_where_a_layers_keys_and_values_are_refused_the_way_to_them_is_named(bits: int) -> None:
    model = tiny_model("llama")
    plan = small_plan(model).with_bits(bits)
    with apply_plan(model, plan, 20), torch.no_grad():
        cache = ring_cache(model)
        model(random_tokens(1, 20), past_key_values=cache)
        for part, name in enumerate(("keys", "values")):
            with pytest.raises(AttributeError, match=rf"cache\.rings\[1\]\.held\(head\)\[{part}\]"):
                getattr(cache.layers[1], name)
            assert cache.rings[1].held(0)[part].shape == (1, *plan.spans(20)[1, :1], plan.geometry.head_dim)
