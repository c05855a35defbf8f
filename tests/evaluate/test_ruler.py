"""RULER in the harness: tasks that make their texts to the lengths asked for, with the model's own tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny import PAD, SPECIAL, tiny_model, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from moa_lab.calibration.documents import embedded_documents
from moa_lab.evaluate.harness import STRING_MATCH, harness
from moa_lab.evaluate.harness_tasks import MISSING, SHORTEST_TOKENS
from moa_lab.models import geometry_of
from moa_lab.plan import full_or_floor_plan

pytest.importorskip("lm_eval", reason=MISSING)
torch.set_num_threads(1)

WITHOUT_THE_HUB = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe")
VOCABULARY = 4096


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Without a list of all packages here, and without asking the network for what only other tasks need."""
    import lm_eval.evaluator
    import nltk

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)
        patch.setattr(nltk, "download", lambda *_, **__: False)
        yield


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte pairs learned from English, as many tokens a word as a model's tokenizer takes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    learn = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([document.text[:200_000] for document in embedded_documents("calibration")[:4]], learn)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token="<eos>", bos_token="<bos>")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama", vocab_size=VOCABULARY, max_length=2048)


@pytest.mark.slow
@pytest.mark.parametrize("task", WITHOUT_THE_HUB)
def test_a_task_runs_at_the_length_asked_for(task: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    plan = full_or_floor_plan(geometry_of(model), whole=(), floor_tokens=256)
    (row,) = harness(model, tokenizer, plan, [task], lengths=[1280], limit=2)
    assert (row.task, row.metric, row.length, row.n) == (task, STRING_MATCH, 1280, 2)
    assert 0 <= row.low <= row.value <= row.high <= 1
    assert len(row.detail["per_sample"]) == 2
    prompts = row.detail["prompt_tokens"]
    # The answer has room too; texts grow in steps, and the words of `ruler_cwe` are counted with a worked example that is not asked.
    assert 1280 / 2 < prompts <= 1280 - 30
    assert row.density == pytest.approx(256 / prompts, rel=0.01)


def test_every_length_has_a_row_and_the_same_seed_the_same_texts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    prompts: list[list[list[int]]] = []

    def note(_: torch.nn.Module, arguments: tuple[Any, ...], settings: dict[str, Any]) -> None:
        tokens = arguments[0] if arguments else settings["input_ids"]
        if tokens.shape[1] > 1:
            prompts[-1].append(tokens.tolist())

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    found = []
    for seed in (0, 0, 1):
        prompts.append([])
        found.append(harness(model, tokenizer, None, ["ruler_cwe"], lengths=[1024, 1536], limit=1, seed=seed))
    hook.remove()
    assert [row.length for row in found[0]] == [1024, 1536]
    assert [len(prompt[0]) for prompt in prompts[0]] == [row.detail["prompt_tokens"] for row in found[0]]
    assert prompts[0] == prompts[1] != prompts[2]
    assert found[0].settings["lengths"] == [1024, 1536]


def test_lengths_that_cannot_be_had_are_refused_before_any_text_is_made(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    for task in ("ruler_vt", "ruler"):
        with pytest.raises(ValueError, match=f"'{task}' makes its texts to a length"):
            harness(model, tokenizer, None, [task])
    for length in (SHORTEST_TOKENS - 1, 2049):
        with pytest.raises(ValueError, match=f"length {length}: texts of task 'ruler_vt' have 1024 to 2048 tokens"):
            harness(model, tokenizer, None, ["ruler_vt"], lengths=[1024, length])
    with pytest.raises(ValueError, match="tokens a word"):
        harness(model, tiny_tokenizer(), None, ["ruler_vt"], lengths=[1024])


def test_a_task_of_the_hub_says_what_it_lacks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    def unreachable(name: str, **_: Any) -> None:
        raise ConnectionError(f"couldn't reach {name!r} on the hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ValueError, match=r"cannot load task 'niah_single_2' .*paul_graham_essays.*network"):
        harness(model, tokenizer, None, ["niah_single_2"], lengths=[1024])
