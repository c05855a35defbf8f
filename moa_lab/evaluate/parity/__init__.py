"""Parity: the ring cache and the kernels compared with full attention masks, on the user's own model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moa_lab.calibration.documents import TextStream, embedded_documents
from moa_lab.calibration.samples import Sample
from moa_lab.evaluate.parity.answers import answered
from moa_lab.evaluate.parity.bench import Bench
from moa_lab.evaluate.parity.cases import ROWS, all_cases, ring_sizes
from moa_lab.evaluate.parity.record import PARITY_SCHEMA, Parity, ParityRow, table
from moa_lab.evaluate.parity.served import served_cases, served_length, served_row
from moa_lab.evaluate.scoring import Progress
from moa_lab.evaluate.testsets import needle_samples
from moa_lab.geometry.wrappers import plain_model
from moa_lab.models import geometry_of, model_name, tokenizer_fingerprint, weights_fingerprint
from moa_lab.plan import Plan, PlanOrPath, as_plan
from moa_lab.provenance import Provenance, provenance
from moa_lab.serving import Answers

__all__ = ["PARITY_SCHEMA", "Parity", "ParityRow", "default_tokens", "parity", "served_parity", "table"]

MIN_TOKENS = 32
MOST_TOKENS = {"cpu": 1024, "cuda": 4096}
"""Upper limit of the default length by device; other devices take that of the CPU."""


def parity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: PlanOrPath,
    *,
    n_tokens: int | None = None,
    needles: int = 0,
    seed: int = 0,
    progress: Progress | None = None,
) -> Parity:
    """Compare the ring cache and the kernels under `plan` with uncached passes under full masks, head by head.

    n_tokens: the length N of the spans and of the longest texts, 32 up to the model's maximum; None: `default_tokens`. Texts are
    excerpts of the embedded test documents, drawn by `seed`. Every reference is one pass over all tokens of a single row, without
    cache, padding or chunks. Cases that a plan has no head for, or that N is too short for, are left out and named in
    `settings["left_out"]`. needles: number of needles, each in a text of n tokens, answered by the decode loop and by the reference.
    progress: called with (cases done, cases in all).

    Tolerances: 1e-3 in float32 and above. In half precision twice the difference between two equally right orders of summation on this
    model (the reference in one pass, and token by token over a full cache with reversed keys), at least 8 times the dtype's epsilon;
    smaller errors show in float32 only.
    Raises ValueError for a plan of another geometry and for a length outside the model.
    """
    model, plan = _belonging(model, plan)
    n = default_tokens(model, plan) if n_tokens is None else n_tokens
    bench = _bench(model, tokenizer, plan, n, seed)
    samples = needle_samples(tokenizer, n, needles, seed=seed) if needles else []
    return _record(bench, tokenizer, plan, _rows(bench, samples, progress), seed)


def served_parity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: PlanOrPath,
    answers: Answers,
    *,
    n_tokens: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Parity:
    """Hold the greedy tokens of what serves `plan` against passes of `model` under full masks; see `parity`.

    answers: a `moa_lab.serving.Server`, or another that tells its lengths. Its model is `model`, in the same dtype, from which tolerances
    follow. n_tokens: of the longest requests, prompt and new tokens; taken up to the next length that windows are taken at. A case passes
    where 99% of the positions agree at which the reference's best two are clearly apart.
    """
    model, plan = _belonging(model, plan)
    n = served_length(answers, default_tokens(model, plan) if n_tokens is None else n_tokens)
    bench, cases, found = _bench(model, tokenizer, plan, n, seed), served_cases(n, answers.lengths), []
    for done, case in enumerate(cases, start=1):
        found.append(served_row(bench, case, answers))
        if progress:
            progress(done, len(cases))
    return _record(bench, tokenizer, plan, found, seed)


def _belonging(model: PreTrainedModel, plan: PlanOrPath) -> tuple[PreTrainedModel, Plan]:
    """The model itself, and a plan that belongs to it; raises ValueError for a plan of another geometry."""
    model, plan = plain_model(model), as_plan(plan)
    # float16 rounds small weights, which changes the fingerprint.
    comparable = plan.provenance.weights and model.dtype != torch.float16
    plan.check_model(geometry_of(model), weights_fingerprint(model) if comparable else None)
    return model, plan


def _bench(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, plan: Plan, n: int, seed: int) -> Bench:
    longest = geometry_of(model).max_length
    if not MIN_TOKENS <= n <= longest:
        raise ValueError(f"n_tokens must lie in {MIN_TOKENS}..{longest} (the model's maximum length), got {n}")
    stream = TextStream(embedded_documents("test"), tokenizer, seed)
    texts = torch.tensor([stream.take(n) for _ in range(ROWS)], device=model.device)
    # Without its provenance: the weights were compared above.
    return Bench(model, replace(plan, provenance=Provenance()), n, texts)


def _record(bench: Bench, tokenizer: PreTrainedTokenizerBase, plan: Plan, rows: Sequence[ParityRow], seed: int) -> Parity:
    model = bench.model
    origin = provenance(
        model=model_name(model), weights=weights_fingerprint(model), tokenizer=tokenizer_fingerprint(tokenizer),
        seed=seed, device=str(model.device),
    )  # fmt: skip
    settings = {"plan": plan.name, "plan_identity": plan.identity(), "dtype": str(model.dtype).removeprefix("torch."), **bench.settings()}
    return Parity(tuple(rows), settings, origin)


def default_tokens(model: PreTrainedModel, plan: Plan) -> int:
    """The shortest length (a multiple of 64) at which the rings of all heads but full ones have wrapped, the smallest twice.

    At most the model's maximum length, and at most 1024 tokens on a CPU, 4096 on a GPU.
    """
    model = plain_model(model)
    most = min(geometry_of(model).max_length, MOST_TOKENS.get(model.device.type, MOST_TOKENS["cpu"]))
    for n in range(256, most, 64):
        sizes = ring_sizes(plan, n)
        # 8 more tokens, so that the first slots are written and read after the second wrap.
        if all(sink + ring < n for sink, ring in sizes) and all(sink + 2 * ring + 8 <= n for sink, ring in sizes[:1]):
            return n
    return most


def _rows(bench: Bench, samples: Sequence[Sample], progress: Progress | None) -> list[ParityRow]:
    cases, bench.left_out = all_cases(bench.n, ring_sizes(bench.plan, bench.n))
    jobs: list[Callable[[], ParityRow]] = [lambda case=case: bench.scripted(case) for case in cases]  # type: ignore[misc]
    # `allocated` checks the bytes of all caches before it.
    jobs += [bench.generated, bench.decoded, bench.allocated]
    if samples:
        jobs.append(lambda: answered(bench, samples))
    rows = []
    for done, job in enumerate(jobs, start=1):
        rows.append(job())
        if progress:
            progress(done, len(jobs))
    return rows
