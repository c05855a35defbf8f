"""GGUF files by name: any spelling of the suffix, and files of hub repositories."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi, constants
from tiny import tiny_model, tiny_tokenizer
from tiny_gguf import byte_level_vocabulary, write_gguf

from moa_lab.models import is_gguf, load_model, model_name, weights_fingerprint


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOA_LAB_CACHE", str(tmp_path / "cache"))


def gguf_file(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    model = tiny_model("llama")
    return write_gguf(path, model, byte_level_vocabulary(tiny_tokenizer(), model.config.vocab_size))


@pytest.mark.parametrize("name", ["tiny.gguf", "TINY.GGUF", "Tiny.Gguf"])
def test_the_suffix_may_be_spelled_in_any_case(tmp_path: Path, name: str) -> None:
    path = gguf_file(tmp_path / name)
    model, _ = load_model(path, device="cpu")
    assert model_name(model) == str(path)
    assert is_gguf(str(path))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub's cache that holds one repository with two GGUF files, and no network."""
    folder = tmp_path / "hub" / "models--owner--repo-GGUF"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("1" * 40)
    gguf_file(folder / "snapshots" / ("1" * 40) / "tiny.Q8_0.GGUF")
    gguf_file(folder / "snapshots" / ("1" * 40) / "small" / "tiny.gguf")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return folder


@pytest.mark.parametrize("file", ["tiny.Q8_0.GGUF", "small/tiny.gguf"])
def test_a_file_of_a_hub_repository_loads_by_repository_and_file(hub: Path, file: str) -> None:
    name = f"owner/repo-GGUF:{file}"
    model, tokenizer = load_model(name, device="cpu")
    assert model_name(model) == name
    assert is_gguf(name)
    here, _ = load_model(hub / "snapshots" / ("1" * 40) / file, device="cpu")
    assert weights_fingerprint(model) == weights_fingerprint(here)
    assert tokenizer.encode("abc") == tiny_tokenizer().encode("abc")


@pytest.mark.parametrize("name", ["owner/repo-GGUF:other.gguf", "owner/other:tiny.gguf"])
def test_a_file_that_the_hub_does_not_give_is_one_line_with_a_cure(hub: Path, name: str) -> None:
    with pytest.raises(ValueError, match="neither the hub nor its cache gives") as caught:
        load_model(name, device="cpu")
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_a_local_file_goes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = gguf_file(Path("owner/repo:tiny.gguf"))
    model, _ = load_model(str(path), device="cpu")
    assert model.dtype == torch.float32


def test_a_repository_of_gguf_files_alone_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    siblings = [SimpleNamespace(rfilename=name) for name in ("README.md", "a.Q4.gguf", "b.Q8.gguf")]
    monkeypatch.setattr(HfApi, "model_info", lambda self, name, timeout: SimpleNamespace(siblings=siblings))
    with pytest.raises(ValueError, match=r"name one of them: owner/files:a\.Q4\.gguf or owner/files:b\.Q8\.gguf"):
        load_model("owner/files", device="cpu")


def test_a_folder_with_nothing_but_gguf_files_names_them(tmp_path: Path) -> None:
    path = gguf_file(tmp_path / "folder" / "tiny.gguf")
    with pytest.raises(ValueError, match="the folder holds no config") as caught:
        load_model(str(path.parent), device="cpu")
    assert str(path) in str(caught.value)
