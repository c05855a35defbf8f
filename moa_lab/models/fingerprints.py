"""Names and fingerprints of models and tokenizers, by which a record names those it was made with."""

from __future__ import annotations

import json

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moa_lab.geometry.wrappers import plain_model
from moa_lab.provenance import digest

FINGERPRINT_VALUES = 256
PROBE_TEXT = "The quick brown fox, 1234567 times:\n\tna\u00efve \u4f60\u597d <|end|>"


def model_name(model: PreTrainedModel) -> str:
    """The name the model was loaded by, or its class where it was built from a config."""
    model = plain_model(model)
    return getattr(model, "name_or_path", "") or type(model).__name__


def weights_fingerprint(model: PreTrainedModel, through: torch.dtype | None = None) -> str:
    """Short hash of the weights: names, shapes, and up to 256 evenly spaced values of every parameter.

    Values are compared as bfloat16, so a float32 and a bfloat16 load of the same file agree; 0.1 s for 7B parameters. A float16 load
    may differ, since it rounds small weights more coarsely. through: dtype to round the values to first, as a load in it would.
    An adapter changes it, as it changes the model. Raises ValueError where weights are offloaded, and cannot be read.
    """
    model = plain_model(model)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(f"{type(model).__name__}: some weights are offloaded; load it without offloading (a device_map of GPUs, or none)")
    names, samples = [], []
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().reshape(-1)
        stride = max(1, flat.numel() // FINGERPRINT_VALUES)
        names.append([name, list(parameter.shape)])
        samples.append(flat[::stride][:FINGERPRINT_VALUES].to(through or flat.dtype).to(torch.bfloat16))
    # One copy from the device instead of one per parameter; a model may be spread over several devices.
    together = torch.cat(samples) if len({sample.device for sample in samples}) == 1 else torch.cat([s.cpu() for s in samples])
    values = together.cpu().view(torch.int16).numpy().tobytes()
    return digest(json.dumps(names).encode(), values)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Short hash of the vocabulary, the chat template and how a probe text is cut into tokens."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    template = tokenizer.chat_template
    return digest(json.dumps([vocabulary, template, tokenizer.encode(PROBE_TEXT)], sort_keys=True).encode())
