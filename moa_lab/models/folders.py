"""A model as the folder that other programs read: config, weights in safetensors, tokenizer and chat template."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

from moa_lab.models.embedded import sha256_of
from moa_lab.models.fingerprints import weights_fingerprint
from moa_lab.models.kept import RECORD, SCHEMA, describe, new_entry, unpacked_folder
from moa_lab.models.loading import load_model
from moa_lab.models.names import source_of
from moa_lab.models.quiet import without_progress_bars
from moa_lab.provenance import digest


def model_folder(name: str) -> str:
    """The folder or hub id of a model: a GGUF file is written to the cache once, in float32, for as long as that is kept.

    Raises ValueError for an unknown name, OSError where nothing can be written.
    """
    source = source_of(name)
    if source.gguf is None:
        return source.place
    entry = digest(json.dumps([sha256_of(source.gguf), "folder", version("transformers"), SCHEMA]).encode())
    folder: Path = unpacked_folder() / entry
    if not (folder / RECORD).is_file():
        model, tokenizer = load_model(name, device="cpu", dtype="float32")
        with new_entry(entry) as made, without_progress_bars():
            model.save_pretrained(made)
            tokenizer.save_pretrained(made)
            describe(
                made, source=f"{source.gguf.name}, as a folder", dtype="torch.float32", weights=weights_fingerprint(model), tokenizer={}
            )
    return str(folder)
