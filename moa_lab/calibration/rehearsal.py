"""Draft one sample of everything that is wanted, so that what cannot be made is refused before the model answers anything."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

from moa_lab.calibration.documents import Document, Split, embedded_documents
from moa_lab.calibration.tasks import Source, Task


def rehearse(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document] | None, split: Split, wanted: Iterable[tuple[Task, int]]
) -> None:
    """Draft one sample of every (task, length) from `documents` (None: the embedded ones of `split`), without the model.

    Raises ValueError where a length leaves no room for a task, or the documents cannot fill it.
    """
    source: Source | None = None
    for task, length in wanted:
        if source is None:
            source = Source(tokenizer, embedded_documents(split) if documents is None else documents, split, seed=0)
        # A rehearsal uses up no document.
        source.answered.clear()
        task.draft(source, length)
