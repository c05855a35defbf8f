"""Tiny GGUF files with whatever tokenizer settings a test wants."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import torch
from tiny import BOS, EOS, PAD, SPECIAL
from transformers import PreTrainedModel, PreTrainedTokenizerBase

_WORDS = ("th", "the", "an", "and", "in", "ing", "er", "hello", "paris")


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a q or k projection in GGUF's order: rotary pairs side by side, where transformers keeps them half a head apart."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def byte_level_vocabulary(tokenizer: PreTrainedTokenizerBase, size: int) -> dict[str, Any]:
    """Fields of GGUF's "gpt2" kind: the tokenizer's vocabulary, filled up to `size`."""
    tokens = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    # A file without merges is taken for another kind of tokenizer, and a list of one for no list.
    tokens += ["qx", "qz", *(f"<unused{index}>" for index in range(size - len(tokens) - 2))]
    return {"model": "gpt2", "tokens": tokens, "merges": ["q x", "q z"], "types": [gguf.TokenType.NORMAL] * size}


def sentencepiece_vocabulary(size: int) -> dict[str, Any]:
    """Fields of GGUF's "llama" kind: control tokens, bytes, letters, and a few words with and without a space before them."""
    control = [*SPECIAL, "<unk>"]
    letters = [*"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:!?\u2581"]
    pieces = [*letters]
    for word in _WORDS:
        # Every beginning of a word is a piece, so that merges lead there.
        pieces += [start + word[:end] for start in ("", "\u2581") for end in range(1, len(word) + 1)]
    tokens = list(dict.fromkeys([*control, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]))
    types = [gguf.TokenType.CONTROL] * len(control) + [gguf.TokenType.BYTE] * 256
    types += [gguf.TokenType.NORMAL] * (len(tokens) - len(types))
    fill = size - len(tokens)
    scores = [0.0] * (len(control) + 256) + [float(-index) for index in range(len(tokens) - len(control) - 256)]
    return {
        "model": "llama",
        "tokens": tokens + [f"<unused{index}>" for index in range(fill)],
        "scores": scores + [-1000.0] * fill,
        "types": types + [gguf.TokenType.UNUSED] * fill,
    }


def write_gguf(path: Path, model: PreTrainedModel, vocabulary: dict[str, Any], *, omit: str | None = None, **said: Any) -> Path:
    """Write a tiny Llama as GGUF: projections as Q8_0 blocks, the rest in float32.

    said: more of its metadata under `tokenizer.ggml.`: booleans, integers and strings; `chat_template`; `split_count`. omit: a tensor.
    """
    config, state = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    _write_tokenizer(writer, vocabulary, said)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, value in state.items():
        module, _, kind = name.rpartition(".")
        last = module.rpartition(".")[2]
        values = (interleaved(value, heads[last]) if last in heads else value).float().numpy()
        target = f"{names.get_name(module)}.{kind}"
        if target == omit:
            continue
        if last.endswith("_proj"):
            blocks = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(target, blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(target, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_tokenizer(writer: gguf.GGUFWriter, vocabulary: dict[str, Any], said: dict[str, Any]) -> None:
    writer.add_tokenizer_model(vocabulary["model"])
    writer.add_token_list(vocabulary["tokens"])
    writer.add_token_types(vocabulary["types"])
    if "merges" in vocabulary:
        writer.add_token_merges(vocabulary["merges"])
    if "scores" in vocabulary:
        writer.add_token_scores(vocabulary["scores"])
    ids = {"bos_token_id": SPECIAL.index(BOS), "eos_token_id": SPECIAL.index(EOS), "padding_token_id": SPECIAL.index(PAD)}
    for key, value in {**ids, **said}.items():
        if key == "chat_template":
            writer.add_chat_template(value)
        elif key == "split_count":
            writer.add_uint16("split.count", value)
        elif isinstance(value, bool):
            writer.add_bool(f"tokenizer.ggml.{key}", value)
        elif value is not None:
            add = writer.add_string if isinstance(value, str) else writer.add_uint32
            add(f"tokenizer.ggml.{key}", value)
