"""What a GGUF file says of its tokenizer holds after loading, wherever a prompt is made."""

from pathlib import Path
from typing import Any

import pytest
import torch
from texts import small_documents
from tiny import BOS, CHAT_TEMPLATE, EOS, SPECIAL, tiny_model, tiny_tokenizer
from tiny_gguf import byte_level_vocabulary, sentencepiece_vocabulary, write_gguf
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moa_lab.calibration.prompts import Turn, chat_frame
from moa_lab.calibration.tasks import PlainText, Questions, Source
from moa_lab.models import chat_ids, load_model, opening_ids, prompt_ids, tokenizer_fingerprint, weights_fingerprint
from moa_lab.runtime import generate

BOS_ID, EOS_ID, END_ID = SPECIAL.index(BOS), SPECIAL.index(EOS), 4
BOS_TEMPLATE = "{{ bos_token }}" + CHAT_TEMPLATE
KINDS = {
    "byte-level": byte_level_vocabulary(tiny_tokenizer(), 512),
    "sentencepiece": sentencepiece_vocabulary(512),
}
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOA_LAB_CACHE", str(tmp_path / "cache"))


def loaded(folder: Path, kind: str, **said: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model from a file that says so: the second load, which reads what the first one kept."""
    path = write_gguf(folder / "tiny.gguf", tiny_model("llama", max_length=2048), KINDS[kind], **said)
    load_model(path, device="cpu")
    return load_model(path, device="cpu")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("bos", [False, True])
def test_texts_begin_and_end_as_the_file_says(tmp_path: Path, kind: str, bos: bool, eos: bool) -> None:
    _, tokenizer = loaded(tmp_path, kind, add_bos_token=bos, add_eos_token=eos)
    ids = tokenizer("hello the paris").input_ids
    assert (ids[0] == BOS_ID, ids[-1] == EOS_ID) == (bos, eos)
    assert ids.count(BOS_ID) == bos
    assert tokenizer.add_bos_token == bos
    assert tokenizer.add_eos_token == eos
    assert opening_ids(tokenizer) == [BOS_ID] * bos


@pytest.mark.parametrize(
    ("kind", "pre", "bos"),
    [("sentencepiece", None, True), ("byte-level", None, False), ("byte-level", "qwen2", False), ("byte-level", "llama-bpe", True)],
)
def test_a_silent_file_gets_the_defaults_of_its_kind(tmp_path: Path, kind: str, pre: str | None, bos: bool) -> None:
    _, tokenizer = loaded(tmp_path, kind, pre=pre)
    assert opening_ids(tokenizer) == [BOS_ID] * bos


@pytest.mark.parametrize("space", [False, True])
def test_the_space_before_a_text_is_there_as_the_file_says(tmp_path: Path, space: bool) -> None:
    _, tokenizer = loaded(tmp_path, "sentencepiece", add_space_prefix=space, add_bos_token=False)
    ids = tokenizer("hello the").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["\u2581hello" if space else "hello", "\u2581the"]
    assert tokenizer.decode(ids) == "hello the"


def test_special_tokens_and_the_chat_template_are_those_of_the_file(tmp_path: Path) -> None:
    model, tokenizer = loaded(tmp_path, "sentencepiece", chat_template=BOS_TEMPLATE, bos_token_id=3, eos_token_id=1, unknown_token_id=5)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id) == (3, 1, 5, 0)
    assert tokenizer.chat_template == BOS_TEMPLATE
    assert model.config.bos_token_id == 3


def test_a_turn_ends_the_models_answer_where_the_file_names_such_a_token(tmp_path: Path) -> None:
    model, _ = loaded(tmp_path, "byte-level", eot_token_id=END_ID)
    assert model.generation_config.eos_token_id == [EOS_ID, END_ID]


def test_a_file_that_names_no_end_gives_the_model_none(tmp_path: Path) -> None:
    model, tokenizer = loaded(tmp_path, "byte-level", eos_token_id=None)
    assert (model.generation_config.eos_token_id, tokenizer.eos_token_id) == (None, None)
    model, _ = loaded(tmp_path, "byte-level", eos_token_id=None, eot_token_id=END_ID)
    assert model.generation_config.eos_token_id == [END_ID]
    model, _ = loaded(tmp_path, "byte-level", eos_token_id=3)
    assert model.generation_config.eos_token_id == 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["bos", "eos", "padding", "unknown", "eot", "eom"])
def test_a_special_token_beyond_the_vocabulary_is_refused_by_its_key(tmp_path: Path, kind: str, name: str) -> None:
    with pytest.raises(ValueError, match=f"tokenizer.ggml.{name}_token_id is 9999, and the file has 512 tokens"):
        loaded(tmp_path, kind, **{f"{name}_token_id": 9999})


def test_words_that_are_tokens_need_no_merges_where_the_kind_says_so(tmp_path: Path) -> None:
    vocabulary = byte_level_vocabulary(tiny_tokenizer(), 512)
    vocabulary["tokens"][300] = "whole"
    model = tiny_model("llama")
    path = write_gguf(tmp_path / "tiny.gguf", model, vocabulary, pre="llama-bpe", add_bos_token=False)
    for _ in range(2):
        _, tokenizer = load_model(path, device="cpu")
        assert tokenizer("whole").input_ids == [300]


def test_a_bos_that_the_file_wants_but_does_not_name_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, tokenizer = loaded(tmp_path, "byte-level", add_bos_token=True, bos_token_id=None)
    assert opening_ids(tokenizer) == []
    assert "names no such token" in caplog.text


@pytest.mark.parametrize(("pre", "told"), [("falcon", True), ("qwen2", False), ("smollm", False), (None, False)])
def test_an_unknown_way_to_cut_words_is_told(tmp_path: Path, pre: str | None, told: bool, caplog: pytest.LogCaptureFixture) -> None:
    loaded(tmp_path, "byte-level", pre=pre)
    assert ("takes GPT-2's way" in caplog.text) == told


# --- everywhere a prompt is made


TEMPLATES = {"none": None, "without BOS": CHAT_TEMPLATE, "with BOS": BOS_TEMPLATE}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_every_prompt_of_a_model_that_wants_a_bos_begins_with_one(tmp_path: Path, kind: str, template: str) -> None:
    told = {} if TEMPLATES[template] is None else {"chat_template": TEMPLATES[template]}
    model, tokenizer = loaded(tmp_path, kind, add_bos_token=True, **told)
    source = Source(tokenizer, small_documents(), "test", 0)
    prompts = {
        "chat": chat_ids(tokenizer, HELLO),
        "frame": chat_frame(tokenizer, "", [Turn("hello")]).opening,
        "needles": Questions().draft(source, 1500).tokens.tolist(),
        "document": PlainText().draft(source, 300).tokens.tolist(),
    }
    for name, ids in prompts.items():
        assert ids[0] == BOS_ID, name
        assert ids.count(BOS_ID) == 1, name
    alone = generate(model, tokenizer, "hello", max_new_tokens=1)
    assert alone.prompt_tokens == (len(tokenizer("hello").input_ids),)


@pytest.mark.parametrize("kind", KINDS)
def test_a_chat_of_a_model_that_wants_no_bos_has_what_its_template_writes(tmp_path: Path, kind: str) -> None:
    _, tokenizer = loaded(tmp_path, kind, add_bos_token=False, chat_template=CHAT_TEMPLATE)
    assert chat_ids(tokenizer, HELLO) == tokenizer.apply_chat_template(HELLO, add_generation_prompt=True, return_dict=False)
    assert BOS_ID not in chat_frame(tokenizer, "", [Turn("hello")]).opening


def test_a_folders_tokenizer_that_adds_a_bos_by_itself_does_so_in_frames_too() -> None:
    tokenizer = tiny_tokenizer()
    without = chat_frame(tokenizer, "", [Turn("hello")]).opening
    tokenizer.add_bos_token = True
    assert chat_frame(tokenizer, "", [Turn("hello")]).opening == [BOS_ID, *without]
    assert chat_ids(tokenizer, HELLO)[0] == BOS_ID


def test_a_chat_that_was_rendered_before_has_one_bos_as_a_prompt(tmp_path: Path) -> None:
    model, tokenizer = loaded(tmp_path, "byte-level", add_bos_token=True, chat_template=BOS_TEMPLATE)
    rendered = tokenizer.apply_chat_template(HELLO, tokenize=False, add_generation_prompt=True)
    assert prompt_ids(tokenizer, rendered) == chat_ids(tokenizer, HELLO)
    assert generate(model, tokenizer, rendered, max_new_tokens=1).prompt_tokens == (len(chat_ids(tokenizer, HELLO)),)
    assert prompt_ids(tokenizer, "hello") == tokenizer.encode("hello")


@pytest.mark.slow
def test_smollm2_stays_token_for_token_what_it_was(smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    model, tokenizer = smollm2
    # Those of the records in data/.
    assert (weights_fingerprint(model), tokenizer_fingerprint(tokenizer)) == ("ccbfea6e37de9a1c", "5ebbb586142c0214")
    assert opening_ids(tokenizer) == []
    assert model.dtype == torch.float32
