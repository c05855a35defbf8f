"""A GGUF file as an ordinary transformers model and its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from moa_lab.models.gguf_reading import reading, value_of
from moa_lab.models.gguf_tokenizer import hold_to, tokenizer_facts
from moa_lab.models.quiet import without_progress_bars


def unpack(path: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model with its weights unpacked to `dtype` on the CPU, and the tokenizer that the file describes.

    Raises ValueError for one part of a split file, and for a file that lacks weights of the model.
    """
    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    with reading(path) as reader:
        _check_whole(reader)
        facts = tokenizer_facts(reader)
        with without_progress_bars():
            tokenizer = AutoTokenizer.from_pretrained(**source)
            # dequantize: else transformers keeps GGUF blocks packed where it has a kernel for them, and these cannot be profiled;
            # `.float()` and `.half()` would refuse as well.
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                **source, dtype=dtype, quantization_config=GgufConfig(dequantize=True), output_loading_info=True
            )
    model, found = loaded
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"the file lacks {len(missing)} of the model's weights ({missing[0]} among them), which would be random")
    hold_to(facts, tokenizer, model)
    return model, general_tokenizer(tokenizer_settings(tokenizer), tokenizer_object=tokenizer.backend_tokenizer)


def tokenizer_settings(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Settings of a tokenizer beside its tokenizer.json, as JSON data."""
    names = ("padding_side", "truncation_side", "clean_up_tokenization_spaces", "chat_template")
    # Only if True: passing these, even as False, replaces what the tokenizer itself adds at the ends of a text.
    ends = {name: True for name in ("add_bos_token", "add_eos_token") if getattr(tokenizer, name)}
    return {**tokenizer.special_tokens_map, **{name: getattr(tokenizer, name) for name in names}, **ends}


def general_tokenizer(settings: dict[str, Any], **source: Any) -> PreTrainedTokenizerFast:
    """A tokenizer of transformers' general class: those of single models may rebuild their parts differently when read again."""
    return PreTrainedTokenizerFast(**source, **settings)


def _check_whole(reader: gguf.GGUFReader) -> None:
    parts = int(value_of(reader, "split.count", 0))
    if parts > 1:
        raise ValueError(f"this is one of {parts} parts of a model; join them first: llama-gguf-split --merge FIRST_PART WHOLE.gguf")
