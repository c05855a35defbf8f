"""Test samples: needles, lines, held-out documents, and the dense model's own answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moa_lab.calibration.dataset import Progress, Request, Told, calibrate
from moa_lab.calibration.documents import Document, Split, embedded_documents, tell_escaped
from moa_lab.calibration.samples import Sample, distinct
from moa_lab.calibration.tasks import Lines, PlainText, Questions, Source, Summaries, Task
from moa_lab.geometry.wrappers import plain_model
from moa_lab.provenance import digest


def needle_samples(
    tokenizer: PreTrainedTokenizerBase, length: int, n: int, *, per_sample: int = 1, split: Split = "test", seed: int = 0,
    documents: Sequence[Document] | None = None,
) -> list[Sample]:  # fmt: skip
    """`n` needles (Kamradt, 2023) in texts of exactly `length` tokens, at depths that cover the text evenly.

    per_sample: needles in one text, asked one after the other; 1 is the usual test, more is cheaper. The wordings are
    those of `split`: no other split uses them. `n` must be a multiple of `per_sample`.
    """
    if n < 1 or n % per_sample:
        raise ValueError(f"needles per length must be a positive multiple of {per_sample} (needles per text), got {n}")
    source = _source(tokenizer, "needles", length, split, seed, documents)
    depths = [(index + 0.5) / n for index in range(n)]
    # Sample k holds depths k, k + n/per_sample, ...: as far apart as they can be.
    step = n // per_sample
    return distinct(Questions(per_sample, tuple(depths[first::step]), name="needles").draft(source, length) for first in range(step))


def line_samples(tokenizer: PreTrainedTokenizerBase, length: int, n: int, *, split: Split = "test", seed: int = 0) -> list[Sample]:
    """`n` registers of lines (LongEval, Li et al., 2023), one line asked for in each."""
    return _drafts(Lines(), _source(tokenizer, "lines", length, split, seed, None), length, n)


def document_samples(
    tokenizer: PreTrainedTokenizerBase, length: int, n: int, *, split: Split = "test", seed: int = 0,
    documents: Sequence[Document] | None = None,
) -> list[Sample]:  # fmt: skip
    """`n` held-out texts; the loss is on their second half, so that every scored token has a long past."""
    return _drafts(PlainText(name="documents"), _source(tokenizer, "documents", length, split, seed, documents), length, n)


def own_answer_samples(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int, n: int, *, split: Split = "test", seed: int = 0,
    answer_tokens: int = 128, documents: Sequence[Document] | None = None, batch_size: int = 1,
    parts_dir: str | Path | None = None, progress: Progress | None = None, told: Told | None = None,
) -> list[Sample]:  # fmt: skip
    """`n` multi-document summaries written by the dense model itself: the likelier a plan finds them, the better.

    told: gets the dense model's scores of those that it writes in this call (see `calibrate`).
    """
    model = plain_model(model)
    wanted = (Request(Summaries(answer_tokens=answer_tokens), n),)
    found = calibrate(
        model, tokenizer, [length], wanted=wanted, documents=documents, split=split, seed=seed, batch_size=batch_size,
        parts_dir=parts_dir, progress=progress, told=told,
    )  # fmt: skip
    return list(found)


def _source(
    tokenizer: PreTrainedTokenizerBase, task: str, length: int, split: Split, seed: int, documents: Sequence[Document] | None
) -> Source:
    if documents is not None:
        tell_escaped(documents, tokenizer)
    own_seed = int(digest(f"{seed}/{split}/{task}/{length}".encode())[:8], 16)
    return Source(tokenizer, embedded_documents(split) if documents is None else documents, split, own_seed)


def _drafts(task: Task, source: Source, length: int, n: int) -> list[Sample]:
    return distinct(task.draft(source, length) for _ in range(n))
