"""Whether the Hugging Face hub has a model."""

from __future__ import annotations

from collections.abc import Sequence

from moa_lab.storage.hub import TIMEOUT_S, reason

NAMES_SHOWN = 3


def check_hub(name: str, embedded: Sequence[str]) -> None:
    """Raise ValueError for a hub id that is neither in the hub's cache nor on the hub, or that holds nothing but GGUF files.

    embedded: names of embedded models, for the message.
    """
    # Checked first, since from_pretrained retries an unreachable hub for 20 s, with many warnings.
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
        found = HfApi().model_info(name, timeout=TIMEOUT_S)
    except Exception as error:  # the hub's HTTP library, and so the class of its errors, differs between versions
        raise ValueError(
            f"unknown model {name!r}: not one of {list(embedded)}, not a folder or .gguf file here, and the hub does not give it "
            f"({reason(error)}); check the spelling, the network, or HF_TOKEN for a gated model"
        ) from error
    files = [sibling.rfilename for sibling in found.siblings or ()]
    packed = [file for file in files if file.lower().endswith(".gguf")]
    if packed and "config.json" not in files:
        choice = " or ".join(f"{name}:{file}" for file in packed[:NAMES_SHOWN])
        raise ValueError(f"model {name!r} of the hub is a collection of GGUF files; name one of them: {choice}")
