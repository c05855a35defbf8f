"""GGUF models, unpacked once and cached: unpacking takes minutes, reading the result seconds.

Weights are cached in the dtype that was asked for, so a cached model equals a freshly unpacked one bit for bit.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from moa_lab.models.embedded import sha256_of
from moa_lab.models.fingerprints import weights_fingerprint
from moa_lab.models.gguf_unpacking import general_tokenizer, tokenizer_settings, unpack
from moa_lab.models.kept import SCHEMA, describe, entry_of, new_entry, unpacked_folder
from moa_lab.models.quiet import without_progress_bars
from moa_lab.provenance import digest
from moa_lab.text import one_line

logger = logging.getLogger(__name__)

SWITCH = "MOA_LAB_KEEP_UNPACKED"
# Disk space that must stay free beside an entry.
SPARE_BYTES = 1 << 30
TOKENIZER = "tokenizer.json"
# Packages whose versions change the result of unpacking.
DECIDING = ("transformers", "gguf", "tokenizers")


def unpacked(path: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model (on the CPU, weights in `dtype`) and tokenizer of a GGUF file; kept in the cache for the next time.

    An entry belongs to the file's SHA-256, the dtype, and the versions of transformers, gguf and tokenizers. A damaged entry is made
    again, with a warning; a model that cannot be cached (a full disk) is returned all the same. MOA_LAB_KEEP_UNPACKED=0 neither reads
    nor writes the cache; `moa-lab doctor --clear-cache` empties it.
    """
    if os.environ.get(SWITCH, "1").lower() in ("0", "no", "off", "false"):
        return _settled(*unpack(path, dtype), path, dtype)
    name = _name(path, dtype)
    folder = unpacked_folder() / name
    if folder.is_dir():
        try:
            return _settled(*_read(folder, dtype), path, dtype)
        except Exception as error:  # transformers, tokenizers and safetensors each have errors of their own
            logger.warning("unpacked %s in %s is damaged (%s); unpacking it again", path.name, folder, one_line(error))
            shutil.rmtree(folder, ignore_errors=True)
    logger.info("unpacking %s (once; minutes for a large file)", path.name)
    model, tokenizer = unpack(path, dtype)
    try:
        _keep(name, path, model, tokenizer, dtype)
    except Exception as error:  # safetensors has errors of its own for a full disk
        logger.warning(
            "%s is loaded, but cannot be kept unpacked in %s (%s): the next load takes as long; free space, set MOA_LAB_CACHE to "
            "another disk, or %s=0 to keep nothing", path.name, unpacked_folder(), one_line(error), SWITCH,
        )  # fmt: skip
    return _settled(model, tokenizer, path, dtype)


def _name(path: Path, dtype: torch.dtype) -> str:
    versions = [version(package) for package in DECIDING]
    return digest(json.dumps([sha256_of(path), str(dtype), versions, SCHEMA]).encode())


def _read(folder: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    entry = entry_of(folder)
    tokenizer = general_tokenizer(entry.tokenizer, tokenizer_file=str(folder / TOKENIZER))
    with without_progress_bars():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    if weights_fingerprint(model) != entry.weights:
        raise ValueError("its weights are not those that were written")
    return model, tokenizer


def _keep(name: str, path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> None:
    size = sum(parameter.nbytes for parameter in model.parameters())
    root = unpacked_folder()
    root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(root).free
    if free < size + SPARE_BYTES:
        raise OSError(f"{size / 1e9:.1f} GB to write, {free / 1e9:.1f} GB free")
    with new_entry(name) as folder, without_progress_bars():
        model.save_pretrained(folder)
        tokenizer.backend_tokenizer.save(str(folder / TOKENIZER))
        describe(
            folder, source=path.name, dtype=str(dtype).removeprefix("torch."), weights=weights_fingerprint(model),
            tokenizer=tokenizer_settings(tokenizer),
        )  # fmt: skip
    logger.info("keeping %s unpacked in %s (%.1f GB); `moa-lab doctor --clear-cache` removes it", path.name, root / name, size / 1e9)


def _settled(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Set the config fields that the cache would change, so that a model is the same with and without it."""
    model.config.architectures, model.config.dtype = [type(model).__name__], dtype
    model.config.name_or_path = tokenizer.name_or_path = str(path.parent)
    return model, tokenizer
