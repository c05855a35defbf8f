"""Load a causal language model and its tokenizer: the embedded default, a hub id, a folder, or a .gguf file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping

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
    device_map: str | Mapping[str, int | str] | None = None,
    plain_prompts: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a decoder-only model for inference, with its tokenizer.

    `name` is "smollm2" (fetched once, see `embedded_file`), a folder or a `.gguf` file on this machine, a hub id, or a `.gguf`
    file of a hub repository, "owner/repository:file.gguf".
    `device` defaults to cuda where there is one; `dtype` (float32, float16 or bfloat16) to bfloat16 on a GPU that has it and
    float32 elsewhere. GGUF weights are unpacked to `dtype` and cached (see `unpacked`). The model is in eval mode and its parameters
    need no gradient. device_map: deal the layers of a model that no GPU holds alone out among several ("auto", or where each goes, as in
    transformers, with accelerate); decode steps are not captured then, nor layers compiled. plain_prompts: drop the
    tokenizer's chat template, where it cannot be used.

    Raises ValueError, in one line that names the cure, for a missing device, another dtype, an unknown name, a device beside a map, and a
    model that no plan can be applied to (see `moa_lab.interface.attention_sites`).
    """
    if device is not None and device_map is not None:
        raise ValueError(f"a device ({device}) or a device_map ({device_map}), not both")
    target = device_of(device)
    wanted = dtype_of(dtype) or default_dtype(target)
    name = os.fspath(name)
    source = source_of(name)
    try:
        model, tokenizer = _read(source, wanted, device_map)
    except Exception as error:  # a damaged file: every reader (config, tokenizer, safetensors, GGUF) has errors of its own
        raise ValueError(f"model {name!r} cannot be loaded: {one_line(error)[:ERROR_CHARACTERS]}") from error
    model.name_or_path = name
    if attribute(model.config.get_text_config(decoder=True), "attn_logit_softcapping"):
        # transformers' sdpa silently ignores soft-capping, so its scores would be those of another model.
        model.set_attn_implementation("eager")
    if plain_prompts:
        tokenizer.chat_template = None
    if device_map is None:
        torch.nn.Module.to(model, target)
    model.eval().requires_grad_(False)
    # Refuse a model that no plan can be applied to, before any work is done.
    attention_sites(model)
    return model, tokenizer


def _read(
    source: Source, dtype: torch.dtype, device_map: str | Mapping[str, int | str] | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if source.gguf is not None:
        model, tokenizer = unpacked(source.gguf, dtype)
        return (model if device_map is None else _dealt_out(model, device_map)), tokenizer
    # Downloads keep their progress bars.
    with without_progress_bars() if source.is_here else contextlib.nullcontext():
        tokenizer = AutoTokenizer.from_pretrained(source.place)
        return AutoModelForCausalLM.from_pretrained(source.place, dtype=dtype, device_map=device_map), tokenizer


def _dealt_out(model: PreTrainedModel, device_map: str | Mapping[str, int | str]) -> PreTrainedModel:
    """A model that is loaded, dealt out as `from_pretrained` would have."""
    from accelerate import dispatch_model, infer_auto_device_map

    whole = list(model._no_split_modules or ())
    where = infer_auto_device_map(model, no_split_module_classes=whole) if isinstance(device_map, str) else dict(device_map)
    dealt: PreTrainedModel = dispatch_model(model, where, force_hooks=True)
    return dealt
