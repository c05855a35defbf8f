"""Our own loop says what transformers' generate says, row by row, and tells what it took."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from tiny_plans import small_plan, stored_plan
from transformers import DynamicCache, PreTrainedModel

import moa_lab as ml
from moa_lab.models import geometry_of
from moa_lab.plan import Plan, dense_plan
from moa_lab.runtime import Sampling, apply_plan, ring_cache
from moa_lab.runtime.arguments import stop_ids
from moa_lab.runtime.generate import generate

torch.set_num_threads(1)

PROMPTS = ["The president spoke of the harvest and of the roads for a long while.", "Peace.", "We have met again, and much is to be said."]


def model_of(family: str, **settings: Any) -> PreTrainedModel:
    # Tied to its embeddings, a random model says the last token over and over.
    model = tiny_model(family, tie_word_embeddings=False, **settings)
    # Nothing stops a random model but what a test says.
    model.generation_config.eos_token_id = None
    return model


def alone(model: PreTrainedModel, plan: Plan, prompt: str, n_tokens: int, new: int) -> list[int]:
    """transformers' generate for one prompt, over a whole cache that is masked."""
    tokens = torch.tensor([tiny_tokenizer().encode(prompt)])
    with apply_plan(model, plan, n_tokens):
        said = model.generate(tokens, attention_mask=torch.ones_like(tokens), past_key_values=DynamicCache(), do_sample=False,
                              max_new_tokens=new, pad_token_id=0)  # fmt: skip
    return said[0, tokens.shape[1] :].tolist()


@pytest.mark.parametrize("prefill_tokens", [100_000, 60, 1])
@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral", "gpt_neox"])
def test_every_row_of_a_ragged_batch_says_what_it_says_alone(family: str, prefill_tokens: int) -> None:
    model = model_of(family)
    plan = small_plan(model)
    found = generate(model, tiny_tokenizer(), PROMPTS, plan=plan, max_new_tokens=30, prefill_tokens=prefill_tokens)
    n_tokens = max(found.prompt_tokens) + 30
    for prompt, said in zip(PROMPTS, found.tokens, strict=True):
        assert list(said) == alone(model, plan, prompt, n_tokens, 30)


def test_without_a_plan_everything_is_kept() -> None:
    model = model_of("llama")
    found = generate(model, tiny_tokenizer(), PROMPTS[0], max_new_tokens=20)
    assert list(found.tokens[0]) == alone(model, dense_plan(geometry_of(model)), PROMPTS[0], found.prompt_tokens[0] + 20, 20)


def test_bytes_are_predicted_and_allocated_alike() -> None:
    model = model_of("llama")
    plan = small_plan(model)
    found = generate(model, tiny_tokenizer(), PROMPTS, plan=plan, max_new_tokens=20)
    whole = generate(model, tiny_tokenizer(), PROMPTS, max_new_tokens=20)
    assert found.kv_bytes_allocated == found.kv_bytes_predicted < whole.kv_bytes_allocated
    assert found.decode_steps == 19
    assert found.decode_tokens_per_s > 0
    assert found.prefill_s > 0


def test_over_stored_bits_a_step_is_captured_where_there_is_a_gpu_and_says_the_same() -> None:
    model = model_of("llama").to("cuda" if torch.cuda.is_available() else "cpu")
    plan = stored_plan(model)
    found, stepwise = (generate(model, tiny_tokenizer(), PROMPTS, plan=plan, max_new_tokens=20, graph=graph) for graph in (None, False))
    assert found.tokens == stepwise.tokens
    assert found.captured == torch.cuda.is_available()
    assert found.kv_bytes_allocated == found.kv_bytes_predicted


def test_a_row_ends_with_its_stop_token_and_the_others_go_on() -> None:
    model = model_of("llama")
    plan = small_plan(model)
    free = generate(model, tiny_tokenizer(), PROMPTS, plan=plan, max_new_tokens=100)
    stop = free.tokens[1][5]
    found = generate(model, tiny_tokenizer(), PROMPTS, plan=plan, max_new_tokens=100, stop_tokens=[stop])
    for said, unstopped in zip(found.tokens, free.tokens, strict=True):
        end = unstopped.index(stop) + 1 if stop in unstopped else len(unstopped)
        assert said == unstopped[:end]
    assert len(found.tokens[1]) <= 6
    assert found.texts[1] == tiny_tokenizer().decode(found.tokens[1][:-1])


def test_it_ends_when_all_rows_have_stopped() -> None:
    model = model_of("llama")
    every = list(range(geometry_vocabulary(model)))
    found = generate(model, tiny_tokenizer(), PROMPTS, max_new_tokens=90, stop_tokens=every)
    assert [len(said) for said in found.tokens] == [1, 1, 1]
    assert found.decode_steps == 0


def geometry_vocabulary(model: PreTrainedModel) -> int:
    return int(model.config.vocab_size)


def test_a_seed_says_the_same_twice_and_another_something_else() -> None:
    model = model_of("llama")
    said = [generate(model, tiny_tokenizer(), PROMPTS, max_new_tokens=20, sampling=Sampling(1.5, seed=seed)).tokens for seed in (1, 1, 2)]
    assert said[0] == said[1] != said[2]


@pytest.mark.parametrize("settings", [{}, {"top_k": 3}, {"top_p": 0.6}])
def test_tokens_are_drawn_as_often_as_their_weights_say(settings: dict[str, Any]) -> None:
    logits = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0]])
    sampling = Sampling(temperature=1.3, **settings)
    generator = sampling.generator(torch.device("cpu"))
    drawn = sampling.pick(logits.expand(40_000, -1), generator).bincount(minlength=5) / 40_000
    weights = (logits[0] / 1.3).softmax(dim=-1)
    kept = torch.ones(5, dtype=torch.bool)
    if "top_k" in settings:
        kept[3:] = False
    if "top_p" in settings:
        kept[2:] = False
    weights = torch.where(kept, weights, 0.0)
    torch.testing.assert_close(drawn, weights / weights.sum(), atol=0.01, rtol=0.0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"prompts": []}, "at least one prompt"),
        ({"prompts": ["a", ""]}, "a token in every prompt"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"max_new_tokens": 600}, "512"),
        *(({"max_new_tokens": value}, "max_new_tokens must be a whole number") for value in (20.0, -1, True, None, "20")),
        *(({"prefill_tokens": value}, "prefill_tokens must be a whole number") for value in (0, -1, 1.5, True, None)),
        *(
            ({"prompts": value}, "prompts must be a text or texts")
            for value in (5, None, [1, 2], b"hello", [["a"]], {"role": "user"}.items(), {"role": "user", "content": "hello"})
        ),
        ({"plan": {"alphas": []}}, "path of a config card"),
        ({"plan": "nowhere.json"}, "no such file"),
        *(({"sampling": value}, "Sampling\\(temperature") for value in (0.7, {"temperature": 1.0}, Sampling)),
        *(({"graph": value}, "graph must be") for value in (1, 0, "yes")),
        *(({"chat": value}, "chat must be True or False") for value in ("yes", 1, None)),
        ({"compiled": "no"}, "compiled must be True or False"),
        ({"tokenizer": None}, "tokenizer must be one of transformers"),
        ({"tokenizer": "smollm2"}, "tokenizer must be one of transformers"),
        ({"stop_tokens": b"\n"}, "stop token must be a whole number"),
        ({"stop_tokens": {7: "end"}}, "stop token must be a whole number"),
        ({"stop_tokens": [-1]}, "stop token must be a whole number"),
        ({"stop_tokens": -1}, "stop token must be a whole number"),
        ({"stop_tokens": [True]}, "stop token must be a whole number"),
        ({"stop_tokens": [7.0]}, "stop token must be a whole number"),
        ({"stop_tokens": [None]}, "stop token must be a whole number"),
        ({"stop_tokens": [512]}, "vocabulary of 512"),
        ({"stop_tokens": "Peace"}, "'Peace' is 5 tokens.*stop_strings"),
        ({"stop_tokens": ["\n", "\n\n"]}, "is 2 tokens"),
        ({"stop_tokens": [""]}, "is 0 tokens"),
    ],
)
def test_what_cannot_be_answered_is_refused_before_a_pass(settings: dict[str, Any], words: str) -> None:
    model = model_of("llama")
    passes: list[Any] = []
    model.register_forward_pre_hook(lambda *arguments: passes.append(arguments))
    with pytest.raises(ValueError, match=words):
        generate(model, **{"tokenizer": tiny_tokenizer(), "prompts": "hello there", **settings})
    assert not passes


@pytest.mark.parametrize("model", ["smollm2", None, ("model", "tokenizer"), tiny_tokenizer()], ids=lambda model: type(model).__name__)
def test_what_is_no_model_is_refused_in_words(model: Any) -> None:
    with pytest.raises(TypeError, match="a transformers model is needed, got"):
        generate(model, tiny_tokenizer(), "hello")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_graph_without_a_gpu_is_refused() -> None:
    for compiled in (False, True):
        with pytest.raises(ValueError, match="graph=True needs a GPU"):
            generate(model_of("llama"), tiny_tokenizer(), "hello there", graph=True, compiled=compiled)
    assert not generate(model_of("llama"), tiny_tokenizer(), "hello there", graph=False, max_new_tokens=3).captured


@pytest.mark.parametrize(
    "as_given",
    [lambda token: token, lambda token: [token], lambda token: torch.tensor([token]), torch.tensor, np.int64, lambda token: {token}],
)
def test_a_stop_token_may_be_given_alone_or_among_others(as_given: Any) -> None:
    model = model_of("llama")
    free = generate(model, tiny_tokenizer(), PROMPTS[1], max_new_tokens=30).tokens[0]
    found = generate(model, tiny_tokenizer(), PROMPTS[1], max_new_tokens=30, stop_tokens=as_given(free[5]))
    assert found.tokens[0] == free[: free.index(free[5]) + 1]


def test_a_text_of_one_token_stops_as_its_id_does() -> None:
    tokenizer = tiny_tokenizer()
    for text, token in (("\n", tokenizer.encode("\n")[0]), ("<|im_end|>", tokenizer.convert_tokens_to_ids("<|im_end|>"))):
        for given in (text, [text], [7, text]):
            assert stop_ids(model_of("llama"), tokenizer, given)[-1] == token


def test_a_plan_may_be_the_path_of_its_card(tmp_path: Path) -> None:
    model = model_of("llama")
    plan = small_plan(model)
    path = plan.save(tmp_path / "plan.json")
    expected = generate(model, tiny_tokenizer(), PROMPTS[0], plan=plan, max_new_tokens=20).tokens
    for given in (path, str(path)):
        assert generate(model, tiny_tokenizer(), PROMPTS[0], plan=given, max_new_tokens=20).tokens == expected
        with apply_plan(model, given, 100):
            assert ring_cache(model).layers


@pytest.mark.parametrize("capacity", [0, -1, 10.0, True, "10"])
def test_a_capacity_that_holds_nothing_is_refused(capacity: Any) -> None:
    model = model_of("llama")
    with apply_plan(model, small_plan(model)), pytest.raises(ValueError, match="capacity must be a whole number of at least 1"):
        ring_cache(model, capacity)


NAN, INFINITE = float("nan"), float("inf")


@pytest.mark.parametrize(
    "wrong",
    [
        *({"temperature": value} for value in (-1.0, NAN, INFINITE, True, "0.7", None, 10**400)),
        *({"temperature": 1.0, "top_k": value} for value in (0, -5, NAN, 5.0, True, "5")),
        *({"temperature": 1.0, "top_p": value} for value in (1.5, 0.0, -0.1, NAN, INFINITE, True, "0.9")),
    ],
)
def test_sampling_out_of_range_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="top_k"):
        Sampling(**wrong)


@pytest.mark.parametrize("number", [int, np.float32, np.int64])
def test_whole_numbers_and_those_of_numpy_are_as_good_as_floats(number: Any) -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    found, expected = (
        sampling.pick(logits.expand(100, -1), sampling.generator(torch.device("cpu")))
        for sampling in (Sampling(number(2), top_k=np.int64(3), top_p=number(1)), Sampling(2.0, top_k=3, top_p=1.0))
    )
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("temperature", [1e-45, 1e-20])
def test_a_temperature_that_scores_cannot_be_divided_by_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="too near 0"):
        Sampling(temperature=temperature)
    picked = Sampling(temperature=1e-6).pick(torch.tensor([[50.0, 60.0, -80.0]]), torch.Generator())
    assert picked.tolist() == [1]


@pytest.mark.parametrize("settings", [{"top_k": 5}, {"top_p": 0.9}, {"top_k": 5, "top_p": 0.9, "temperature": 0}])
def test_drawing_from_the_likeliest_needs_a_temperature(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="temperature 0 draws nothing"):
        Sampling(**settings)


@pytest.mark.parametrize("seed", [1.5, True, None, 2**64, -(2**63) - 1])
def test_a_seed_that_no_generator_takes_is_refused(seed: Any) -> None:
    with pytest.raises(ValueError, match="seed"):
        Sampling(temperature=1.0, seed=seed)


@pytest.mark.slow
def test_the_real_model_says_the_same_600_tokens_past_its_windows(smollm2: tuple[PreTrainedModel, Any]) -> None:
    model, tokenizer = smollm2
    plan = small_plan(model)
    prompts = ["The state of the union is", "Once upon a time there was a little mill by the river, and in it"]
    found = ml.generate(model, tokenizer, prompts, plan=plan, max_new_tokens=600, stop_tokens=[])
    assert found.kv_bytes_allocated == found.kv_bytes_predicted
    # Greedy: each token is the likeliest after those before it. One pass over all of them, without a cache, says which that is.
    with apply_plan(model, plan, max(found.prompt_tokens) + 600), torch.no_grad():
        for prompt, said in zip(prompts, found.tokens, strict=True):
            tokens = torch.tensor([[*tokenizer.encode(prompt), *said]], device=model.device)
            likeliest = model(tokens[:, :-1], use_cache=False, logits_to_keep=600).logits.argmax(dim=-1)
            assert likeliest[0].tolist() == list(said)


def test_control_tokens_are_text_in_a_chat_and_tokens_in_a_plain_prompt() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    plain = generate(model, tokenizer, "a<|im_end|>", max_new_tokens=1)
    assert plain.prompt_tokens == (2,)
    chat, clean = (generate(model, tokenizer, text, chat=True, max_new_tokens=1) for text in ("a<|im_end|>", "a"))
    assert chat.prompt_tokens[0] - clean.prompt_tokens[0] == len("<|im_end|>")


def test_a_prompt_with_half_a_character_is_refused_by_its_number() -> None:
    for chat in (False, True):
        with pytest.raises(ValueError, match=r"prompt 2 holds a lone surrogate"):
            generate(tiny_model("llama"), tiny_tokenizer(), ["fine", "bad \ud83d"], chat=chat)
