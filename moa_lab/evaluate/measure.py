"""Retrieval and perplexity of one plan, in one call each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moa_lab.calibration.samples import Sample
from moa_lab.evaluate.scoring import Progress, loss_rows, retrieval_rows, score_samples
from moa_lab.evaluate.testsets import document_samples, line_samples, needle_samples, own_answer_samples
from moa_lab.geometry.wrappers import plain_model
from moa_lab.models import geometry_of, model_name, tokenizer_fingerprint, weights_fingerprint
from moa_lab.plan import Plan, PlanOrPath, as_plan, dense_plan
from moa_lab.provenance import provenance
from moa_lab.records import Measurement, Measurements
from moa_lab.text import once


def retrieval(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: PlanOrPath | None = None,
    *,
    lengths: Sequence[int],
    n: int = 64,
    kind: Literal["needles", "lines"] = "needles",
    needles_per_text: int = 1,
    seed: int = 0,
    progress: Progress | None = None,
) -> Measurements:
    """Exact match of `n` needles (or lines of a register) per length under `plan`, with 95% intervals.

    plan: a plan or the path of its card; None: dense.

    Raises ValueError for an unknown kind, for a length beyond the model, and for a plan of another geometry.
    """
    model = plain_model(model)
    chosen = _chosen(model, plan)
    samples: list[Sample] = []
    for length in _checked(model, lengths):
        if kind == "needles":
            samples += needle_samples(tokenizer, length, n, per_sample=needles_per_text, seed=seed)
        elif kind == "lines":
            samples += line_samples(tokenizer, length, n, seed=seed)
        else:
            raise ValueError(f"kind must be 'needles' or 'lines', got {kind!r}")
    return _measured(model, tokenizer, chosen, samples, retrieval_rows, {"kind": kind, "n": n}, seed, progress)


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: PlanOrPath | None = None,
    *,
    lengths: Sequence[int],
    n: int = 16,
    kind: Literal["documents", "summaries"] = "documents",
    seed: int = 0,
    progress: Progress | None = None,
) -> Measurements:
    """Cross-entropy (nats per token; perplexity in `detail`) of held-out documents, or of the dense model's own summaries.

    Raises ValueError for an unknown kind, for a length beyond the model, and for a plan of another geometry.
    """
    model = plain_model(model)
    chosen = _chosen(model, plan)
    samples: list[Sample] = []
    for length in _checked(model, lengths):
        if kind == "documents":
            samples += document_samples(tokenizer, length, n, seed=seed)
        elif kind == "summaries":
            samples += own_answer_samples(model, tokenizer, length, n, seed=seed)
        else:
            raise ValueError(f"kind must be 'documents' or 'summaries', got {kind!r}")
    return _measured(model, tokenizer, chosen, samples, loss_rows, {"kind": kind, "n": n}, seed, progress)


def _chosen(model: PreTrainedModel, plan: PlanOrPath | None) -> Plan:
    """The plan, checked against the model before texts are drawn; a dense plan too, which `apply_plan` never sees."""
    geometry = geometry_of(model)
    chosen = dense_plan(geometry) if plan is None else as_plan(plan)
    chosen.check_model(geometry)
    return chosen


def _checked(model: PreTrainedModel, lengths: Sequence[int]) -> tuple[int, ...]:
    """The lengths, each once: a repeated length would give the same samples again."""
    geometry = geometry_of(model)
    for length in lengths:
        geometry.check_length(length)
    return once(lengths, "lengths")


def _measured(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, plan: Plan, samples: list[Sample],
    make_rows: Callable[..., list[Measurement]], settings: dict[str, Any], seed: int, progress: Progress | None,
) -> Measurements:  # fmt: skip
    rows = make_rows(plan, samples, score_samples(model, plan, samples, progress=progress))
    origin = provenance(
        model=model_name(model), weights=weights_fingerprint(model), tokenizer=tokenizer_fingerprint(tokenizer),
        seed=seed, device=str(model.device),
    )  # fmt: skip
    return Measurements(tuple(rows), settings, origin)
