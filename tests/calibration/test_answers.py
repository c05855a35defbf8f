"""The model and the answers: what it finds likely, and what it would say itself."""

import numpy as np
import pytest
import torch
from tiny import VOCABULARY, tiny_model
from transformers import PreTrainedModel

from moa_lab.calibration.answers import answer_greedily, answer_logits, fill_greedily, score_answers
from moa_lab.calibration.samples import Sample

torch.set_num_threads(1)


def random_sample(answers: tuple[tuple[int, int], ...] = ((40, 44), (55, 60)), n_tokens: int = 60, seed: int = 0) -> Sample:
    return Sample("random", np.random.default_rng(seed).integers(5, VOCABULARY, n_tokens), answers, {"seed": seed})


def greedy(model: PreTrainedModel, prompt: np.ndarray, new: int, never: tuple[int, ...] = ()) -> list[int]:
    """What transformers' own generate says."""
    tokens = torch.from_numpy(prompt)[None]
    out = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=new, eos_token_id=None,
        suppress_tokens=list(never) or None,
    )  # fmt: skip
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt_neox"])
def test_answer_logits_are_those_of_the_whole_pass(family: str) -> None:
    model = tiny_model(family)
    batch = [random_sample(), random_sample(((3, 9),), seed=1)]
    with torch.no_grad():
        found = answer_logits(model, batch)
        whole = model(input_ids=torch.from_numpy(np.stack([sample.tokens for sample in batch]))).logits
    for index, sample in enumerate(batch):
        assert found[index].shape == (len(sample.answer_positions), VOCABULARY)
        torch.testing.assert_close(found[index], whole[index, sample.answer_positions - 1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_filled_answers_are_what_generate_says(family: str) -> None:
    model = tiny_model(family, tie_word_embeddings=False)
    sample = random_sample(((40, 60),))
    (filled,) = fill_greedily(model, [sample])
    assert filled.tokens[40:].tolist() == greedy(model, sample.tokens[:40], 20)
    assert filled.tokens[:40].tolist() == sample.tokens[:40].tolist()
    assert (filled.task, filled.answers, filled.detail) == (sample.task, sample.answers, sample.detail)


def test_a_second_answer_follows_the_first_filled_one() -> None:
    model = tiny_model("llama")
    sample = random_sample()
    (filled,) = fill_greedily(model, [sample])
    assert filled.tokens[40:44].tolist() == greedy(model, sample.tokens[:40], 4)
    assert filled.tokens[44:55].tolist() == sample.tokens[44:55].tolist()
    assert filled.tokens[55:60].tolist() == greedy(model, filled.tokens[:55], 5)


def test_a_batch_is_filled_as_its_samples_are() -> None:
    model = tiny_model("llama")
    batch = [random_sample(seed=seed) for seed in range(3)]
    alone = [fill_greedily(model, [sample])[0].identity for sample in batch]
    assert [sample.identity for sample in fill_greedily(model, batch)] == alone
    assert len(set(alone)) == 3


def test_forbidden_tokens_are_never_said() -> None:
    model = tiny_model("llama")
    sample = random_sample(((40, 60),))
    said = fill_greedily(model, [sample])[0].tokens[40:]
    never = (int(said[0]), int(said[1]))
    filled = fill_greedily(model, [sample], never)[0].tokens[40:]
    assert not set(never) & set(filled.tolist())
    assert filled.tolist() == greedy(model, sample.tokens[:40], 20, never)


def test_samples_of_other_shapes_are_not_filled_together() -> None:
    with pytest.raises(ValueError, match="same length and the same answer positions"):
        fill_greedily(tiny_model("llama"), [random_sample(), random_sample(((40, 45), (55, 60)))])


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_neox"])
def test_an_answer_is_exact_only_when_greedy_generation_gives_it(family: str) -> None:
    model = tiny_model(family, tie_word_embeddings=False)
    (own,) = fill_greedily(model, [random_sample()])
    assert [score.exact for score in score_answers(model, [own])[0]] == [True, True]
    for position in (40, 43, 57):
        tokens = own.tokens.copy()
        tokens[position] = (tokens[position] + 1) % VOCABULARY
        changed = Sample("changed", tokens, own.answers)
        expected = [greedy(model, tokens[:start], stop - start) == tokens[start:stop].tolist() for start, stop in own.answers]
        assert [score.exact for score in score_answers(model, [changed])[0]] == expected
        assert expected[0] == (position == 57)
        assert not expected[1] or position < 55


def test_losses_are_mean_cross_entropies_of_each_answer() -> None:
    model = tiny_model("llama")
    sample = random_sample()
    with torch.no_grad():
        logprobs = model(input_ids=torch.from_numpy(sample.tokens)[None]).logits[0].log_softmax(dim=-1)
    scores = score_answers(model, [sample])[0]
    for (start, stop), score in zip(sample.answers, scores, strict=True):
        expected = -np.mean([float(logprobs[i - 1, sample.tokens[i]]) for i in range(start, stop)])
        assert score.loss == pytest.approx(expected, rel=1e-5)
        assert score.tokens == stop - start


def test_scores_of_a_batch_are_those_of_its_samples() -> None:
    model = tiny_model("llama")
    batch = [random_sample(), random_sample(((10, 30),), seed=1)]
    for sample, together in zip(batch, score_answers(model, batch), strict=True):
        alone = score_answers(model, [sample])[0]
        assert [(score.exact, score.tokens) for score in together] == [(score.exact, score.tokens) for score in alone]
        assert [score.loss for score in together] == pytest.approx([score.loss for score in alone], rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_neox"])
def test_answers_are_scored_as_they_are_written(family: str) -> None:
    model = tiny_model(family, tie_word_embeddings=False)
    batch = [random_sample(seed=seed) for seed in range(2)]
    first = int(fill_greedily(model, batch)[0].tokens[40])
    for never in ((), (first,)):
        pairs = answer_greedily(model, batch, never)
        for (_, scores), expected in zip(pairs, score_answers(model, [sample for sample, _ in pairs]), strict=True):
            assert [(score.exact, score.tokens) for score in scores] == [(score.exact, score.tokens) for score in expected]
            assert [score.loss for score in scores] == pytest.approx([score.loss for score in expected], abs=1e-4)
        assert pairs[0][1][0].exact == (not never)
