"""Check that samples, profiles and tables were made with the weights and the tokenizer of the model they are used with."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moa_lab.calibration.samples import Sample
from moa_lab.models import model_name, tokenizer_fingerprint, weights_fingerprint
from moa_lab.provenance import Provenance
from moa_lab.storage import RecordError, parse, read_description

RECORD_ENDINGS = (".json", ".safetensors")


def same_weights(origin: Provenance, model: PreTrainedModel) -> bool:
    """Whether `model` may have the weights that a record names; True where it names none.

    A file loaded in float32 and in bfloat16 has one fingerprint. float16 rounds small weights differently: a record of a float16 load
    is compared after the same rounding; the original weights of a model in float16 are unknown, so its name decides.
    """
    if origin.weights is None or origin.weights in (weights_fingerprint(model), weights_fingerprint(model, torch.float16)):
        return True
    return model.dtype == torch.float16 and origin.model == model_name(model)


def check_origin(
    origin: Provenance, model: PreTrainedModel, what: str, tokenizer: PreTrainedTokenizerBase | None = None, *,
    cure: str = "make them with this model, or take them as they are with any_model=True (--any-model)",
) -> None:  # fmt: skip
    """Refuse a record that was made with other weights, or with another tokenizer (None: not compared).

    what: the record's name in the message, for instance "samples"; cure: what the user can do. Raises ValueError that names both models.
    """
    there, here = f"model {origin.model!r}", f"model {model_name(model)!r}"
    if not same_weights(origin, model):
        raise ValueError(f"{what}: made with weights {origin.weights} ({there}), this is {weights_fingerprint(model)} ({here}); {cure}")
    if tokenizer is None or origin.tokenizer is None:
        return
    found = tokenizer_fingerprint(tokenizer)
    if found != origin.tokenizer:
        raise ValueError(f"{what}: made with tokenizer {origin.tokenizer} ({there}), this is {found} ({here}); {cure}")


def check_vocabulary(samples: Iterable[Sample], model: PreTrainedModel) -> None:
    """Raise ValueError for a token id that the model has no embedding for."""
    size = int(next(model.get_input_embeddings().parameters()).shape[0])
    for sample in samples:
        low, high = int(sample.tokens.min()), int(sample.tokens.max())
        if low < 0 or high >= size:
            wrong = low if low < 0 else high
            raise ValueError(
                f"token id {wrong} of a {sample.task!r} sample is outside the vocabulary of model {model_name(model)!r} (0 to {size - 1}): "
                "its samples are of another tokenizer; calibrate with this model and its own"
            )


def check_folder(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError if a record in a run's folder was made with other weights or another tokenizer."""
    for path in sorted([*folder.glob("*"), *folder.glob("*/*")]) if folder.is_dir() else ():
        if path.suffix in RECORD_ENDINGS:
            check_origin(_origin_of(path), model, str(path), tokenizer, cure="choose another folder, or delete this one")


def _origin_of(path: Path) -> Provenance:
    """The provenance of a record; an empty one if the file is broken, which its own stage will report."""
    try:
        data: Any = read_description(path)
        return parse(Provenance, (data.get("provenance") if isinstance(data, dict) else None) or {}, path)
    except RecordError:
        return Provenance()
