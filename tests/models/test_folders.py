"""A GGUF file as a folder that other programs read."""

from pathlib import Path

import pytest
import torch
from tiny import CHAT_TEMPLATE, tiny_model
from tiny_gguf import sentencepiece_vocabulary, write_gguf

from moa_lab.models import clear_kept, kept_models, load_model, model_folder, weights_fingerprint

MESSAGES = [{"role": "user", "content": "How far back?"}]


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOA_LAB_CACHE", str(tmp_path / "cache"))
    said = {"add_bos_token": True, "add_space_prefix": False, "eot_token_id": 4, "chat_template": CHAT_TEMPLATE}
    return write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), sentencepiece_vocabulary(512), **said)


def test_weights_and_tokenizer_of_the_folder_are_those_of_the_file(path: Path) -> None:
    model, tokenizer = load_model(str(path), dtype=torch.float32)
    same, same_tokenizer = load_model(model_folder(str(path)), dtype=torch.float32)
    assert weights_fingerprint(same) == weights_fingerprint(model)
    text = "One two, and <|im_end|> three."
    assert same_tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert same_tokenizer.apply_chat_template(MESSAGES, tokenize=False) == tokenizer.apply_chat_template(MESSAGES, tokenize=False)


def test_the_folder_is_written_once_and_cleared_with_the_others(path: Path) -> None:
    folder = Path(model_folder(str(path)))
    written = (folder / "config.json").stat().st_mtime_ns
    assert model_folder(str(path)) == str(folder)
    assert (folder / "config.json").stat().st_mtime_ns == written
    assert "tiny.gguf, as a folder (torch.float32)" in [name for name, _ in kept_models()]
    clear_kept()
    assert not folder.exists()


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    assert model_folder(str(tmp_path)) == str(tmp_path)
