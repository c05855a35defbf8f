"""How many weights a model has, read off its description alone."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moa_lab.models.embedded import EMBEDDED, is_cached
from moa_lab.models.gguf_reading import reading
from moa_lab.models.names import source_of
from moa_lab.text import one_line


def is_at_hand(name: str) -> bool:
    """Whether the description of a model of that name is on this machine, so that nothing would be fetched to read it."""
    if name in EMBEDDED:
        return is_cached(name)
    return Path(name).expanduser().exists()


def weight_count(name: str | os.PathLike[str]) -> int:
    """Weights of a model named as for `load_model`, each once where layers share it; its weights are not read.

    Raises ValueError for an unknown name, and for a description that cannot be read.
    """
    source = source_of(os.fspath(name))
    if source.gguf is not None:
        with reading(source.gguf) as reader:
            return sum(int(tensor.n_elements) for tensor in reader.tensors)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source.place))
    except Exception as error:  # every family's reader has errors of its own
        raise ValueError(f"the size of model {os.fspath(name)!r} cannot be read: {one_line(error)}") from error
    return sum(weight.numel() for weight in model.parameters())
