"""Draft samples of everything that is wanted, so that what cannot be made is refused before the model answers anything."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

from moa_lab.calibration.documents import Document, Split, embedded_documents
from moa_lab.calibration.tasks import Source, Task

ROOMY_TOKENS = 1024
"""Texts so long have room for every wording and every fact."""
DRAFTS = 32
"""Samples of a shorter text that are drafted: some wordings and facts take more tokens than others."""


def rehearse(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document] | None, split: Split, wanted: Iterable[tuple[Task, int]]
) -> None:
    """Draft a sample of every (task, length), several where there is little room, without the model.

    documents: None for the embedded ones of `split`. Raises ValueError where a length leaves no room for a task, or the documents cannot
    fill it.
    """
    source: Source | None = None
    for task, length in wanted:
        if source is None:
            source = Source(tokenizer, embedded_documents(split) if documents is None else documents, split, seed=0)
        for _ in range(DRAFTS if length < ROOMY_TOKENS else 1):
            # A rehearsal uses up no document.
            source.answered.clear()
            task.draft(source, length)
