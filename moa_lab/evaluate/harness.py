"""A bridge to EleutherAI's lm-evaluation-harness: any of its tasks, run on a model that a plan is applied to.

The harness is the extra `eval`; nothing else of this package needs it.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moa_lab.evaluate.harness_tasks import HarnessTasks, installed
from moa_lab.evaluate.intervals import Interval, mean_share, proportion, unknown
from moa_lab.geometry.wrappers import plain_model
from moa_lab.models import chat_ids, geometry_of, model_name, tokenizer_fingerprint, weights_fingerprint
from moa_lab.plan import Plan, PlanOrPath, as_plan, dense_plan
from moa_lab.prompting.controls import escaped_controls, told
from moa_lab.prompting.rendering import Shape, shape_of
from moa_lab.provenance import provenance
from moa_lab.records import Measurement, Measurements
from moa_lab.records.intervals import Z
from moa_lab.runtime import apply_plan
from moa_lab.runtime.arguments import whole_number
from moa_lab.text import once

logger = logging.getLogger(__name__)

STRING_MATCH = "string_match"
"""RULER's score: the share of the answers asked for that a reply holds. The harness names it after the length."""


def harness(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, plan: PlanOrPath | None, tasks: Sequence[str], *,
    limit: int | None = None, include_path: str | Path | None = None, batch_size: int = 1, n_tokens: int | None = None,
    chat_template: bool = False, few_shot: int | None = None, lengths: Sequence[int] | None = None, seed: int = 0,
) -> Measurements:  # fmt: skip
    """A row for every metric of every task (and group of tasks, with its members) under `plan`; None: the model as it is.

    tasks: names of the harness, or of the YAML files in the folder `include_path`. limit: documents a task at most. few_shot: examples
    in the prompt (None: as the task says). chat_template: prompts as turns of a chat, as models tuned for it expect. Without it, special
    tokens that documents spell are text, which a warning counts; in a chat the harness puts both in one string, and the warning says so.
    lengths: in tokens, of the texts of tasks that make their own (RULER; prompt and answer together), a row for each; `seed` draws them.
    n_tokens: the length that elastic rules are evaluated at. None: that of each prompt, including the answer where the harness
    scores given answers, without it where the model generates; in a batch, the padded length.
    A row's density, and its length where the texts are given, are means over the task's prompts. Its interval is Wilson's where the
    scores are hits and misses, else 1.96 of the harness's standard errors; where the harness has none, that of the documents' scores if
    they are shares, and unknown otherwise. `per_sample`, in the detail, holds the scores of the documents in order, for paired
    comparisons of plans.
    Raises ValueError where the harness is missing, for no task or an unknown one, for unusable lengths, for a task whose texts cannot be
    loaded, and for what `apply_plan` refuses.
    """
    model = plain_model(model)
    plan = None if plan is None else as_plan(plan)
    whole_number("batch_size", batch_size)
    whole_number("seed", seed, 0)
    if limit is not None:
        whole_number("limit", limit)
    if few_shot is not None:
        whole_number("few_shot", few_shot, 0)
    if chat_template:
        _check_chat(tokenizer)
    simple_evaluate, manager_type, wrapped_type = installed()
    named = HarnessTasks(manager_type, tasks, include_path, tokenizer)
    added = len(chat_ids(tokenizer, [{"role": "user", "content": ""}])) if chat_template else 0
    named.check_lengths(lengths, geometry_of(model).max_length - added)
    # A copy, since the harness adds a padding token where there is none.
    own = copy.deepcopy(tokenizer)
    # Special tokens spelled in documents stay text; not in a chat, where the template's own are in the same string.
    own.split_special_tokens = not chat_template
    wrapped = wrapped_type(pretrained=model, tokenizer=own, batch_size=batch_size)
    rows: list[Measurement] = []
    versions: dict[str, Any] = {}
    asked_for = [
        (task, asked) for task in once(tasks, "tasks") for asked in (once(lengths or (), "lengths") if named.makes_texts(task) else (None,))
    ]
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.nullcontext() if plan is None else apply_plan(model, plan, n_tokens))
        # All of them before the first is measured: one that cannot be loaded is refused before hours of work.
        ready = [(task, asked, *stack.enter_context(named.loaded(task, asked, seed))) for task, asked in asked_for]
        for task, asked, manager, loaded in ready:
            counted: Counter[int] = Counter()
            with _prompt_lengths(model, counted):
                results = simple_evaluate(
                    model=wrapped, tasks=loaded, task_manager=manager, limit=limit, num_fewshot=few_shot, batch_size=batch_size,
                    apply_chat_template=chat_template, log_samples=True, random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed,
                    fewshot_random_seed=seed,
                )  # fmt: skip
            _tell_spelled(tokenizer, task, results, chat_template)
            versions |= results["versions"]
            known = {(row.task, row.metric, row.length) for row in rows}
            found = harness_rows(results, plan or dense_plan(geometry_of(model)), counted, n_tokens, asked)
            # A task may be a member of a group that was asked for as well.
            rows += [row for row in found if (row.task, row.metric, row.length) not in known]
    settings = {
        "tasks": list(dict.fromkeys(tasks)), "limit": limit, "batch_size": batch_size, "n_tokens": n_tokens, "chat_template": chat_template,
        "few_shot": few_shot, "lengths": list(dict.fromkeys(lengths or ())), "task_versions": versions, "lm_eval": version("lm_eval"),
    }  # fmt: skip
    origin = provenance(
        model=model_name(model), weights=weights_fingerprint(model), tokenizer=tokenizer_fingerprint(tokenizer), seed=seed,
        device=str(model.device),
    )  # fmt: skip
    return Measurements(tuple(rows), settings, origin)


def harness_rows(
    results: Mapping[str, Any], plan: Plan, lengths: Mapping[int, int], n_tokens: int | None = None, asked: int | None = None
) -> list[Measurement]:
    """Rows of what `lm_eval.simple_evaluate` returned. lengths: number of prompts by length in tokens.

    asked: the length that the texts were generated for, which rows then name; scores at other lengths are left out. Some texts are
    shorter (`ruler_cwe` counts a worked example that it leaves out): `prompt_tokens`, in the detail, is the mean length.
    """
    counts = list(lengths.values())
    length = round(np.average(list(lengths), weights=counts)) if counts else 0
    density = float(np.average([plan.density(n_tokens or n) for n in lengths], weights=counts)) if counts else 1.0
    rows = []
    for task, scores in results["results"].items():
        # A group's score is computed from its members' scores and adds no evidence of its own.
        below = list(results.get("group_subtasks", {}).get(task, ()))
        members = {"members": below} if below else {}
        for key, value in scores.items():
            # Keys of metrics are `metric,filter`; skip other keys and standard errors.
            name, comma, by = key.partition(",")
            if not comma or name.endswith("_stderr") or not isinstance(value, Real):
                continue
            if asked is not None and name.isdigit() and int(name) != asked:
                continue
            stderr = scores.get(f"{name}_stderr,{by}")
            stderr = float(stderr) if isinstance(stderr, Real) else None
            per_sample = _per_sample(results.get("samples", {}).get(task, ()), name, by)
            interval = _interval(float(value), _documents(results, task), stderr, per_sample)
            detail = {"filter": by, "stderr": stderr, "per_sample": per_sample, **members}
            detail |= {} if asked is None else {"prompt_tokens": length}
            metric = STRING_MATCH if asked is not None and name.isdigit() else name if by == "none" else f"{name}_{by}"
            rows.append(Measurement(plan.name, metric, task, asked or length, *interval, density, detail))
    return rows


def _check_chat(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError unless the chat template takes what the harness passes: one user message, a string."""
    if not tokenizer.chat_template:
        raise ValueError("chat_template: the tokenizer has none; leave the option out")
    try:
        shape_of(tokenizer, ["user"], [Shape()], add_generation_prompt=True, in_order=False)
    except ValueError as error:
        reason = str(error).partition(";")[0]
        raise ValueError(f"chat_template: {reason}; leave the option out") from error


def _tell_spelled(tokenizer: PreTrainedTokenizerBase, task: str, results: Mapping[str, Any], chat: bool) -> None:
    samples = (sample for group in results.get("samples", {}).values() for sample in group)
    # A chat's prompts hold the template's own control tokens as well: there the documents are looked at.
    part = "doc" if chat else "arguments"
    spelled = escaped_controls(tokenizer, {text for sample in samples for text in _strings(sample.get(part))})
    if spelled:
        ends = "in the harness's chats they count as control tokens; run without --chat-template" if chat else "they are kept as text"
        logger.warning("%s of %s spell %s; %s", "documents" if chat else "prompts", task, told(spelled), ends)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(one)


@contextlib.contextmanager
def _prompt_lengths(model: PreTrainedModel, lengths: Counter[int]) -> Iterator[None]:
    """Count in `lengths` the rows of every pass that starts a sequence, by their tokens, padding included."""

    def count(_: torch.nn.Module, arguments: tuple[Any, ...], settings: dict[str, Any]) -> None:
        cache = settings.get("past_key_values")
        if cache is None or cache.get_seq_length() == 0:
            rows, tokens = (arguments[0] if arguments else settings["input_ids"]).shape
            lengths[tokens] += rows

    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _documents(results: Mapping[str, Any], task: str) -> int:
    """Documents that a task, or a group with all its members, was measured on."""
    counts = results["n-samples"]
    if task in counts:
        return int(counts[task]["effective"])
    return sum(_documents(results, member) for member in results["group_subtasks"].get(task, ()))


def _per_sample(samples: Sequence[Mapping[str, Any]], metric: str, by: str) -> list[float]:
    """Scores of the documents in order; empty where a document's is not one number (perplexities, F1 of all documents together)."""
    found = [sample for sample in samples if sample.get("filter", by) == by]
    scores = [sample.get(metric) for sample in sorted(found, key=lambda sample: sample["doc_id"])]
    return [float(score) for score in scores if isinstance(score, Real)] if all(isinstance(score, Real) for score in scores) else []


def _interval(value: float, n: int, stderr: float | None, per_sample: Sequence[float]) -> Interval:
    if per_sample and set(per_sample) <= {0.0, 1.0} and np.isclose(np.mean(per_sample), value):
        # The harness's standard error is 0 where all are hits, although the true share may be lower.
        return proportion(int(sum(per_sample)), len(per_sample))
    # The harness gives 0 or NaN for a single document, and for scores that it has no standard error for.
    if not stderr or not math.isfinite(stderr):
        shares = per_sample and all(0 <= score <= 1 for score in per_sample) and np.isclose(np.mean(per_sample), value)
        return mean_share(per_sample) if shares else unknown(value, n)
    return Interval(value, n, value - Z * stderr, value + Z * stderr)
