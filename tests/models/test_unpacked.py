"""An unpacked GGUF file is kept, read back as it was, made again where it is damaged, and shown and cleared by the doctor."""

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from command_line import exit_code
from tiny import CHAT_TEMPLATE, tiny_model
from tiny_gguf import sentencepiece_vocabulary, write_gguf
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moa_lab.models import kept_models, load_model, tokenizer_fingerprint, unpacked, unpacked_folder, weights_fingerprint

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOA_LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(unpacked.SWITCH, raising=False)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tiny_file(tmp_path / "tiny.gguf")


def tiny_file(path: Path, seed: int = 0, tie: bool = False) -> Path:
    model = tiny_model("llama", seed=seed, tie_word_embeddings=tie)
    said = {"add_bos_token": True, "add_space_prefix": False, "eot_token_id": 4, "chat_template": CHAT_TEMPLATE}
    return write_gguf(path, model, sentencepiece_vocabulary(512), **said)


def no_unpacking(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Loaded:
        raise AssertionError("unpacked again")

    monkeypatch.setattr(unpacked, "unpack", refuse)


def entries() -> list[Path]:
    return sorted(unpacked_folder().iterdir()) if unpacked_folder().is_dir() else []


def assert_the_same(first: Loaded, second: Loaded) -> None:
    """Bit for bit, name for name."""
    (model, tokenizer), (kept_model, kept_tokenizer) = first, second
    ours, theirs = model.state_dict(), kept_model.state_dict()
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype
        assert torch.equal(value, theirs[name]), name
    for (name, buffer), (other_name, other) in zip(model.named_buffers(), kept_model.named_buffers(), strict=True):
        assert name == other_name
        assert torch.equal(buffer, other), name
    assert model.config.to_dict() == kept_model.config.to_dict()
    assert model.config.name_or_path == kept_model.config.name_or_path
    assert model.config.dtype == kept_model.config.dtype
    assert model.generation_config.to_dict() == kept_model.generation_config.to_dict()
    assert model.name_or_path == kept_model.name_or_path
    assert model.config._attn_implementation == kept_model.config._attn_implementation
    assert weights_fingerprint(model) == weights_fingerprint(kept_model)
    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(kept_tokenizer)
    assert type(tokenizer) is type(kept_tokenizer)
    assert tokenizer.backend_tokenizer.to_str() == kept_tokenizer.backend_tokenizer.to_str()
    apart = ("_tokenizer", "init_kwargs")
    assert {k: v for k, v in vars(tokenizer).items() if k not in apart} == {k: v for k, v in vars(kept_tokenizer).items() if k not in apart}


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_kept_model_is_the_one_that_a_fresh_load_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, tie: bool) -> None:
    path = tiny_file(tmp_path / "tiny.gguf", tie=tie)
    fresh = load_model(path, device="cpu", dtype=dtype)
    monkeypatch.setenv(unpacked.SWITCH, "0")
    alone = load_model(path, device="cpu", dtype=dtype)
    monkeypatch.delenv(unpacked.SWITCH)
    no_unpacking(monkeypatch)
    second = load_model(path, device="cpu", dtype=dtype)
    assert_the_same(fresh, second)
    assert_the_same(fresh, alone)
    ids = fresh[1]("hello the paris", return_tensors="pt").input_ids
    assert torch.equal(fresh[0](ids).logits, second[0](ids).logits)


def test_dtypes_and_files_have_entries_of_their_own_and_copies_share_one(
    tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_model(path, device="cpu")
    load_model(path, device="cpu", dtype="bfloat16")
    other, _ = load_model(tiny_file(tmp_path / "other.gguf", seed=1), device="cpu")
    assert len(entries()) == 3
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(path.read_bytes())
    # The same name with other contents: as the file is now.
    path.write_bytes((tmp_path / "other.gguf").read_bytes())
    no_unpacking(monkeypatch)
    load_model(copy, device="cpu")
    assert weights_fingerprint(load_model(path, device="cpu")[0]) == weights_fingerprint(other)


def test_other_versions_of_what_unpacks_do_not_share_an_entry(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_model(path, device="cpu")
    monkeypatch.setattr(unpacked, "version", lambda package: "0.0")
    load_model(path, device="cpu")
    assert len(entries()) == 2


def damage_record(entry: Path) -> None:
    (entry / "unpacked.json").write_text("{")


def truncate_weights(entry: Path) -> None:
    weights = entry / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def zero_weights(entry: Path) -> None:
    weights = entry / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:8192] + bytes(len(content) - 8192))


def change_tokenizer(entry: Path) -> None:
    file = entry / "tokenizer.json"
    file.write_text(file.read_text().replace("paris", "sirap"))


def remove_config(entry: Path) -> None:
    (entry / "config.json").unlink()


@pytest.mark.parametrize("harm", [damage_record, truncate_weights, zero_weights, change_tokenizer, remove_config])
def test_a_damaged_entry_is_told_and_made_again(path: Path, harm: object, caplog: pytest.LogCaptureFixture) -> None:
    fresh = load_model(path, device="cpu")
    # A model may still read its weights from the entry's file.
    weights = weights_fingerprint(fresh[0])
    (entry,) = entries()
    harm(entry)  # type: ignore[operator]
    again = load_model(path, device="cpu")
    assert "damaged" in caplog.text
    assert weights_fingerprint(again[0]) == weights
    caplog.clear()
    assert_the_same(again, load_model(path, device="cpu"))
    assert not caplog.text


def test_a_full_disk_is_a_warning_and_the_model_is_there(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(unpacked.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1 << 20))
    model, _ = load_model(path, device="cpu")
    assert model.dtype == torch.float32
    assert "cannot be kept" in caplog.text
    assert "MOA_LAB_CACHE" in caplog.text
    assert entries() == []


def test_a_disk_that_fills_while_writing_leaves_nothing_half(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(unpacked, "describe", full)
    load_model(path, device="cpu")
    assert "No space left" in caplog.text
    assert entries() == []


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path: Path, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cache").write_text("a file")
    load_model(path, device="cpu")
    assert "cannot be kept" in caplog.text


def test_the_switch_keeps_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(unpacked.SWITCH, "0")
    load_model(path, device="cpu")
    assert entries() == []


def test_what_a_killed_process_left_is_no_entry_and_goes_after_a_day(path: Path) -> None:
    left = unpacked_folder() / ".0123.abcd"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    load_model(path, device="cpu")
    assert left.is_dir()
    assert ("unfinished", 4) in kept_models()
    os.utime(left, (time.time() - 2 * 24 * 3600,) * 2)
    load_model(path, device="cpu", dtype="bfloat16")
    assert not left.exists()


def test_an_entry_that_another_process_made_meanwhile_stays(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = unpacked.unpack

    def slower(*arguments: object) -> Loaded:
        loaded = original(*arguments)  # type: ignore[arg-type]
        monkeypatch.setattr(unpacked, "unpack", original)
        load_model(path, device="cpu")
        return loaded

    monkeypatch.setattr(unpacked, "unpack", slower)
    load_model(path, device="cpu")
    (entry,) = entries()
    assert json.loads((entry / "unpacked.json").read_text())["source"] == "tiny.gguf"


@pytest.mark.slow
def test_two_processes_at_once_end_with_one_whole_entry(path: Path) -> None:
    code = f"from moa_lab.models import *; print(weights_fingerprint(load_model({str(path)!r}, device='cpu')[0]))"
    running = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = {process.communicate(timeout=300)[0] for process in running}
    assert len(said) == 1
    assert len(entries()) == 1
    assert [process.returncode for process in running] == [0, 0]


def test_the_size_is_told_when_a_model_is_kept(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="moa_lab.models")
    load_model(path, device="cpu")
    assert "keeping tiny.gguf unpacked" in caplog.text
    assert "GB" in caplog.text


def test_the_doctor_shows_what_is_kept_and_clears_it(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load_model(path, device="cpu")
    (named,) = kept_models()
    assert named[0] == "tiny.gguf (float32)"
    assert named[1] == sum(file.stat().st_size for file in entries()[0].iterdir())
    exit_code(monkeypatch, "doctor")
    shown = capsys.readouterr().out
    assert "unpacked models" in shown
    assert "tiny.gguf (float32)" in shown
    exit_code(monkeypatch, "doctor", "--clear-cache")
    assert "removed" in capsys.readouterr().out
    assert entries() == []


@pytest.mark.parametrize(("said", "message"), [({"split_count": 3}, "one of 3 parts"), ({"omit": "blk.1.attn_q.weight"}, "lacks 1 of")])
def test_a_file_that_is_not_a_whole_model_is_refused_and_not_kept(tmp_path: Path, said: dict[str, object], message: str) -> None:
    vocabulary = sentencepiece_vocabulary(512)
    path = write_gguf(tmp_path / "part.gguf", tiny_model("llama"), vocabulary, **said)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        load_model(path, device="cpu")
    assert entries() == []


def test_a_truncated_file_is_refused_and_not_kept(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(ValueError, match="cannot be loaded") as caught:
        load_model(path, device="cpu")
    assert "\n" not in str(caught.value)
    assert entries() == []
