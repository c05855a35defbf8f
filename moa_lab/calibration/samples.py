"""Sample and SampleSet: token sequences of an exact length, with the tokens on which the loss is taken."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from moa_lab.provenance import Provenance, digest
from moa_lab.storage import RecordError, parse, read_tensors, to_json, write_tensors

logger = logging.getLogger(__name__)

SAMPLES_SCHEMA = "moa-lab/samples/1"


@dataclass(frozen=True, eq=False)
class Sample:
    """One sequence of exactly `length` tokens, prompt and answers together.

    tokens: int64 (length,). answers: [start, stop) ranges of the answer tokens; the loss is taken there and nowhere else.
    detail: JSON data about how it was made (documents, planted facts with their depths, whether the model's answer was right).
    """

    task: str
    tokens: np.ndarray
    answers: tuple[tuple[int, int], ...]
    detail: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.tokens.ndim != 1 or self.tokens.dtype.kind not in "iu" or (self.tokens < 0).any():
            raise ValueError(f"tokens must be one row of token ids, got {self.tokens.dtype} of shape {self.tokens.shape}")
        if not self.answers or any(not 0 < start < stop <= self.length for start, stop in self.answers):
            raise ValueError(f"answers must be ranges inside 1..{self.length}, got {self.answers}")

    @property
    def length(self) -> int:
        """Tokens in the sequence."""
        return int(self.tokens.shape[0])

    @property
    def answer_positions(self) -> np.ndarray:
        """Positions of all answer tokens, int64, ascending. The logits that predict them are one position earlier."""
        return np.concatenate([np.arange(start, stop) for start, stop in self.answers])

    @property
    def identity(self) -> str:
        """Hash of task, tokens and answers."""
        return digest(self.task.encode(), self.tokens.astype("<i8").tobytes(), json.dumps(self.answers).encode())


@dataclass(frozen=True, eq=False)
class SampleSet:
    """Samples in a fixed order, each once, and where they came from."""

    samples: tuple[Sample, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    provenance: Provenance = field(default_factory=Provenance)

    def __post_init__(self) -> None:
        object.__setattr__(self, "samples", tuple(distinct(self.samples)))

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)

    @property
    def identity(self) -> str:
        """Hash of all samples in order."""
        return digest(*(sample.identity.encode() for sample in self.samples))

    def select(self, task: str | None = None, length: int | None = None) -> tuple[Sample, ...]:
        """The samples of a task and a length (None: any)."""
        return tuple(s for s in self.samples if task in (None, s.task) and length in (None, s.length))

    def limited(self, tokens: int) -> SampleSet:
        """The first samples of every (task, length), `tokens` divided evenly among the pairs; at least one sample of each."""
        groups = group_by_shape(self.samples)
        kept = {key: group[: max(1, tokens // len(groups) // key[1])] for key, group in groups.items()}
        chosen = {id(sample) for group in kept.values() for sample in group}
        return replace(self, samples=tuple(sample for sample in self.samples if id(sample) in chosen))

    @property
    def keys(self) -> tuple[tuple[str, int], ...]:
        """The (task, length) pairs present, sorted."""
        return tuple(sorted({(sample.task, sample.length) for sample in self.samples}))

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file."""
        described = [{"task": s.task, "answers": s.answers, "detail": s.detail} for s in self.samples]
        tensors = {f"tokens/{index}": sample.tokens for index, sample in enumerate(self.samples)}
        description = {"schema": SAMPLES_SCHEMA, "samples": described, "settings": self.settings}
        return write_tensors(path, tensors, {**description, "provenance": to_json(self.provenance)})

    @classmethod
    def load(cls, path: str | Path) -> SampleSet:
        """Read a sample set; raises RecordError for a broken or foreign file."""
        tensors, data = read_tensors(path, SAMPLES_SCHEMA)
        head = parse(_SetHead, {name: value for name, value in data.items() if name != "schema"}, path)
        try:
            samples = tuple(Sample(row.task, tensors[f"tokens/{index}"], row.answers, row.detail) for index, row in enumerate(head.samples))
        except (KeyError, ValueError) as error:
            raise RecordError(f"{path}: sample set lacks or garbles {error}; delete it and calibrate again") from error
        return cls(samples, head.settings, head.provenance)


@dataclass(frozen=True)
class _SampleHead:
    """A sample without its tokens."""

    task: str
    answers: tuple[tuple[int, int], ...]
    detail: dict[str, Any]


@dataclass(frozen=True)
class _SetHead:
    samples: tuple[_SampleHead, ...]
    settings: dict[str, Any]
    provenance: Provenance


def distinct(samples: Iterable[Sample]) -> list[Sample]:
    """The samples in order without repetitions, which add no evidence; their number is logged."""
    given = list(samples)
    kept: dict[str, Sample] = {}
    for sample in given:
        kept.setdefault(sample.identity, sample)
    if len(kept) < len(given):
        logger.warning("%d of %d samples were there twice, counted once", len(given) - len(kept), len(given))
    return list(kept.values())


def group_by_shape(samples: Iterable[Sample]) -> dict[tuple[str, int], list[Sample]]:
    """Samples by (task, length), in order: a group can share a batch without padding."""
    groups: dict[tuple[str, int], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.task, sample.length), []).append(sample)
    return groups
