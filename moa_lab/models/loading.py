"""Load a causal language model and its tokenizer: the embedded default, a hub id, a folder, or a .gguf file."""

from __future__ import annotations

import contextlib
import os

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from moa_lab.geometry.config import attribute
from moa_lab.interface import attention_sites
from moa_lab.models.names import Source, source_of
from moa_lab.models.places import default_dtype, device_of, dtype_of
from moa_lab.models.quiet import without_progress_bars
from moa_lab.models.unpacked import unpacked
from moa_lab.text import one_line

ERROR_CHARACTERS = 300


def load_model(
    name: str | os.PathLike[str] = "smollm2",
    *,
    device: str | int | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    plain_prompts: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a decoder-only model for inference, with its tokenizer.

    `name` is "smollm2" (fetched once, see `embedded_file`), a folder or a `.gguf` file on this machine, a hub id, or a `.gguf`
    file of a hub repository, "owner/repository:file.gguf".
    `device` defaults to cuda where there is one; `dtype` (float32, float16 or bfloat16) to bfloat16 on a GPU that has it and
    float32 elsewhere. GGUF weights are unpacked to `dtype` and cached (see `unpacked`). The model is in eval mode and its parameters
    need no gradient. plain_prompts: drop the tokenizer's chat template, where it cannot be used.

    Raises ValueError, in one line that names the cure, for a missing device, another dtype, an unknown name, and a model that no plan
    can be applied to (see `moa_lab.interface.attention_sites`).
    """
    target = device_of(device)
    wanted = dtype_of(dtype) or default_dtype(target)
    name = os.fspath(name)
    source = source_of(name)
    try:
        model, tokenizer = _read(source, wanted)
    except Exception as error:  # a damaged file: every reader (config, tokenizer, safetensors, GGUF) has errors of its own
        raise ValueError(f"model {name!r} cannot be loaded: {one_line(error)[:ERROR_CHARACTERS]}") from error
    model.name_or_path = name
    if attribute(model.config.get_text_config(decoder=True), "attn_logit_softcapping"):
        # transformers' sdpa silently ignores soft-capping, so its scores would be those of another model.
        model.set_attn_implementation("eager")
    if plain_prompts:
        tokenizer.chat_template = None
    torch.nn.Module.to(model, target)
    model.eval().requires_grad_(False)
    # Refuse a model that no plan can be applied to, before any work is done.
    attention_sites(model)
    return model, tokenizer


def _read(source: Source, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if source.gguf is not None:
        return unpacked(source.gguf, dtype)
    # Downloads keep their progress bars.
    with without_progress_bars() if source.is_here else contextlib.nullcontext():
        tokenizer = AutoTokenizer.from_pretrained(source.place)
        return AutoModelForCausalLM.from_pretrained(source.place, dtype=dtype), tokenizer
