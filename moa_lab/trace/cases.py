"""Cases to trace: a prompt of the user's, a needle, or the first test sample that a plan loses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moa_lab.calibration.documents import TextStream, embedded_documents
from moa_lab.calibration.samples import Sample
from moa_lab.evaluate.testsets import line_samples, needle_samples
from moa_lab.geometry.wrappers import plain_model
from moa_lab.models import chat_ids, geometry_of, prompt_ids
from moa_lab.plan import Plan, dense_plan
from moa_lab.runtime.arguments import stop_ids
from moa_lab.trace.answer import Answer, Progress, answer, say, within
from moa_lab.trace.case import Case

MAKES: dict[str, Callable[..., list[Sample]]] = {"needle": needle_samples, "line": line_samples}
"""Kinds of test samples."""


def prompt_case(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int = 32, *, text_tokens: int = 0,
    chat: bool | None = None, progress: Progress | None = None,
) -> Case:  # fmt: skip
    """`prompt` with the dense model's greedy answer, up to and with the token that ends it.

    text_tokens: of an embedded document before the prompt. chat: as a user's message; None: where the tokenizer has a chat template.
    Raises ValueError for an empty prompt, no new tokens, and a length beyond the model's.
    """
    model = plain_model(model)
    geometry = geometry_of(model)
    if max_new_tokens < 1:
        raise ValueError(f"at least one new token is needed, got {max_new_tokens}")
    if not prompt.strip():
        raise ValueError("the prompt is empty")
    if text_tokens:
        words = TextStream(embedded_documents("test"), tokenizer, 0).take(text_tokens)
        prompt = f"{tokenizer.decode(words)}\n\n{prompt}"
    as_chat = tokenizer.chat_template is not None if chat is None else chat
    ids = chat_ids(tokenizer, [{"role": "user", "content": prompt}]) if as_chat else prompt_ids(tokenizer, prompt)
    n_tokens = len(ids) + max_new_tokens
    if n_tokens > geometry.max_length:
        raise ValueError(
            f"{len(ids)} prompt and {max_new_tokens} new tokens: all together must be at most {geometry.max_length}, "
            "the model's maximum length"
        )
    stops = stop_ids(model, tokenizer, None)
    said = say(model, dense_plan(geometry), np.array(ids, dtype=np.int64), n_tokens, max_new_tokens, stops, progress)
    return Case(np.array([*ids, *said], dtype=np.int64), len(ids), len(ids) + len(said))


def sample_cases(sample: Sample, kind: str = "") -> list[Case]:
    """A case for every answer of a sample; the answers before it are part of its prompt. kind: "" for the sample's task."""
    return [Case(sample.tokens[:stop], start, sample.length, kind or sample.task) for start, stop in sample.answers]


def drawn_cases(tokenizer: PreTrainedTokenizerBase, kind: str, length: int, n: int, seed: int = 0) -> list[Case]:
    """`n` test samples of `length` tokens: "needle", at depths that cover the text, or "line".

    Raises ValueError for another kind, and for a length without room.
    """
    if kind not in MAKES:
        raise ValueError(f"kind must be {' or '.join(MAKES)}, got {kind!r}")
    return [case for sample in MAKES[kind](tokenizer, length, n, seed=seed) for case in sample_cases(sample, kind)]


@dataclass(frozen=True, eq=False)
class Lost:
    """A test sample that the dense model answers and a plan does not, with both answers. tried: samples looked at."""

    case: Case
    dense: Answer
    cut: Answer
    tried: int


def first_lost(
    model: PreTrainedModel, plan: Plan, cases: list[Case], stops: list[int] | None = None, progress: Progress | None = None
) -> Lost | None:
    """The first of `cases` that is lost under `plan`; None where none is. progress: of all cases."""
    dense = dense_plan(geometry_of(plain_model(model)))
    for tried, case in enumerate(cases):
        if progress:
            progress(tried, len(cases))
        cut = answer(model, case, plan, stops, within(progress, tried, len(cases)))
        if cut.first_difference is None:
            continue
        whole = answer(model, case, dense, stops)
        if whole.first_difference is None:
            return Lost(case, whole, cut, tried + 1)
    return None
