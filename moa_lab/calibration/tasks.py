"""Tasks that need the far past: each makes samples of an exact length, with the expected answers already in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
from transformers import PreTrainedTokenizerBase

from moa_lab.calibration.documents import Document, Split, TextStream
from moa_lab.calibration.prompts import Frame, Turn, assemble, chat_frame, encode, insert_at_depths
from moa_lab.calibration.samples import Sample
from moa_lab.calibration.wordings import WORDINGS, Fact, Wording
from moa_lab.models import opening_ids

MIN_CONTEXT_TOKENS = 64
# Modelled on RULER's needle tasks (Hsieh et al., 2024), whose prompt says what will be asked for.
QUESTIONS_INTRODUCTION = (
    "Some facts are hidden within the following text. Make sure to memorize them. I will quiz you about them afterwards.\n\n"
)


@dataclass
class Source:
    """Where a task takes its material from: documents of one split as a token stream, and a seeded generator."""

    tokenizer: PreTrainedTokenizerBase
    documents: Sequence[Document]
    split: Split
    seed: int

    def __post_init__(self) -> None:
        self.stream = TextStream(self.documents, self.tokenizer, self.seed)
        self.random = Random(self.seed)
        self.answered: set[Document] = set()


@dataclass(frozen=True)
class Questions:
    """Facts planted far apart in a text, and a conversation that asks for each of them.

    per_sample: how many facts are planted and asked; more is cheaper, but later questions also look back at earlier ones.
    depths: where (0 start, 1 end); None: stratified at random.
    wordings: None means those of the source's split, which no other split uses.
    """

    per_sample: int = 1
    depths: tuple[float, ...] | None = None
    wordings: tuple[Wording, ...] | None = None
    name: str = "questions"

    def draft(self, source: Source, length: int) -> Sample:
        """One sample; raises ValueError when the length leaves no room for a context."""
        random, tokenizer = source.random, source.tokenizer
        taken: set[str] = set()
        wordings = self.wordings or WORDINGS[source.split]
        # Use each wording once before repeating any: small models mix up facts that differ only in their key.
        kinds = [wording for _ in range(-(-self.per_sample // len(wordings))) for wording in random.sample(wordings, len(wordings))]
        facts = [wording.draw(random, taken) for wording in kinds[: self.per_sample]]
        depths = self.depths or _stratified_depths(self.per_sample, random)
        frame = chat_frame(tokenizer, QUESTIONS_INTRODUCTION, [Turn(f.question, f.lead) for f in facts])
        answers = [encode(tokenizer, " " + fact.answer) for fact in facts]
        planted = [encode(tokenizer, " " + fact.sentence) for fact in facts]
        room = _room(length, frame, answers, sum(map(len, planted)), self.name)
        order = random.sample(range(self.per_sample), self.per_sample)
        context = insert_at_depths(tokenizer, source.stream.take(room), [planted[i] for i in order], depths)
        tokens, ranges = assemble(frame, context, answers)
        depth_of = dict(zip(order, depths, strict=True))
        detail = {
            "facts": [_fact_detail(fact, depth_of[index]) for index, fact in enumerate(facts)],
            # Where the first question begins: what is before it can be read, and compressed, without knowing what will be asked.
            "asked_from": len(frame.opening) + len(context),
        }
        return Sample(self.name, tokens, ranges, detail)


@dataclass(frozen=True)
class Summaries:
    """Several documents, and a request to summarise all of them; the answer is a placeholder of `answer_tokens` tokens
    for the model to fill (its end-of-sequence token suppressed, so that every sample has its exact length)."""

    documents: int = 3
    answer_tokens: int = 128
    name: str = "summaries"

    def draft(self, source: Source, length: int) -> Sample:
        """One sample; raises ValueError when the length leaves no room for the documents."""
        tokenizer = source.tokenizer
        turn = Turn(f"Write a detailed summary of each of the {self.documents} documents above.")
        frame = chat_frame(tokenizer, "", [turn])
        answers = [[frame.before[0][-1]] * self.answer_tokens]
        heads = [encode(tokenizer, f"{'' if i == 0 else chr(10) * 2}Document {i + 1}:\n") for i in range(self.documents)]
        room = _room(length, frame, answers, sum(map(len, heads)), self.name)
        excerpts = source.stream.take_documents(room, self.documents)
        context = [token for head, excerpt in zip(heads, excerpts, strict=True) for token in [*head, *excerpt]]
        tokens, ranges = assemble(frame, context, answers)
        return Sample(self.name, tokens, ranges, {"documents": self.documents, "fill": "generate"})


@dataclass(frozen=True)
class HumanAnswers:
    """Documents with a human's summary (or a question and a human's answer): the loss is on the human's words.

    A longer document is excerpted, a shorter one preceded by other documents, so that the length is exact; the human's
    text is cut at `answer_tokens`, and `detail` says how many of its tokens were left out.
    """

    answer_tokens: int = 256
    name: str = "human"

    def draft(self, source: Source, length: int) -> Sample:
        """One sample; raises ValueError when no document has a human's answer."""
        written = answered_documents(source.documents)
        fresh = [document for document in written if document not in source.answered]
        if not fresh:
            raise ValueError(f"all {len(written)} documents with a human's answer are used up at length {length}; add some, ask for less")
        document = source.random.choice(fresh)
        source.answered.add(document)
        tokenizer = source.tokenizer
        question = document.question or "Write a detailed summary of the text above."
        frame = chat_frame(tokenizer, "", [Turn(question)])
        whole = encode(tokenizer, document.answer or document.summary or "")
        answer = whole[: self.answer_tokens]
        room = _room(length, frame, [answer], 0, self.name)
        own = encode(tokenizer, document.text)[:room]
        context = [*source.stream.take(room - len(own)), *own] if len(own) < room else own
        tokens, ranges = assemble(frame, context, [answer])
        return Sample(self.name, tokens, ranges, {"document": document.name, "answer_tokens_left_out": len(whole) - len(answer)})


@dataclass(frozen=True)
class PlainText:
    """Plain text with the loss on its own tokens: general language modelling, the paper's weakest supervision.

    The first `1 - scored` of the text is context only, so that every scored token has a past.
    """

    scored: float = 0.5
    name: str = "text"

    def draft(self, source: Source, length: int) -> Sample:
        """One sample."""
        start = source.tokenizer.bos_token_id
        # Begin with BOS if there is one, even where the tokenizer adds none: models use the first token as an attention sink.
        opening = opening_ids(source.tokenizer) or ([] if start is None else [start])
        tokens = np.array([*opening, *source.stream.take(length - len(opening))], dtype=np.int64)
        return Sample(self.name, tokens, ((max(1, round(length * (1 - self.scored))), length),))


@dataclass(frozen=True)
class Lines:
    """LongEval's line retrieval (Li et al., 2023): a register of many lines, one of which is asked for."""

    name: str = "lines"

    def draft(self, source: Source, length: int) -> Sample:
        """One sample; text before the register fills what whole lines leave over."""
        random, tokenizer = source.random, source.tokenizer
        adjectives, nouns = WORDINGS["test"][0].keys
        lines: list[list[int]] = []
        keys: list[str] = []
        values: list[str] = []

        def add_line() -> None:
            key = f"{random.choice(adjectives)}-{random.choice(nouns)}-{len(keys)}"
            value = str(random.randrange(10_000, 100_000))
            keys.append(key)
            values.append(value)
            lines.append(encode(tokenizer, f"line {key}: REGISTER_CONTENT is <{value}>\n"))

        add_line()
        while sum(map(len, lines)) < length:
            add_line()
        asked = random.randrange(len(lines) // 8, max(len(lines) // 8 + 1, len(lines) * 7 // 8))
        turn = Turn(f"What is the REGISTER_CONTENT in line {keys[asked]}?", f"The REGISTER_CONTENT in line {keys[asked]} is <")
        frame = chat_frame(tokenizer, "Below is a record of lines to remember. Each line has an index and a REGISTER_CONTENT.\n\n", [turn])
        answers = [encode(tokenizer, values[asked])]
        room = _room(length, frame, answers, 0, self.name)
        kept = list(range(len(lines)))
        while sum(len(lines[i]) for i in kept) > room:
            # Drop lines from the end, but never the one asked for.
            kept.remove(next(i for i in reversed(kept) if i != asked))
        register = [token for i in kept for token in lines[i]]
        spare = room - len(register)
        context = [*(source.stream.take(spare) if spare else []), *register]
        tokens, ranges = assemble(frame, context, answers)
        depth = kept.index(asked) / max(len(kept) - 1, 1)
        fact = {"key": keys[asked], "answer": values[asked], "depth": depth, "wording": "lines"}
        return Sample(self.name, tokens, ranges, {"facts": [fact]})


def answered_documents(documents: Sequence[Document]) -> list[Document]:
    """The documents with a human's summary or answer; raises ValueError when there are none."""
    written = [document for document in documents if document.summary or document.answer]
    if not written:
        raise ValueError("supervision 'human' needs documents with a summary or an answer; map the column with summary=... or answer=...")
    return written


def turns_of(task: Task) -> int:
    """Questions and answers in one sample's chat; 0 for plain text."""
    return task.per_sample if isinstance(task, Questions) else 0 if isinstance(task, PlainText) else 1


def _fact_detail(fact: Fact, depth: float) -> dict[str, object]:
    return {"wording": fact.wording, "key": fact.key, "answer": fact.answer, "depth": depth}


def _stratified_depths(count: int, random: Random) -> tuple[float, ...]:
    return tuple((index + random.random()) / count for index in range(count))


def _room(length: int, frame: Frame, answers: Sequence[Sequence[int]], extra: int, task: str) -> int:
    fixed = frame.fixed_tokens() + sum(map(len, answers)) + extra
    if length - fixed < MIN_CONTEXT_TOKENS:
        raise ValueError(
            f"length {length} is too short for a {task!r} sample: its frame and answers take {fixed} tokens; "
            f"use {fixed + MIN_CONTEXT_TOKENS} or more"
        )
    return length - fixed


Task = Questions | Summaries | HumanAnswers | PlainText | Lines
