"""Questions that are not known while their context is read and compressed; a file of them travels to another environment."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moa_lab.provenance import Provenance, digest
from moa_lab.storage import parse, read_json, to_json, write_json

QUESTIONS_SCHEMA = "moa-lab/questions/1"


@dataclass(frozen=True)
class Question:
    """A sample in three parts of token ids: `context`, `question` and `answer` follow one another.

    text: the answer in words. sample: identity of the `Sample` that this was.
    """

    task: str
    context: tuple[int, ...]
    question: tuple[int, ...]
    answer: tuple[int, ...]
    text: str
    sample: str

    def __post_init__(self) -> None:
        if not (self.context and self.question and self.answer):
            raise ValueError("a question needs a context, a question and an answer, each of one token at least")

    @property
    def length(self) -> int:
        """Tokens in all."""
        return len(self.context) + self.asked_tokens

    @property
    def asked_tokens(self) -> int:
        """Tokens of question and answer: no method drops them before the answer is there."""
        return len(self.question) + len(self.answer)


@dataclass(frozen=True)
class QuestionSet:
    """Questions in a fixed order."""

    questions: tuple[Question, ...]
    provenance: Provenance = field(default_factory=Provenance)

    def __iter__(self) -> Iterator[Question]:
        return iter(self.questions)

    def groups(self, first: int | None = None) -> dict[tuple[str, int], tuple[Question, ...]]:
        """The questions of every (task, length), in order. first: of each so many at most, spread evenly over all."""
        found: dict[tuple[str, int], list[Question]] = {}
        for question in self.questions:
            found.setdefault((question.task, question.length), []).append(question)
        # Neighbours ask about neighbouring depths.
        return {key: tuple(group[:: max(1, len(group) // first) if first else 1][:first]) for key, group in found.items()}

    def save(self, path: str | Path) -> Path:
        """Write one JSON file."""
        return write_json(path, {"schema": QUESTIONS_SCHEMA, **to_json(self)})

    @classmethod
    def load(cls, path: str | Path) -> QuestionSet:
        """Read a file of questions; raises RecordError for a broken or foreign file."""
        data = read_json(path, QUESTIONS_SCHEMA)
        return parse(cls, {name: value for name, value in data.items() if name != "schema"}, path)


def identity(questions: Sequence[Question]) -> str:
    """Hash of the samples that the questions were, as rows of scores name them: rows over the same samples are compared in pairs."""
    return digest(*(question.sample.encode() for question in questions))
