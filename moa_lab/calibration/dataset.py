"""The calibration stage: samples of every task and length, answered by the dense model itself."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moa_lab import processes
from moa_lab.calibration.answers import AnswerScore, answer_greedily, forward_bytes, score_answers
from moa_lab.calibration.documents import Document, Split, documents_hash, embedded_documents, tell_escaped
from moa_lab.calibration.origin import check_vocabulary
from moa_lab.calibration.rehearsal import rehearse
from moa_lab.calibration.samples import Sample, SampleSet
from moa_lab.calibration.tasks import HumanAnswers, PlainText, Questions, Source, Summaries, Task, answered_documents, turns_of
from moa_lab.calibration.wordings import Wording
from moa_lab.geometry.wrappers import plain_model
from moa_lab.interface import attention_sites
from moa_lab.models import geometry_of, model_name, tokenizer_fingerprint, weights_fingerprint
from moa_lab.prompting.rendering import check_turns
from moa_lab.provenance import digest, provenance
from moa_lab.side_by_side import side_by_side, workers
from moa_lab.storage import is_intact, to_json
from moa_lab.text import once

logger = logging.getLogger(__name__)

Supervision = Literal["model", "human", "text"]
SUPERVISIONS: tuple[Supervision, ...] = get_args(Supervision)

# Drafts that may be rejected per sample wanted; after that, samples keep the model's own wrong answers.
SPARE_DRAFTS = 1.0

Progress = Callable[[int, int], None]
"""Called with (samples done, samples in all)."""
Told = Callable[[Sample, list[AnswerScore]], None]
"""Called with a sample that the model answered, and the model's scores of its answers."""
Keep = Callable[[Sample, list[AnswerScore]], Sample | None]
"""What is kept of a draft of these scores: a sample with some of its answers, or nothing."""
_Answered = tuple[Sample | None, list[AnswerScore]]
"""What is kept of a draft, and the scores of answers that the model wrote."""


@dataclass(frozen=True)
class Examiner:
    """Another way to run drafts that the model should get right, which does more with their forward pass than score them.

    run: takes drafts of one length and what decides on them, and gives what was kept of each. bytes_each: of a draft of a length, at most.
    """

    run: Callable[[list[Sample], Keep], list[Sample | None]]
    bytes_each: Callable[[int], int]


@dataclass(frozen=True)
class Request:
    """How many samples of a task are wanted at every length."""

    task: Task
    count: int

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError(f"the number of {self.task.name!r} samples must be 0 or more, got {self.count}")


def requests(
    supervision: str = "model",
    *,
    questions: int = 16,
    per_sample: int = 1,
    others: int = 6,
    texts: int = 0,
    answer_tokens: int = 128,
    wordings: tuple[Wording, ...] | None = None,
) -> tuple[Request, ...]:
    """What each kind of supervision asks for (the paper's calibration ablation, arXiv 2406.14909, table 4).

    model: questions about planted facts, and summaries, both answered by the dense model; and `texts` samples of plain text. human:
    the documents' own human answers. text: plain text, no instruction. Raises ValueError for another name.
    wordings: of the questions; None: those of the split.
    """
    if supervision == "model":
        answered = (Request(Questions(per_sample, wordings=wordings), questions), Request(Summaries(answer_tokens=answer_tokens), others))
        return (*answered, Request(PlainText(), texts)) if texts else answered
    if supervision == "human":
        return (Request(HumanAnswers(), others),)
    if supervision == "text":
        return (Request(PlainText(), others),)
    raise ValueError(f"supervision must be one of {', '.join(SUPERVISIONS)}, got {supervision!r}")


def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    lengths: Sequence[int],
    *,
    wanted: Sequence[Request] | None = None,
    documents: Sequence[Document] | None = None,
    split: Split = "calibration",
    seed: int = 0,
    batch_size: int = 1,
    parts_dir: str | Path | None = None,
    progress: Progress | None = None,
    told: Told | None = None,
    examiner: Examiner | None = None,
) -> SampleSet:
    """Samples of exactly `lengths` tokens for every request, answered by `model` where the task says so.

    lengths: duplicates count once. documents: None takes the embedded ones of `split`; control tokens spelled in them stay text and are
    counted in `settings`. batch_size: samples answered at once. parts_dir: keeps finished samples, to go on after a kill.
    told: gets the dense model's scores of every answer that it wrote in this call.
    examiner: runs the questions' drafts (None: they are scored and no more).
    Raises ValueError for an empty or unusable request, a length beyond the model, a chat template that cannot be used, or documents
    that cannot fill a length.
    """
    model = plain_model(model)
    lengths = sorted(once(lengths, "lengths"))
    wanted = requests() if wanted is None else tuple(wanted)
    documents = embedded_documents(split) if documents is None else tuple(documents)
    _check(model, lengths, wanted)
    check_turns(tokenizer, max(turns_of(request.task) for request in wanted if request.count))
    if any(isinstance(request.task, HumanAnswers) and request.count for request in wanted):
        answered_documents(documents)
    drafted = [(request.task, length) for length in lengths for request in wanted if request.count]
    if len(drafted) > 1:  # one alone is refused by its own first draft
        rehearse(tokenizer, documents, split, drafted)
    escaped = tell_escaped(documents, tokenizer)
    weights = weights_fingerprint(model)
    answerer = _Answerer(model, end_tokens(model, tokenizer), batch_size, Path(parts_dir) if parts_dir else None, weights, told, examiner)
    total = sum(request.count for request in wanted) * len(lengths)
    samples: list[Sample] = []
    for length in lengths:
        sources: dict[str, Source] = {}
        for request in wanted:
            # One random generator per (task, length): asking for more of one does not change another. Two requests of one task share
            # it, or both would draw the same texts.
            name = request.task.name
            if name not in sources:
                own_seed = int(digest(f"{seed}/{split}/{name}/{length}".encode())[:8], 16)
                sources[name] = Source(tokenizer, documents, split, own_seed)
            for sample in answerer.samples(request, sources[name], length):
                samples.append(sample)
                if progress:
                    progress(len(samples), total)
    settings = {
        "lengths": lengths, "split": split, "documents": documents_hash(documents),
        "requests": [_told(request) for request in wanted], **({"escaped_controls": escaped} if escaped else {}),
    }  # fmt: skip
    result = SampleSet(tuple(samples), settings)
    where = provenance(
        model=model_name(model), weights=weights, tokenizer=tokenizer_fingerprint(tokenizer),
        calibration=result.identity, seed=seed, device=str(model.device),
    )  # fmt: skip
    return replace(result, provenance=where)


def _told(request: Request) -> dict[str, Any]:
    """A request as JSON; of wordings, which hold functions, only the names."""
    task = request.task
    told = {"task": task.name, "count": request.count}
    if isinstance(task, Questions) and task.wordings:
        return {**told, **to_json(replace(task, wordings=None)), "wordings": [wording.name for wording in task.wordings]}
    return {**told, **to_json(task)}


class _Answerer:
    """Turns drafts into samples whose answers are the dense model's own, in batches, each finished batch on disk."""

    def __init__(
        self, model: PreTrainedModel, never: tuple[int, ...], batch_size: int, folder: Path | None, weights: str, told: Told | None,
        examiner: Examiner | None,
    ) -> None:  # fmt: skip
        self.model, self.never, self.batch_size, self.folder, self.weights, self.told = model, never, batch_size, folder, weights, told
        self.examiner = examiner or Examiner(self._scored, lambda length: forward_bytes(model, length))

    def samples(self, request: Request, source: Source, length: int) -> list[Sample]:
        """`request.count` samples of one task and length."""
        kept: list[Sample] = []
        wrong: list[Sample] = []
        spare = int(request.count * SPARE_DRAFTS)
        at_once = self.batch_size * processes.from_first(
            lambda: processes.started() * workers(request.count, self.model.device, self.examiner.bytes_each(length))
        )
        while len(kept) < request.count and (len(wrong) <= spare):
            # No more than would be drawn batch by batch: the samples are the same on any number of cores.
            room = min(at_once, request.count - len(kept), max(self.batch_size, spare + 1 - len(wrong)))
            drafts = [request.task.draft(source, length) for _ in range(room)]
            for draft, answered in zip(drafts, self._answered(request.task, drafts), strict=True):
                (kept if answered is not None else wrong).append(answered or draft)
        missing = request.count - len(kept)
        if missing > 0:
            logger.warning(
                "%s at %d tokens: the model answers %d of %d drafts wrongly; %d samples keep its own wrong answers",
                request.task.name, length, len(wrong), len(wrong) + len(kept), missing,
            )  # fmt: skip
            kept += [sample for sample in self._stored(wrong[:missing], "own", self._fill, 1) if sample]
        return kept

    def _answered(self, task: Task, drafts: list[Sample]) -> list[Sample | None]:
        check_vocabulary(drafts, self.model)
        if isinstance(task, HumanAnswers | PlainText):
            return list(drafts)
        return self._stored(drafts, *(("own", self._fill) if isinstance(task, Summaries) else ("right", self._right)), self.batch_size)

    def _fill(self, drafts: list[Sample]) -> list[_Answered]:
        return [*answer_greedily(self.model, drafts, self.never)]

    def _right(self, drafts: list[Sample]) -> list[_Answered]:
        return [(kept, []) for kept in self.examiner.run(drafts, _keep_right)]

    def _scored(self, drafts: list[Sample], keep: Keep) -> list[Sample | None]:
        return [keep(*pair) for pair in zip(drafts, score_answers(self.model, drafts), strict=True)]

    def _stored(self, drafts: list[Sample], kind: str, answer: Callable[[list[Sample]], list[_Answered]], size: int) -> list[Sample | None]:
        """`answer` of `size` drafts at a time, or of a process's share of them, each result read from its file if an earlier run left
        one. A file without a sample marks a rejected draft."""
        found: dict[str, Sample | None] = {}
        paths: dict[str, Path] = {}
        if self.folder is not None:
            paths = {draft.identity: self.folder / f"{draft.identity}-{self.weights}-{kind}.safetensors" for draft in drafts}
            found = processes.from_first(lambda: {name: _read(path) for name, path in paths.items() if is_intact(path, SampleSet.load)})
        missing = [draft for draft in drafts if draft.identity not in found]

        def take(batch: tuple[list[Sample], list[_Answered]]) -> None:
            for draft, (answered, scores) in zip(*batch, strict=True):
                found[draft.identity] = answered
                if answered and scores and self.told:
                    self.told(answered, scores)
                if paths and processes.is_first():
                    SampleSet((answered,) if answered else ()).save(paths[draft.identity])

        size = -(-size // processes.sharing())
        batches = [missing[start : start + size] for start in range(0, len(missing), size)]
        longest = max((draft.length for draft in missing), default=0)
        side_by_side(
            lambda batch: (batch, answer(batch)), batches, self.model.device,
            bytes_each=size * self.examiner.bytes_each(longest), after=take,
        )  # fmt: skip
        return [found[draft.identity] for draft in drafts]


def _read(path: Path) -> Sample | None:
    return next(iter(SampleSet.load(path)), None)


def _keep_right(draft: Sample, scores: list[AnswerScore]) -> Sample | None:
    """The sample with only the answers that the model gives itself; None when those are fewer than half."""
    right = [score.exact for score in scores]
    if 2 * sum(right) < len(right):
        return None
    answers = tuple(answer for answer, exact in zip(draft.answers, right, strict=True) if exact)
    return replace(draft, answers=answers, detail={**draft.detail, "right": right})


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Token ids that end an answer, sorted; they are not generated, so that an answer has its exact length."""
    model = plain_model(model)
    ends: list[int] = []
    for value in (tokenizer.eos_token_id, model.generation_config.eos_token_id if model.generation_config else None):
        ends += value if isinstance(value, list) else [] if value is None else [value]
    return tuple(sorted(set(ends)))


def _check(model: PreTrainedModel, lengths: Sequence[int], wanted: Sequence[Request]) -> None:
    # Refuse a model that no plan can be applied to before it answers anything.
    attention_sites(model)
    geometry = geometry_of(model)
    for length in lengths:
        geometry.check_length(length)
    if not lengths or not sum(request.count for request in wanted):
        raise ValueError("nothing to calibrate: give at least one length and one sample")
