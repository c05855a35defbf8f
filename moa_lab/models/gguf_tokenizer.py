"""Tokenizer settings of a GGUF file, and how they are applied to transformers' tokenizer.

transformers takes vocabulary, merges, special tokens and chat template from the file. What it ignores is set here: whether a text
begins with BOS and ends with EOS, the space before it, words that are tokens whatever the merges say, and further end tokens.
Missing keys have llama.cpp's defaults (src/llama-vocab.cpp), whose format it is.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gguf
from tokenizers import decoders, normalizers, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moa_lab.models.gguf_reading import value_of

logger = logging.getLogger(__name__)

SPECIAL_KEYS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
SENTENCEPIECE, BYTE_LEVEL, UNIGRAM = "llama", "gpt2", "t5"
_LLAMA3 = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano")
PRE_WITH_BOS = frozenset({*_LLAMA3, "tekken", "chameleon"})
PRE_WITHOUT_MERGES = frozenset({*_LLAMA3, "tekken", "youtu", "minicpm5", "granite-embed-multi-97m"})

# Pre-tokenizers, which split a text into words before merging: those that transformers (5.19) knows, and those that are GPT-2's (some
# split single digits first), which it uses for all others.
_LIKE_QWEN = ("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "qwen35")
_LIKE_GPT4O = ("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2")
_LIKE_GPT2 = ("gpt-2", "phi-2", "gigachat", "a.x-4.0", "mellum", "exaone4", "mpt", "olmo", "jais", "default")
_DIGITS_FIRST = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
PRE_KNOWN = frozenset({*_LLAMA3, "dbrx", "smaug-bpe", "tekken", *_LIKE_QWEN, *_LIKE_GPT4O, *_LIKE_GPT2, *_DIGITS_FIRST})


@dataclass(frozen=True)
class TokenizerFacts:
    """Tokenizer settings of a GGUF file. kind: its `tokenizer.ggml.model`.

    pre: its pre-tokenizer. words_first: a word that is a token needs no merges. end_ids: tokens beside EOS that end a turn or a message.
    special_ids: of bos, eos, unk and pad, those that the file names.
    """

    kind: str
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    words_first: bool
    pre: str | None
    end_ids: tuple[int, ...]
    special_ids: Mapping[str, int]


def tokenizer_facts(reader: gguf.GGUFReader) -> TokenizerFacts:
    """Read the settings, with llama.cpp's defaults for missing keys. Raises ValueError for a special token beyond the vocabulary."""

    def said(key: str, default: Any = None) -> Any:
        return value_of(reader, f"tokenizer.ggml.{key}", default)

    kind, pre = said("model"), said("pre")
    byte_level = kind == BYTE_LEVEL
    ends = (said("eot_token_id"), said("eom_token_id"))
    named = {name: said(f"{key}_token_id") for name, key in SPECIAL_KEYS.items()}
    _check_ids(reader, {**{SPECIAL_KEYS[name]: token for name, token in named.items()}, "eot": ends[0], "eom": ends[1]})
    return TokenizerFacts(
        kind=kind,
        # gemma4: llama.cpp adds BOS even where the file says no.
        add_bos=kind == "gemma4" or bool(said("add_bos_token", kind == SENTENCEPIECE or (byte_level and pre in PRE_WITH_BOS))),
        add_eos=bool(said("add_eos_token", kind == UNIGRAM)),
        add_space_prefix=bool(said("add_space_prefix", kind == SENTENCEPIECE)),
        pre=pre if byte_level else None,
        words_first=byte_level and pre in PRE_WITHOUT_MERGES,
        end_ids=tuple(int(token) for token in ends if token is not None),
        special_ids={name: int(token) for name, token in named.items() if token is not None},
    )


def _check_ids(reader: gguf.GGUFReader, ids: Mapping[str, Any]) -> None:
    tokens = reader.get_field("tokenizer.ggml.tokens")
    size = len(tokens.data) if tokens else 0
    for key, token in ids.items():
        if size and token is not None and not 0 <= int(token) < size:
            raise ValueError(
                f"tokenizer.ggml.{key}_token_id is {token}, and the file has {size} tokens; take another conversion of the model"
            )


def hold_to(facts: TokenizerFacts, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Apply the file's settings to `tokenizer`, and its end tokens to the model. Settings that agree already are not touched."""
    _hold_special(facts, tokenizer)
    _hold_frame(facts, tokenizer)
    _hold_prefix_space(facts, tokenizer)
    if facts.pre is not None and facts.pre not in PRE_KNOWN:
        logger.warning("transformers does not know how tokenizers of kind %r cut a text into words and takes GPT-2's way", facts.pre)
    if facts.words_first:
        tokenizer.backend_tokenizer.model.ignore_merges = True
    _hold_ends(facts, model)


def _hold_special(facts: TokenizerFacts, tokenizer: PreTrainedTokenizerBase) -> None:
    # transformers before 5.19 takes the BOS for the EOS of some kinds, and forgets the padding token.
    for name, token_id in facts.special_ids.items():
        if getattr(tokenizer, f"{name}_token_id") != token_id:
            setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(token_id))


def _hold_frame(facts: TokenizerFacts, tokenizer: PreTrainedTokenizerBase) -> None:
    for name, wanted in (("bos", facts.add_bos), ("eos", facts.add_eos)):
        if wanted and getattr(tokenizer, f"{name}_token_id") is None:
            logger.warning("the GGUF file says add_%s_token, but names no such token: none is added", name)
    bos, eos = (
        [token] if wanted and token is not None else []
        for wanted, token in ((facts.add_bos, tokenizer.bos_token_id), (facts.add_eos, tokenizer.eos_token_id))
    )
    bare = tokenizer("a", add_special_tokens=False).input_ids
    if tokenizer("a").input_ids != [*bos, *bare, *eos]:
        tokenizer.add_bos_token, tokenizer.add_eos_token = bool(bos), bool(eos)


def _hold_prefix_space(facts: TokenizerFacts, tokenizer: PreTrainedTokenizerBase) -> None:
    backend = tokenizer.backend_tokenizer
    if facts.kind != SENTENCEPIECE or facts.add_space_prefix:
        return
    if isinstance(backend.pre_tokenizer, pre_tokenizers.Metaspace):
        # For Llama's files; for Phi-3's transformers makes a normalizer sequence that begins with the space, for Gemma's neither.
        backend.pre_tokenizer.prepend_scheme = "never"
    elif isinstance(backend.normalizer, normalizers.Sequence):
        backend.normalizer = normalizers.Replace(" ", "\u2581")
    else:
        return
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_prefix_space = False


def _hold_ends(facts: TokenizerFacts, model: PreTrainedModel) -> None:
    config = model.generation_config
    if config is None:
        return
    ends = config.eos_token_id
    known = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    if "eos" not in facts.special_ids and facts.kind != SENTENCEPIECE:
        # The default of the model's class, which is another token in this vocabulary; llama.cpp's for SentencePiece is the same.
        known = []
    found = list(dict.fromkeys([*known, *facts.end_ids]))
    if facts.end_ids or not found:
        config.eos_token_id = found or None
