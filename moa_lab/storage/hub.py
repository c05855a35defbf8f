"""Single files of repositories of the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from moa_lab.text import one_line

ERROR_CHARACTERS = 300
TIMEOUT_S = 10


def hub_file(what: str, repository: str, file: str, revision: str | None = None) -> Path:
    """`file` of the repository, fetched into the hub's cache; without a network, what the cache holds. what: for the message.

    Raises ValueError where neither has it.
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, file, revision=revision, etag_timeout=TIMEOUT_S))
    except Exception as error:  # the hub's HTTP library, and so the class of its errors, differs between versions
        raise ValueError(
            f"{what}: neither the hub nor its cache gives {file} of {repository} ({reason(error)}); "
            "check the spelling of both, the network, or HF_TOKEN for a gated model"
        ) from error


def reason(error: BaseException) -> str:
    """What went wrong, in one short line."""
    return one_line(error)[:ERROR_CHARACTERS]
